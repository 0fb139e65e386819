"""The options that scripts share, and the folders that they write to.

A run writes into `out/NAME/` at the root of the checkout, which git ignores. With --record it also writes its JSON and
its plots into `results/NAME/` beside the script, which git tracks and from which `report.py` makes the tables.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
import tempfile
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "out" / "cache"  # of pretrained parameters and of text, shared by all scripts


# ----------------------------------------------------------------------------------------------------------------------
# Types of options.


def positive(kind: type) -> Callable[[str], Any]:
  """A parser of numbers above zero, for argparse."""

  def parse(text: str) -> Any:
    try:
      value = kind(text)
    except ValueError:
      value = 0
    if not 0 < value < float("inf"):
      noun = "whole number" if kind is int else "number"
      raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} above 0")
    return value

  return parse


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
  """A parser of comma-separated values, which returns them sorted and without repeats."""

  def parse(text: str) -> list[Any]:
    return sorted({kind(part) for part in text.split(",")})

  return parse


def folder(text: str) -> Path:
  """A parser of directories that exist or can be made."""
  path = Path(text)
  if path.exists() and not path.is_dir():
    raise argparse.ArgumentTypeError(f"{text!r} is not a directory")
  return path


# ----------------------------------------------------------------------------------------------------------------------
# The parser.


def make_parser(
  script: str, description: str | None, example: str, rounds: int = 15, *, records: bool = True, caches: bool = False
) -> argparse.ArgumentParser:
  """A parser with the options that every script has.

  Args:
    script: the script's `__file__`; its name and its folder decide where results go.
    description: the text of --help.
    example: options for the example in --help.
    rounds: the default of --rounds.
    records: whether the script has --record.
    caches: whether the script has --cache.
  """
  file = Path(script).resolve()
  home, name = file.parent, file.stem
  parser = argparse.ArgumentParser(
    description=description,
    epilog=f"example: python {home.name}/{name}.py {example}".rstrip(),
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--rounds", type=positive(int), default=rounds, help="interleaved rounds of timing")
  parser.add_argument("--out", type=folder, default=home.parent / "out" / name, help="where the run writes")
  parser.set_defaults(recorded=home / "results" / name)
  if records:
    where = f"{home.name}/results, from which the tables of the READMEs are made"
    parser.add_argument("--record", action="store_true", help=f"write the JSON and the plots into {where}, too")
  if caches:
    parser.add_argument("--cache", type=folder, default=CACHE, help="where pretrained parameters and text are kept")
  parser.add_argument("--quiet", action="store_true", help="no progress bar")
  return parser


def add_layers(parser: argparse.ArgumentParser) -> None:
  """Adds the number of transformer blocks, for scripts that take one number."""
  parser.add_argument("--layers", type=positive(int), default=6, help="transformer blocks")


def add_sizes(parser: argparse.ArgumentParser) -> None:
  """Adds the other sizes of the language model, the same for JAX and for torch."""
  count = positive(int)
  parser.add_argument("--d", type=count, default=512, help="the model's width")
  parser.add_argument("--batch", type=count, default=8, help="sequences per step")
  parser.add_argument("--seq", type=count, default=128, help="tokens per sequence")
  parser.add_argument("--rank", type=count, default=8, help="LoRA's rank")
  parser.add_argument("--alpha", type=positive(float), default=16.0, help="LoRA's alpha")
  parser.add_argument("--vocabulary", type=count, default=4096, help="size of the vocabulary")
  parser.add_argument("--bf16", action="store_true", help="parameters and computation in bfloat16")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, **quick: Any) -> argparse.Namespace:
  """Adds --quick and parses the command line.

  Args:
    parser: of `make_parser`.
    argv: the command line.
    **quick: the defaults under --quick; options on the command line still override them.
  """
  small = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in quick.items())
  parser.add_argument("--quick", action="store_true", help=f"a first look, of no value as a result: {small}")
  if parser.parse_known_args(argv)[0].quick:
    parser.set_defaults(**quick)
  args = parser.parse_args(argv)
  if args.quick and getattr(args, "record", False):
    parser.error(
      "--record and --quick: the tables of the READMEs are made from recorded results, and --quick measures too little"
      " for a table; leave one of them out"
    )
  return args


# ----------------------------------------------------------------------------------------------------------------------
# Folders.


def rename(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> None:
  """Gives a run folders of another name, for results that are kept beside the script's main one."""
  if args.out == parser.get_default("out"):
    args.out = args.out.with_name(name)
  args.recorded = args.recorded.with_name(name)


def check_writable(folder: Path, option: str) -> None:
  """Makes a directory.

  Raises:
    ValueError: if it cannot be written to.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise ValueError(f"{option}: cannot write to {folder} ({error.strerror}); name another directory") from error


def check_folders(args: argparse.Namespace) -> None:
  """Makes the directories of a run.

  Raises:
    ValueError: if one of them cannot be written to, naming its option.
  """
  check_writable(args.out, "--out")
  if getattr(args, "record", False):
    check_writable(args.recorded, "--record")
  if hasattr(args, "cache") and not getattr(args, "no_cache", False):
    check_writable(args.cache, "--cache")
