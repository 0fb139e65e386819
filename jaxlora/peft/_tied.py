"""Tied weights: an embedding that is the head's weight, too, in adapters and in trees.

PEFT adapts the look-ups and the head of a tied model as two modules. One tensor can hold what becomes of both where
that is the same: with `ensure_weight_tying`, or where the head's factors are the embedding's, transposed.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import re
from typing import Any

import numpy as np

from jaxlora.peft._records import Adapter, Module

# The last component of the names that token embeddings have in models with a head.
EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "embed_in", "word_embeddings", "tokens_embed")

# The heads of encoders that predict masked tokens, by modules beside them: those of BERT, ALBERT, DistilBERT, ELECTRA,
# RoBERTa and ModernBERT. In an encoder without such modules the embedding has no other use.
_OF_ENCODERS = {
  "cls.predictions": "cls.predictions.decoder",
  "predictions": "predictions.decoder",
  "vocab_transform": "vocab_projector",
  "generator_predictions": "generator_lm_head",
  "lm_head.layer_norm": "lm_head.decoder",
  "decoder": "decoder",
}

# Those of decoders that are not called lm_head: by modules beside them (Whisper, BioGPT), or by their embedding's name.
_OF_DECODERS = {"model.encoder.conv1": "proj_out", "biogpt": "output_projection"}
_OF_EMBEDDINGS = {"embed_in": "embed_out", "tok_embeddings": "output"}

_HEAD = re.compile(
  r"(?:.*\.)?(?:lm_head|embed_out|(?:cls\.)?predictions\.decoder|lm_head\.decoder|vocab_projector|generator_lm_head)"
  r"|decoder|output|proj_out|output_projection"
)

# Tasks of PEFT's whose models have no head over the vocabulary.
HEADLESS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

_STEMS = ("model", "transformer", "decoder")  # of torch's names, behind which a model has its embedding


@dataclasses.dataclass(frozen=True)
class Uses:
  """What an adapter makes of a token embedding, and of the head that may be tied to it.

  Attributes:
    embedding: the name of its module, where the adapter changes it.
    head: the name of the head's module, where the adapter changes it.
    alike: whether both become the same, so that one tensor can hold it.
  """

  embedding: str | None
  head: str | None
  alike: bool


def uses_of(adapter: Adapter) -> Uses | None:
  """What an adapter makes of a token embedding and of the head; `None` where it changes neither."""
  saved = [name.removesuffix(".weight") for name in adapter.whole if name.endswith(".weight")]
  rows = {name.removesuffix(".weight"): rows for name, rows in adapter.tokens.items()}
  changed = {*adapter.modules, *rows, *(name for name in saved if _is_asked(name, adapter.config))}
  held = [*adapter.modules, *saved, *rows]
  embedding, head = (next((name for name in held if check(name)), None) for check in (is_embedding, is_head))
  if changed.isdisjoint((embedding, head)):
    return None
  if embedding is None or head is None:
    # PEFT ties rows of tokens to the head of a tied model without being asked.
    said = bool(adapter.config.get("ensure_weight_tying")) or (embedding in rows and embedding not in adapter.modules)
    return Uses(embedding, head, alike=head is None and said)
  if embedding in rows and head in rows:
    first, second = rows[embedding], rows[head]
    return Uses(embedding, head, first.indices == second.indices and np.array_equal(first.rows, second.rows))
  modules = [adapter.modules.get(name) for name in (embedding, head)]
  values = [adapter.whole.get(f"{name}.weight") for name in (embedding, head)]
  if modules[0] is not None and modules[1] is not None:
    return Uses(embedding, head, alike=_is_transposed(modules[1], modules[0]))
  same = values[0] is not None and values[1] is not None and np.array_equal(values[0], values[1])
  return Uses(embedding, head, alike=same)


def shared_by_several(adapter: Adapter) -> str | None:
  """What is wrong with an adapter of an embedding that an encoder and a decoder share (T5, BART); `None` if nothing is.

  They hold the module under names of their own, so that what PEFT puts in its place is never called.
  """
  whole = [name.removesuffix(".weight") for name in adapter.whole]
  changed = [name for name, module in adapter.modules.items() if module.kind == "embedding"]
  changed += [name for name in whole if _is_asked(name, adapter.config)]
  name = next((name for name in changed if is_shared(name)), None)
  return name and (
    f"{name}: {NEVER_CALLED} For what it does in PEFT leave its tensors and its name out of the adapter's files"
  )


NEVER_CALLED = (
  "PEFT adapts this module, which an encoder and a decoder hold under names of their own: its update is never used."
)


def is_shared(name: str) -> bool:
  """Whether a torch module of this name is an embedding that an encoder and a decoder share."""
  return name.rpartition(".")[2] == "shared"


def is_embedding(name: str) -> bool:
  """Whether a torch module of this name is a token embedding that a head may be tied to."""
  return name.rpartition(".")[2] in EMBEDDINGS


def is_of_encoder(embedding: str) -> bool:
  """Whether a token embedding is an encoder's, by its name: `bert.embeddings.word_embeddings`."""
  return embedding.split(".")[-2:-1] == ["embeddings"]


def is_head(name: str) -> bool:
  """Whether a torch module of this name is a head over the vocabulary."""
  return _HEAD.fullmatch(name) is not None


def _is_asked(module: str, config: Mapping[str, Any]) -> bool:
  """Whether `modules_to_save` names a module: PEFT writes embeddings unasked, too, where they are the base's own."""
  saved = config.get("modules_to_save") or []
  return any(module.endswith(name) for name in saved if isinstance(name, str))


def _is_transposed(head: Module, embedding: Module) -> bool:
  """Whether a head's update is the embedding's: the same factors, transposed and exchanged."""
  return (
    head.kind == "linear"
    and embedding.kind == "embedding"
    and head.magnitude is None
    and embedding.magnitude is None
    and head.scale == embedding.scale
    and np.array_equal(head.a, embedding.b_matrix.T)
    and np.array_equal(head.b_matrix, embedding.a.T)
  )


def without_head(adapter: Adapter, head: str) -> Adapter:
  """The adapter without what it makes of a head that is the embedding's own weight."""
  modules = {name: module for name, module in adapter.modules.items() if name != head}
  parts: dict[str, Any] = {
    field: {name: value for name, value in getattr(adapter, field).items() if name != f"{head}.weight"}
    for field in ("whole", "bases", "tokens")
  }
  return dataclasses.replace(adapter, modules=modules, **parts)


def tied_head(module: Module, name: str) -> Module:
  """A head's module whose update is that of the embedding that it is tied to."""
  a, b = (np.ascontiguousarray(x) for x in (module.b_matrix.T, module.a.T))
  return Module(name, "linear", a, b, module.alpha, module.scaling)


def head_name(embedding: str, modules: Iterable[str]) -> str | None:
  """What torch calls the head that a token embedding may be tied to; `None` where there is none.

  Args:
    embedding: the name of its module.
    modules: the names of the model's modules; some of those that have parameters are enough.
  """
  beside = list(modules)
  for stem, head in (_OF_ENCODERS if is_of_encoder(embedding) else _OF_DECODERS).items():
    found = filter(None, (re.match(rf"((?:.*\.)??){re.escape(stem)}(?:\.|$)", name) for name in beside))
    if (first := next(found, None)) is not None:
      return f"{first[1]}{head}"
  if is_of_encoder(embedding):
    return None
  *parts, last = embedding.split(".")
  if last in _OF_EMBEDDINGS:
    return _OF_EMBEDDINGS[last]
  if parts[:1] and parts[0] in _STEMS:
    return "lm_head"
  while parts and parts[-1] in _STEMS:
    parts.pop()
  return ".".join([*parts, "lm_head"])
