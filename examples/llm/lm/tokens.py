"""The tokenizer and the chat template that a GGUF file carries."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3  # llama.cpp's type of tokens that are never text


@dataclasses.dataclass(frozen=True)
class Chat:
  """Text to tokens and back.

  Attributes:
    tokenizer: of the file.
    template: the chat template, in Jinja.
    end: the token that ends a message, and with it an answer.
    pad: the token of padding.
  """

  tokenizer: Tokenizer
  template: str
  end: int
  pad: int

  def prompt(self, text: str, system: str | None = None) -> list[int]:
    """A user's message, up to where the answer begins."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    messages = [{"role": "system", "content": system}] if system else []
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(self.template)
    messages.append({"role": "user", "content": text})
    return self.encode(template.render(messages=messages, add_generation_prompt=True))

  def answer(self, text: str) -> list[int]:
    """An answer with its end."""
    return [*self.encode(text), self.end]

  def encode(self, text: str) -> list[int]:
    """Tokens of a text as it is."""
    return self.tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, tokens: Sequence[int]) -> str:
    """The text up to the first end."""
    tokens = list(tokens)
    kept = tokens[: tokens.index(self.end)] if self.end in tokens else tokens
    return self.tokenizer.decode(kept, skip_special_tokens=True).strip()


def chat_of(fields: Mapping[str, Any], vocabulary: int) -> Chat:
  """The tokenizer of a file's metadata: byte-level BPE, each digit a token of its own.

  Raises:
    ValueError: if the file has a tokenizer of another kind, or one that does not fit the embedding.
  """
  kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
  if kind != ("gpt2", "smollm"):
    raise ValueError(f"found a tokenizer of the kind {kind}, expected ('gpt2', 'smollm'): its rules are not known here")
  needed = ("ggml.token_type", "ggml.merges", "ggml.eos_token_id", "ggml.padding_token_id", "chat_template")
  if missing := [name for name in needed if f"tokenizer.{name}" not in fields]:
    raise ValueError(
      f"the tokenizer lacks {', '.join(missing)}, expected those of a chat model: take its instructed one"
    )
  names, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
  if len(names) != vocabulary:
    raise ValueError(
      f"the tokenizer has {len(names):,} tokens and the embedding {vocabulary:,} rows, expected as many: they are of"
      " different models"
    )
  end, pad = fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.padding_token_id"]
  if max(end, pad) >= vocabulary:
    raise ValueError(f"the tokenizer ends with token {end} and pads with {pad}, expected them below {vocabulary:,}")
  merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
  try:
    tokenizer = Tokenizer(models.BPE(vocab={name: k for k, name in enumerate(names)}, merges=merges))
  except Exception as error:
    raise ValueError(f"the tokenizer's merges are not of its tokens ({error}): convert the model again") from error
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(
    [
      AddedToken(name, special=True, normalized=False)
      for name, type in zip(names, types, strict=True)
      if type == CONTROL
    ]
  )
  return Chat(tokenizer, fields["tokenizer.chat_template"], end, pad)
