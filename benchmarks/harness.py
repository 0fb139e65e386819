"""What every benchmark shares: options, interleaved timing, provenance, tables, plots, JSON.

Times are compared within a round: all entries take their turn in each, so that a busy machine slows them alike, and the
ratio stays. The order rotates and turns round, so that nobody is always first, or always after the same neighbour. An
A/A control, one entry taken twice, shows how far two equal things lie apart on this machine.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
import platform
import statistics
import tempfile
import time
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure
import numpy as np
from tqdm import tqdm

import jaxlora

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("qwix", "peft", "torch")  # what the extra `peers` brings
CONTROL = " (again)"


# ----------------------------------------------------------------------------------------------------------------------
# Options.


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
  """A parser of comma lists: each value once, in order."""

  def parse(text: str) -> list[Any]:
    return sorted({kind(part) for part in text.split(",")})

  return parse


def folder(text: str) -> Path:
  """A directory, there already or to be made."""
  path = Path(text)
  if path.exists() and not path.is_dir():
    raise argparse.ArgumentTypeError(f"{text!r} is not a directory")
  return path


def check_writable(folder: Path, option: str) -> None:
  """Makes a directory; raises ValueError if it cannot be written to."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise ValueError(f"{option}: cannot write to {folder} ({error.strerror}); name another directory") from error


def make_parser(name: str, description: str | None, example: str, rounds: int = 15) -> argparse.ArgumentParser:
  """A parser with the options that every benchmark has."""
  parser = argparse.ArgumentParser(
    description=description,
    epilog=f"example: python benchmarks/{name}.py {example}".rstrip(),
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--rounds", type=positive(int), default=rounds, help="interleaved rounds of timing")
  parser.add_argument("--out", type=folder, default=RESULTS / name, help="where the results go")
  parser.add_argument("--quiet", action="store_true", help="no progress bar")
  return parser


def add_layers(parser: argparse.ArgumentParser) -> None:
  """The number of blocks, where there is one."""
  parser.add_argument("--layers", type=positive(int), default=6, help="transformer blocks")


def add_sizes(parser: argparse.ArgumentParser) -> None:
  """The other sizes of the language model, in any framework."""
  count = positive(int)
  parser.add_argument("--d", type=count, default=512, help="the model's width")
  parser.add_argument("--batch", type=count, default=8, help="sequences per step")
  parser.add_argument("--seq", type=count, default=128, help="tokens per sequence")
  parser.add_argument("--rank", type=count, default=8, help="LoRA's rank")
  parser.add_argument("--alpha", type=positive(float), default=16.0, help="LoRA's alpha")
  parser.add_argument("--vocabulary", type=count, default=4096, help="tokens that there are")
  parser.add_argument("--bf16", action="store_true", help="parameters and computation in bfloat16")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, **quick: Any) -> argparse.Namespace:
  """Adds `--quick`, which stands for smaller defaults, and parses: what is given explicitly wins over it."""
  small = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in quick.items())
  parser.add_argument("--quick", action="store_true", help=f"a first look, of no value as a result: {small}")
  if parser.parse_known_args(argv)[0].quick:
    parser.set_defaults(**quick)
  return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# Timing.


def with_control(runs: Mapping[str, Callable[[], Any]], name: str, again: Callable[[], Any]) -> dict[str, Any]:
  """The entries and the A/A control: `again` runs the very program of the entry `name`."""
  return {**runs, name + CONTROL: again}


def calls_per_turn(runs: Mapping[str, Callable[[], Any]], seconds: float = 0.05) -> int:
  """How often each entry is called in one turn, so that the fastest one's turn lasts long enough to be timed."""
  fastest = float("inf")
  for run in runs.values():
    jax.block_until_ready(run())
    begin = time.perf_counter()
    jax.block_until_ready(run())
    fastest = min(fastest, time.perf_counter() - begin)
  return max(1, int(np.ceil(seconds / fastest)))


def interleave(
  runs: Mapping[str, Callable[[], Any]], rounds: int, calls: int, tick: Callable[[int], Any]
) -> dict[str, list[float]]:
  """Seconds per call of every entry, round by round; `tick` hears of every call done, the warm-up's too."""
  names = list(runs)
  seconds: dict[str, list[float]] = {name: [] for name in names}
  for number in range(rounds + 1):
    order = np.roll(range(len(names)), number)
    for k in order[:: -1 if number % 2 else 1]:
      begin = time.perf_counter()
      for _ in range(calls):
        jax.block_until_ready(runs[names[k]]())
      elapsed = time.perf_counter() - begin
      tick(calls)
      if number:  # the first round warms up
        seconds[names[k]].append(elapsed / calls)
  return seconds


def summarize(values: Sequence[float]) -> dict[str, Any]:
  """Median, range and the rounds behind them."""
  return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def ratios(seconds: Mapping[str, Sequence[float]], over: str) -> dict[str, dict[str, Any]]:
  """Every entry's time over that of the entry `over` in the same round."""
  return {
    name: summarize([a / b for a, b in zip(values, seconds[over], strict=True)]) for name, values in seconds.items()
  }


# ----------------------------------------------------------------------------------------------------------------------
# Where a result comes from.


def cpu() -> dict[str, Any]:
  """The processor."""
  cpuinfo = Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return {"cpu": models[0] if models else platform.processor() or platform.machine(), "cores": os.cpu_count()}


def hardware() -> dict[str, Any]:
  """What it ran on."""
  return {**cpu(), "backend": jax.default_backend(), "device": jax.devices()[0].device_kind}


def installed(package: str) -> bool:
  """Whether a package can be imported; it is not imported for this."""
  return importlib.util.find_spec(package) is not None


def versions(*more: str) -> dict[str, str]:
  """What it ran with: the packages that everything needs, and those of `more` that are installed."""
  names = ("jax", "jaxlib", "flax", "optax", *(name for name in more if installed(name)))
  packages = {name: importlib.metadata.version(name) for name in names}
  return {"python": platform.python_version(), **packages, "jaxlora": jaxlora.__version__}


def settings(args: argparse.Namespace) -> dict[str, Any]:
  """The options as JSON."""
  return {field: str(value) if isinstance(value, Path) else value for field, value in vars(args).items()}


def provenance(args: argparse.Namespace) -> dict[str, Any]:
  """How every result of a claim begins."""
  return {"settings": settings(args), "versions": versions(*PEERS), "hardware": hardware()}


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def progress(total: int, unit: str, quiet: bool) -> tqdm:
  """The progress bar."""
  return tqdm(total=total, unit=unit, disable=quiet, dynamic_ncols=True)


def ticker(bar: tqdm) -> Callable[[str], None]:
  """A function that moves the bar by one and says what comes."""

  def tick(what: str) -> None:
    bar.set_description(what)
    bar.update(1)

  return tick


def write(path: Path, values: Any) -> None:
  """Writes JSON under another name first: a reader sees the old file or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(values, indent=2) + "\n")
  partial.replace(path)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Aligned columns under a rule."""
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  lines = [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
  ]
  return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def ratio_cell(ratio: Mapping[str, Any] | None) -> str:
  """A ratio as tables show it: median (min-max)."""
  return "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def exact_cell(value: float | None) -> str:
  """A compiled figure's ratio as tables show it."""
  return "-" if value is None else f"{value:.3f}"


def milliseconds(values: Mapping[str, Any]) -> str:
  """A time as tables show it."""
  return f"{1e3 * values['median']:,.2f} ms"


class Panel(NamedTuple):
  """A group of bars: what each entry took, and how far it should reach at most."""

  title: str
  label: str
  values: Mapping[str, Mapping[str, Any]]
  reach: float | None = None


def plot_bars(panels: Sequence[Panel], path: Path) -> None:
  """Medians as bars, minima and maxima as whiskers, one panel above the other."""
  height = 1.1 * len(panels) + 0.32 * sum(len(panel.values) for panel in panels)
  figure = Figure(figsize=(8.5, max(2.5, height)), layout="constrained")
  heights = [len(panel.values) + 2 for panel in panels]
  for axes, panel in zip(
    figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0], panels, strict=True
  ):
    names, values = list(panel.values), list(panel.values.values())
    medians = [value["median"] for value in values]
    whiskers = [[v["median"] - v["min"] for v in values], [v["max"] - v["median"] for v in values]]
    colors = ["tab:blue" if name.startswith("jaxlora") else "silver" for name in names]
    axes.barh(names, medians, xerr=whiskers, color=colors, ecolor="dimgray", capsize=3)
    for k, median in enumerate(medians):
      axes.annotate(f" {median:.2f}", (0, k), va="center", fontsize=8)
    if panel.reach is not None:
      axes.axvline(panel.reach, color="tab:green", linestyle="--", linewidth=1, label=f"to reach: {panel.reach}")
      axes.legend(frameon=False, fontsize=8)
    axes.set(title=panel.title, xlabel=panel.label)
    axes.invert_yaxis()
    axes.margins(y=0.02)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
