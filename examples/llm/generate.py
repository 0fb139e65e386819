"""Answers prompts with the language model's example: the base, or the base with an adapter that finetune.py kept."""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from lm import decoding, gguf_file, methods, tokens
from lm.rows import STEP, Example

from jaxlora import checkpoint


def make_parser() -> argparse.ArgumentParser:
  """The options."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog='example: python examples/llm/generate.py "What is the capital of France?" --adapter out/llm/NAME.adapter',
  )
  parser.add_argument("prompt", nargs="*", help="messages of a user; none: one a line from the standard input")
  parser.add_argument("--adapter", type=Path, help="a folder that finetune.py has written, NAME.adapter")
  parser.add_argument(
    "--base", choices=("float", *methods.CODES), default="float", help="the weights that the adapter was trained on"
  )
  parser.add_argument("--model", type=Path, help="a GGUF file of a Llama-family model (default: SmolLM2-135M-Instruct)")
  parser.add_argument("--limit", type=int, default=64, help="the most tokens of an answer (default: 64)")
  return parser


def main(argv: Sequence[str] | None = None) -> list[str]:
  """Prints the answers, and returns them."""
  parser = make_parser()
  args = parser.parse_args(argv)
  try:
    model, fields = gguf_file.load(args.model or gguf_file.packaged())
    chat = tokens.chat_of(fields, model.config.vocabulary)
    if args.adapter is not None:
      method = methods.Method("lora", base=args.base)
      model = methods.plain(checkpoint.load(args.adapter, methods.base_of(method, model)))
  except ValueError as error:
    parser.error(str(error))
  prompts = [chat.prompt(text) for text in args.prompt or filter(None, map(str.strip, sys.stdin))]
  context = model.config.context
  most = (context - args.limit) // STEP * STEP
  if not prompts:
    parser.error("found no prompt: give one as an argument, or one a line on the standard input")
  if args.limit < 1 or most < 1:
    parser.error(f"--limit: found {args.limit}, expected at least 1 and less than the model's context, {context}")
  if (longest := max(map(len, prompts))) > most:
    parser.error(
      f"the longest prompt has {longest} tokens, expected at most {most}: the model's context is {context} and the"
      f" answer has {args.limit} of it; shorten the prompt, or answers by --limit"
    )
  answers = decoding.answers(model, chat, [Example(prompt, []) for prompt in prompts], len(prompts), args.limit)
  print("\n".join(answers))
  return answers


if __name__ == "__main__":
  main()
