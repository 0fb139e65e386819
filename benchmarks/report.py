"""Makes every measured table of the READMEs from the recorded results: no number is typed by hand.

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of `TABLES`. With --check
nothing is written, and a table that differs from its result is an error.
"""

import argparse
from collections.abc import Sequence
import importlib
import json
from pathlib import Path
import re
import sys
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = tuple(
  ROOT / name for name in ("README.md", "docs/numbers.md", "benchmarks/README.md", "examples/README.md")
)
_TABLE = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


class Table(NamedTuple):
  """One table.

  Attributes:
    script: the script that records the result, relative to the checkout.
    json: the recorded file, in the folder `results` beside the script.
    function: `module:function`, which makes the table from the result; the module is imported from the script's folder.
    beside: files of other results that the table shows as well, beside the first.
  """

  script: str
  json: str
  function: str
  beside: tuple[str, ...] = ()

  def recorded(self, results: Path | None = None) -> Path:
    """The path of the recorded file, in its own folder or in `results`."""
    return self._within(results) / self.json

  def all_recorded(self, results: Path | None = None) -> list[Path]:
    """The paths of all files that the table is made of."""
    return [self._within(results) / name for name in (self.json, *self.beside)]

  def _within(self, results: Path | None) -> Path:
    return results or (ROOT / self.script).with_name("results")


def _benchmark(name: str, function: str = "tables", folder: str | None = None) -> Table:
  return Table(f"benchmarks/{name}.py", f"{folder or name}/{name}.json", f"{name}:{function}")


def _study(name: str, function: str, folder: str | None = None) -> Table:
  return Table(f"examples/{name}.py", f"{folder or name}/{name}.json", f"studies.{function}")


TABLES = {
  "finetune": _study("finetune", "finetuning:tables"),
  "finetune_conv": _study("finetune", "finetuning:tables", "finetune_conv"),
  "finetune_brief": _study("finetune", "finetuning:brief"),
  "sentence_encoder": _study("sentence_encoder", "sentences.results:tables"),
  "summarize": _study("summarize", "summaries.tables:tables"),
  "dpo": _study("dpo", "preferences.tables:tables"),
  **{
    f"llm_{name}": Table("examples/llm/sweep.py", "sweep.json", f"lm.recorded:{name}")
    for name in ("brief", "methods", "quantised", "ranks", "rates", "scaling")
  },
  "train_step": _benchmark("train_step"),
  "door": Table(
    "benchmarks/train_step.py",
    "train_step/train_step.json",
    "train_step:door",
    beside=("compiled_v5e/compiled.json", "compiled_h100/compiled.json"),
  ),
  "train_step_brief": _benchmark("train_step", "brief"),
  "train_step_suite": _benchmark("train_step", "suite_table", "train_step_suite"),
  "train_step_suite_brief": _benchmark("train_step", "brief_suite", "train_step_suite"),
  "forward": _benchmark("forward"),
  "memory": _benchmark("memory"),
  "head_loss": _benchmark("head_loss"),
  "variants": _benchmark("variants"),
  "serving": _benchmark("serving"),
  "compile_time": _benchmark("compile_time"),
  "compile_time_llama": _benchmark("compile_time", folder="compile_time_llama"),
  "compiled_suite": _benchmark("compiled_suite"),
  "seven_billion": _benchmark("seven_billion"),
  "meshes": _benchmark("meshes"),
  "scaling": _benchmark("scaling"),
  "quantized": _benchmark("quantized"),
  **{
    name: _benchmark("quantized", folder=name)
    for name in ("quantized_scanned_remat", "quantized_v5e_scanned", "quantized_v5e_scanned_remat")
  },
  "quantized_torch": _benchmark("quantized_torch"),
  "decoding": _benchmark("decoding"),
  "decoding_v5e": _benchmark("decoding", folder="decoding_v5e"),
  "experts": _benchmark("experts"),
  **{name: _benchmark("experts", folder=name) for name in ("experts_v5e_8", "experts_v5e_64")},
  **{
    name: _benchmark("compiled", folder=name)
    for chip in ("v5e", "v5p", "v6e", "h100")
    for name in (f"compiled_{chip}", f"compiled_fits_{chip}", f"compiled_llama_{chip}")
  },
  **{
    f"compiled_forward_{chip}": _benchmark("compiled_forward", folder=f"compiled_forward_{chip}")
    for chip in ("v5e", "v5p", "v6e", "h100")
  },
}


class ReportError(Exception):
  """A table cannot be made; says why, and what to do."""


def make(name: str, results: Path | None = None) -> str:
  """A table in Markdown.

  Args:
    name: one of `TABLES`.
    results: the folder with recorded results; None takes `results` beside each script.

  Raises:
    ReportError: if there is no such table, or it has no result or no script.
  """
  if name not in TABLES:
    raise ReportError(f"there is no table {name!r}; there are: {', '.join(TABLES)}")
  table = TABLES[name]
  paths, script = table.all_recorded(results), ROOT / table.script
  if not script.exists():
    raise ReportError(f"table {name!r} has no script {table.script}")
  if missing := [path for path in paths if not path.exists()]:
    raise ReportError(f"table {name!r} has no results at {missing[0]}: run {table.script} --record")
  if str(script.parent) not in sys.path:
    sys.path.insert(0, str(script.parent))
  module, function = table.function.split(":")
  return getattr(importlib.import_module(module), function)(*(json.loads(path.read_text()) for path in paths)).strip(
    "\n"
  )


def rebuild(text: str, results: Path | None = None) -> tuple[str, list[str]]:
  """A document with its tables made again, and the names of the tables that have changed.

  Raises:
    ReportError: if a table cannot be made, or one of its comments is missing.
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
  parser = argparse.ArgumentParser(
    description=__doc__,
    epilog="example: python benchmarks/report.py --check",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is stale")
  parser.add_argument("--results", type=Path, help="take results from this folder, not from those beside the scripts")
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
