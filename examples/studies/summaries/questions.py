"""The comparisons: learning rates, LoRA against full fine-tuning, placements, ranks, step times.

Every run is kept in a file of its own when it is done, so that an interrupted comparison goes on.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import json
from pathlib import Path
import statistics
from typing import Any

import numpy as np

from studies import harness

from . import decoder, decoding, docstrings, pretraining, scores, steps, tokens, tuning
from .figures import figures, mean_loss, vertex
from .tokens import Data
from .tuning import FULL, PLACEMENTS, Method, Program, Run

STEPS_PER_ROUND = 3  # timed in a row before the next method has its turn
FIRST_SWEEP_SEED = 1000  # seeds from here on choose the rates; no result is reported from them
SOURCES = (decoder, decoding, docstrings, pretraining, scores, steps, tokens, tuning)  # they decide a run


class Bench:
  """The base, the data and the compiled steps; makes runs, or reads those that are finished."""

  def __init__(self, args: argparse.Namespace, data: Data, tick: Callable[[int], Any]):
    self.args, self.data, self.tick = args, data, tick
    self.model = make_model(args)
    cache = None if args.no_cache else args.cache
    self.base, name = pretraining.pretrain(
      self.model, data, args.pretrain_steps, args.pretrain_batch, args.pretrain_rate, cache, tick
    )
    self.decisive = {
      "pretrained": name,
      "data": data.report["digest"],
      "source": harness.source_digest(*(Path(module.__file__) for module in SOURCES)),
    }
    self.decisive |= {"versions": versions(), "steps": args.steps, "batch_size": args.batch_size}
    self.programs: dict[Method, Program] = {}

  def program(self, method: Method) -> Program:
    """A method's compiled step."""
    if method not in self.programs:
      batch = next(tuning.batches(self.data.train, self.args.batch_size, 1, seed=0))
      self.programs[method] = tuning.compile_step(self.model, method, self.base, batch)
    return self.programs[method]

  def kept(self, what: Any, make: Callable[[], dict[str, Any]], steps: int) -> dict[str, Any]:
    """The result of `make()`, from its file if there is one; `steps` are then counted as done."""
    path = self.args.out / "runs" / f"{harness.digest([self.decisive, what])}.json"
    if path.exists() and not self.args.fresh:
      self.tick(steps)
      return json.loads(path.read_text())
    result = make()
    harness.write(path, result)
    return json.loads(path.read_text())

  def run(self, one: Run) -> dict[str, Any]:
    """One training."""

    def make() -> dict[str, Any]:
      program, args = self.program(one.method), self.args
      return tuning.run(one, program, self.model, self.data, self.base, args.steps, args.batch_size, self.tick)

    return self.kept(one, make, self.args.steps)


def make_model(args: argparse.Namespace) -> decoder.Decoder:
  """The model by the options."""
  return decoder.Decoder(args.vocabulary, args.width, args.depth, args.heads)


def versions() -> dict[str, str]:
  """Versions that decide the results, beside those in the data."""
  return harness.versions("tokenizers", "rouge_score", "numpy")


def as_row(bench: Bench, method: Method, lr: float, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """A method's row: figures over seeds, sizes, and the runs themselves."""
  program = bench.program(method)
  return {
    "method": method.name(),
    **method._asdict(),
    "learning_rate": lr,
    "figures": figures(runs),
    "trainable_parameters": program.trainable,
    "optimizer_bytes": program.optimizer_bytes,
    "file_bytes": runs[0]["file_bytes"],
    "temp_bytes": program.temp_bytes,
    "flops_per_step": program.flops,
    "seeds": runs,
  }


def sweep_curve(bench: Bench, method: Method, rates: Sequence[float]) -> dict[str, Any]:
  """The validation loss of a method by its peak rate."""
  points = []
  for lr in rates:
    runs = [bench.run(Run(method, lr, FIRST_SWEEP_SEED + k)) for k in range(bench.args.sweep_seeds)]
    points.append({"learning_rate": lr, "figures": figures(runs), "seeds": runs})
  losses = [mean_loss(point) for point in points]
  best = int(np.argmin(losses))
  return {
    "method": method.name(),
    **method._asdict(),
    "points": points,
    "best": rates[best],
    "best_at_an_end": best in (0, len(rates) - 1),
    "vertex": vertex(rates, losses),
  }


def choose(curves: Sequence[Mapping[str, Any]]) -> float:
  """The rate with the least mean validation loss over all curves: one rate for all ranks."""
  rates = [point["learning_rate"] for point in curves[0]["points"]]
  losses = [statistics.fmean(mean_loss(curve["points"][k]) for curve in curves) for k in range(len(rates))]
  return rates[int(np.argmin(losses))]


def compare_rates(bench: Bench) -> dict[str, Any]:
  """The sweeps over learning rates, and the rates that all other comparisons use."""
  args = bench.args
  loras = [sweep_curve(bench, Method(rank), args.rates_lora) for rank in args.sweep_ranks]
  full = sweep_curve(bench, FULL, args.rates_full)
  return {"lora": loras, "full": full, "chosen": {"lora": choose(loras), "full": choose([full])}}


def compare(bench: Bench, methods: Iterable[Method], rates: Mapping[str, float], seeds: int) -> list[dict[str, Any]]:
  """Rows of these methods; those of the main table are also decoded by beam search."""
  rows = []
  for method in methods:
    lr = rates["full" if method.rank is None else "lora"]
    widths = (1, bench.args.beam) if method in main_methods(bench.args) else (1,)
    runs = [bench.run(Run(method, lr, seed, widths)) for seed in range(seeds)]
    rows.append(as_row(bench, method, lr, runs))
  return rows


def main_methods(args: argparse.Namespace) -> list[Method]:
  """LoRA as the main table has it, and full fine-tuning."""
  return [Method(args.rank), FULL]


def placement_methods(args: argparse.Namespace) -> list[Method]:
  """Placements with equal parameters: attention and MLP alone have twice the rank of both together."""
  return [Method(args.rank if name == "all-linear" else 2 * args.rank, name) for name in PLACEMENTS]


def all_methods(args: argparse.Namespace) -> list[Method]:
  """Every method once."""
  ranks = [Method(rank) for rank in (*args.ranks, *args.sweep_ranks)]
  return list(dict.fromkeys([*main_methods(args), *placement_methods(args), *ranks]))


def time_steps(bench: Bench, tick: Callable[[int], Any]) -> dict[str, Any]:
  """Step times of all methods over full fine-tuning's, and an A/A control."""
  batch = next(tuning.batches(bench.data.train, bench.args.batch_size, 1, seed=0))
  runs = {}
  for method in all_methods(bench.args):
    frozen, trainable = tuning.split(bench.model, method, bench.base, seed=0)
    adam, step = steps.init_adam(trainable), bench.program(method).step
    runs[method.name()] = functools.partial(step, trainable, adam, frozen, batch, np.float32(0))
  full = FULL.name()
  seconds = harness.interleave(harness.with_control(runs, full, runs[full]), bench.args.rounds, STEPS_PER_ROUND, tick)
  return {
    "over_full": harness.ratios(seconds, full),
    "seconds": {name: harness.summarize(values) for name, values in seconds.items()},
  }
