"""Writes an adapter that finetune.py kept for others: a PEFT folder, llama.cpp's adapter, merged safetensors.

OUT/peft             for peft, vLLM, SGLang: jaxlora.peft.save
OUT/adapter.gguf     for llama.cpp (--lora adapter.gguf): jaxlora.hub.save_gguf_adapter
OUT/merged           a model's safetensors: jaxlora.hub.save
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lm import gguf_file

import jaxlora
from jaxlora import checkpoint, hub, peft


def make_parser() -> argparse.ArgumentParser:
  """The options."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="example: python examples/llm/export.py out/llm/NAME.adapter out/llm/exported",
  )
  parser.add_argument("adapter", type=Path, help="a folder that finetune.py has written, NAME.adapter")
  parser.add_argument("out", type=Path, help="a new folder")
  parser.add_argument("--model", type=Path, help="the GGUF file that was adapted (default: SmolLM2-135M-Instruct)")
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Writes all three."""
  parser = make_parser()
  args = parser.parse_args(argv)
  if args.out.exists():
    parser.error(f"{args.out}: is there already; name another folder, or remove it first")
  try:
    file = args.model or gguf_file.packaged()
    model, _ = gguf_file.load(file)
    tree = checkpoint.load(args.adapter, model)
    peft.save(args.out / "peft", tree, task_type="CAUSAL_LM")
    hub.save_gguf_adapter(args.out / "adapter.gguf", tree, base=file)
    hub.save(args.out / "merged", jaxlora.merge(tree))
  except ValueError as error:
    parser.error(str(error))
  print(f"{args.out}: peft, adapter.gguf, merged")


if __name__ == "__main__":
  main()
