"""Results as files: JSON that is replaced whole, runs that an interrupted comparison resumes from, the progress bar."""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import sys
from typing import Any, NoReturn

from tqdm import tqdm


def progress(total: int, unit: str, quiet: bool) -> tqdm:
  """The progress bar."""
  return tqdm(total=total, unit=unit, disable=quiet, dynamic_ncols=True)


def ticker(bar: tqdm) -> Callable[[str], None]:
  """A function that advances the bar by one and shows what is running."""

  def tick(what: str) -> None:
    bar.set_description(what)
    bar.update(1)

  return tick


def write(path: Path, values: Any) -> None:
  """Writes JSON to a temporary file and renames it: a reader sees the old file or the new one, never a part."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(values, indent=2) + "\n")
  partial.replace(path)


def publish(args: argparse.Namespace, name: str, results: Any, plot: Callable[[Any, Path], Any]) -> None:
  """Writes `name`.json and its plot into --out, and with --record also into the folder that tables are made from.

  Args:
    args: the options.
    name: of the files.
    results: the result as JSON.
    plot: `plot(results, path)` draws the figure at `path`.
  """
  record = getattr(args, "record", False)
  for folder in (args.out, args.recorded) if record else (args.out,):
    write(folder / f"{name}.json", results)
    plot(results, folder / f"{name}.png")
  if record:
    print(f"Recorded in {args.recorded}: python benchmarks/report.py makes the tables again.", file=sys.stderr)


class Runs:
  """Finished runs in one JSON file, by the digest of everything that decides their result.

  Attributes:
    found: results by digest.
  """

  def __init__(self, path: Path, fresh: bool):
    """Reads the file, unless `fresh`."""
    self.path = path
    self.found = {} if fresh or not path.exists() else json.loads(path.read_text())

  def result(self, key: str, run: Callable[[], dict[str, Any]], skip: Callable[[], Any]) -> dict[str, Any]:
    """The result kept under `key`, after `skip()`; else that of `run()`, which is added to the file."""
    if key in self.found:
      skip()
    else:
      self.found[key] = run()
      write(self.path, self.found)
    return self.found[key]


def say_interrupted(runs: Path) -> NoReturn:
  """Ends an interrupted comparison and says how to resume it."""
  print(
    f"Interrupted. Finished runs are kept in {runs}: the same command, without --fresh, goes on.",
    file=sys.stderr,
  )
  raise SystemExit(130)
