"""Writes every measured table of the READMEs from the results: no number is typed by hand.

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of `TABLES`. With --check
nothing is written, and a table that is not what its results say is an error.
"""

import argparse
from collections.abc import Sequence
import importlib
import json
from pathlib import Path
import re
import sys
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
DOCUMENTS = (HERE / "README.md", HERE.parent / "README.md")
_TABLE = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


class Table(NamedTuple):
  """Where a table comes from: a result's JSON, and the function of a module here that makes markdown of it."""

  json: str
  module: str
  function: str = "tables"


TABLES = {
  "finetune": Table("finetune/finetune.json", "finetune"),
  "finetune_conv": Table("finetune_conv/finetune.json", "finetune"),
  "finetune_brief": Table("finetune/finetune.json", "finetune", "brief"),
  "sentence_encoder": Table("sentence_encoder/sentence_encoder.json", "sentence_encoder"),
  "summarize": Table("summarize/summarize.json", "summarize"),
  "train_step": Table("train_step/train_step.json", "train_step"),
  "train_step_brief": Table("train_step/train_step.json", "train_step", "brief"),
  "train_step_suite": Table("train_step_suite/train_step.json", "train_step", "suite_table"),
  "train_step_suite_brief": Table("train_step_suite/train_step.json", "train_step", "brief_suite"),
  "forward": Table("forward/forward.json", "forward"),
  "memory": Table("memory/memory.json", "memory"),
  "variants": Table("variants/variants.json", "variants"),
  "serving": Table("serving/serving.json", "serving"),
  "compile_time": Table("compile_time/compile_time.json", "compile_time"),
}


class ReportError(Exception):
  """What keeps a table from being made, and what to do."""


def make(name: str, results: Path) -> str:
  """A table as markdown.

  Raises:
    ReportError: if there is no such table, or no result or no script to make it from.
  """
  if name not in TABLES:
    raise ReportError(f"there is no table {name!r}; there are: {', '.join(TABLES)}")
  table = TABLES[name]
  path = results / table.json
  if not path.exists():
    raise ReportError(f"table {name!r} has no results at {path}: run benchmarks/{table.module}.py")
  if not (HERE / f"{table.module}.py").exists():
    raise ReportError(f"table {name!r} has no script benchmarks/{table.module}.py")
  module = importlib.import_module(table.module)
  return getattr(module, table.function)(json.loads(path.read_text())).strip("\n")


def rebuild(text: str, results: Path) -> tuple[str, list[str]]:
  """A document with its tables made again, and the names of those that were something else before.

  Raises:
    ReportError: if a table cannot be made, or a comment that begins one has none that ends it.
  """
  stale = []

  def again(found: re.Match[str]) -> str:
    if "<!-- table:" in found["body"]:
      raise ReportError(f"table {found['name']!r} has no <!-- end -->")
    body = make(found["name"], results) + "\n"
    if body != found["body"]:
      stale.append(found["name"])
    return found["begin"] + body + found["end"]

  new = _TABLE.sub(again, text)
  if len(_TABLE.findall(text)) != text.count("<!-- table:"):
    raise ReportError("a comment <!-- table: NAME --> is misspelt, or has no <!-- end -->")
  return new, stale


def main(argv: Sequence[str] | None = None) -> int:
  """Writes the tables, or with --check says which are stale; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is stale")
  parser.add_argument("--results", type=Path, default=HERE / "results", help="where the results lie")
  parser.add_argument("documents", nargs="*", type=Path, default=DOCUMENTS, help="the files that hold the tables")
  args = parser.parse_args(argv)
  failed = False
  for document in args.documents:
    text = document.read_text()
    try:
      new, stale = rebuild(text, args.results)
    except ReportError as error:
      print(f"{document}: {error}", file=sys.stderr)
      failed = True
      continue
    if stale and args.check:
      print(f"{document}: stale: {', '.join(stale)}; run python benchmarks/report.py", file=sys.stderr)
      failed = True
    elif stale:
      document.write_text(new)
      print(f"{document}: wrote {', '.join(stale)}")
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())
