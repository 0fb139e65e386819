"""Summarises docstrings by LoRA and by full fine-tuning: ROUGE, ranks, placements, learning rates, forgetting.

A small decoder is pretrained on the bodies of docstrings and on the language reference, and adapted to write the
summary line of a docstring from its body. Packages are whole in one split: those tested on have not been read.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import json
from pathlib import Path
import statistics
import sys
from typing import Any

import decoder
from digits import digest
import docstrings
from docstrings import Data
import harness
import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
from scipy import stats
import tuning
from tuning import FULL, PLACEMENTS, Method, Program, Run

HERE = Path(__file__).resolve().parent
STEPS_PER_ROUND = 3  # timed in a row before the next method has its turn
FIRST_SWEEP_SEED = 1000  # rates are chosen with seeds that nothing is reported from
SCORES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
LOSSES = ("validation_loss", "pretraining_loss", "pretraining_loss_removed", "train_loss")


# ----------------------------------------------------------------------------------------------------------------------
# Runs: each is kept in a file of its own as soon as it is done, so that an interrupted comparison goes on.


class Bench:
  """The base, the data and the compiled steps, from which runs are made or picked up."""

  def __init__(self, args: argparse.Namespace, data: Data, tick: Callable[[int], Any]):
    self.args, self.data, self.tick = args, data, tick
    self.model = make_model(args)
    cache = None if args.no_cache else args.cache
    self.base, name = tuning.pretrain(
      self.model, data, args.pretrain_steps, args.pretrain_batch, args.pretrain_rate, cache, tick
    )
    self.decisive = {"pretrained": name, "data": data.report["digest"], "source": tuning.source_digest()}
    self.decisive |= {"versions": versions(), "steps": args.steps, "batch_size": args.batch_size}
    self.programs: dict[Method, Program] = {}

  def program(self, method: Method) -> Program:
    """A method's compiled step."""
    if method not in self.programs:
      batch = next(tuning.batches(self.data.train, self.args.batch_size, 1, seed=0))
      self.programs[method] = tuning.compile_step(self.model, method, self.base, batch)
    return self.programs[method]

  def kept(self, what: Any, make: Callable[[], dict[str, Any]], steps: int) -> dict[str, Any]:
    """The result of `make`, from its file where there is one."""
    path = self.args.out / "runs" / f"{digest([self.decisive, what])}.json"
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
  """The model of the options."""
  return decoder.Decoder(args.vocabulary, args.width, args.depth, args.heads)


def versions() -> dict[str, str]:
  """What decides the results, beside the data."""
  return harness.versions("tokenizers", "rouge_score", "numpy")


# ----------------------------------------------------------------------------------------------------------------------
# Numbers from seeds.


def interval(values: Sequence[float | None]) -> dict[str, Any] | None:
  """Mean and half the 95 % t-interval over seeds; None if a seed has no figure, no half where there is one seed."""
  known = [value for value in values if value is not None]
  if not known or len(known) < len(values):
    return None
  half = None
  if len(known) > 1:
    half = float(stats.t.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / len(known) ** 0.5
  return {"mean": statistics.fmean(known), "half": half, "count": len(known)}


def figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The intervals of all figures that these runs have."""
  names = dict.fromkeys(name for run in runs for name in run if name.startswith("rouge") or name in LOSSES)
  return {name: interval([run.get(name) for run in runs]) for name in names}


def as_row(bench: Bench, method: Method, lr: float, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """One row of a table, with the seeds behind it."""
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


def differences(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
  """Intervals of `row` minus `other`, seed by seed: both had the same batches."""
  pairs = list(zip(row["seeds"], other["seeds"], strict=True))
  names = [name for name in row["figures"] if name in other["figures"]]
  return {name: interval([a[name] - b[name] for a, b in pairs]) for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# The four questions.


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


def mean_loss(point: Mapping[str, Any]) -> float:
  """The mean validation loss; infinite where a seed diverged."""
  figure = point["figures"]["validation_loss"]
  return float("inf") if figure is None else figure["mean"]


def vertex(rates: Sequence[float], losses: Sequence[float]) -> float | None:
  """Where the parabola through the best point and its neighbours is least, over the logarithm of the rate."""
  k = int(np.argmin(losses))
  if not 0 < k < len(rates) - 1 or not np.isfinite(losses[k - 1 : k + 2]).all():
    return None
  curve = np.polyfit(np.log(rates[k - 1 : k + 2]), losses[k - 1 : k + 2], 2)
  return float(np.exp(-curve[1] / (2 * curve[0])))


def choose(curves: Sequence[Mapping[str, Any]]) -> float:
  """The rate with the least validation loss over all curves: one for every rank."""
  rates = [point["learning_rate"] for point in curves[0]["points"]]
  losses = [statistics.fmean(mean_loss(curve["points"][k]) for curve in curves) for k in range(len(rates))]
  return rates[int(np.argmin(losses))]


def compare_rates(bench: Bench) -> dict[str, Any]:
  """The U-curves, and the rates that everything else is run with."""
  args = bench.args
  loras = [sweep_curve(bench, Method(rank), args.rates_lora) for rank in args.sweep_ranks]
  full = sweep_curve(bench, FULL, args.rates_full)
  return {"lora": loras, "full": full, "chosen": {"lora": choose(loras), "full": choose([full])}}


def compare(bench: Bench, methods: Iterable[Method], rates: Mapping[str, float], seeds: int) -> list[dict[str, Any]]:
  """Rows for methods; all figures, with a beam where the seeds are those of the main table."""
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
  """At equal parameters: attention and MLP have half of what both have at the same rank."""
  return [Method(args.rank if name == "all-linear" else 2 * args.rank, name) for name in PLACEMENTS]


def all_methods(args: argparse.Namespace) -> list[Method]:
  """Every method once."""
  ranks = [Method(rank) for rank in (*args.ranks, *args.sweep_ranks)]
  return list(dict.fromkeys([*main_methods(args), *placement_methods(args), *ranks]))


def time_steps(bench: Bench, tick: Callable[[int], Any]) -> dict[str, Any]:
  """Step times over full fine-tuning's, all methods in turns, and an A/A control."""
  batch = next(tuning.batches(bench.data.train, bench.args.batch_size, 1, seed=0))
  runs = {}
  for method in all_methods(bench.args):
    frozen, trainable = tuning.split(bench.model, method, bench.base, seed=0)
    adam, step = tuning.init_adam(trainable), bench.program(method).step
    runs[method.name()] = functools.partial(step, trainable, adam, frozen, batch, np.float32(0))
  full = FULL.name()
  seconds = harness.interleave(harness.with_control(runs, full, runs[full]), bench.args.rounds, STEPS_PER_ROUND, tick)
  return {
    "over_full": harness.ratios(seconds, full),
    "seconds": {name: harness.summarize(values) for name, values in seconds.items()},
  }


# ----------------------------------------------------------------------------------------------------------------------
# Tables, all from the results alone.


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table in Markdown."""
  return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def cell(figure: Mapping[str, Any] | None, digits: int, sign: str = "") -> str:
  """A mean and half its interval."""
  if figure is None:
    return "-"
  mean = f"{figure['mean']:{sign}.{digits}f}"
  return mean if figure["half"] is None else f"{mean} ± {figure['half']:.{digits}f}"


def exact(scores: Mapping[str, float]) -> dict[str, dict[str, Any]]:
  """What has no seeds as figures."""
  return {name: {"mean": value, "half": None} for name, value in scores.items() if isinstance(value, float)}


def plain(method: Mapping[str, Any]) -> str:
  """A row's name where the placement goes without saying."""
  return method["method"].removesuffix(", all-linear")


def main_table(results: Mapping[str, Any]) -> str:
  """ROUGE and what it takes: base, LoRA, full fine-tuning."""
  beam = results["settings"]["beam"]
  head = ("method", *SCORES.values(), f"ROUGE-L, beam {beam}", "validation loss", "trained", "Adam's moments", "file")
  head += ("step / full", "GFLOPs a step", "temp memory")
  rows = [
    (
      name,
      *(cell(scores.get(field), 1) for field in (*SCORES, "rougeL_beam")),
      cell(scores.get(LOSSES[0]), 3),
      *["-"] * 6,
    )
    for name, scores in (
      ("the body's first words", exact(results["lead"])),
      ("base, not adapted", exact(results["base"])),
    )
  ]
  for row in results["main"]:
    share = row["trainable_parameters"] / results["pretrained"]["parameters"]
    rows.append(
      (
        plain(row),
        *(cell(row["figures"][field], 1) for field in (*SCORES, "rougeL_beam")),
        cell(row["figures"]["validation_loss"], 3),
        f"{row['trainable_parameters']:,} ({100 * share:.1f} %)",
        *(f"{row[field] / 1024:,.0f} KiB" for field in ("optimizer_bytes", "file_bytes")),
        harness.ratio_cell(results["timing"]["over_full"][row["method"]]),
        f"{row['flops_per_step'] / 1e9:.2f}",
        f"{row['temp_bytes'] / 1e6:.1f} MB",
      )
    )
  difference = results["difference"]
  fields = (*SCORES, "rougeL_beam")
  cells = (*(cell(difference[field], 1, "+") for field in fields), cell(difference["validation_loss"], 3, "+"))
  return markdown(head, [*rows, ("LoRA - full, seed by seed", *cells, *["-"] * 6)])


def rank_table(results: Mapping[str, Any]) -> str:
  """Quality and size by rank."""
  head = ("rank", "seeds", "trained", "ROUGE-L", "validation loss", "pretraining text", "file", "step / full")
  full = results["main"][-1]
  rows = [
    (
      "full fine-tuning" if row["rank"] is None else str(row["rank"]),
      str(len(row["seeds"])),
      f"{row['trainable_parameters']:,}",
      cell(row["figures"]["rougeL"], 1),
      cell(row["figures"]["validation_loss"], 3),
      cell(row["figures"]["pretraining_loss"], 3),
      f"{row['file_bytes'] / 1024:,.0f} KiB",
      harness.ratio_cell(results["timing"]["over_full"][row["method"]]),
    )
    for row in (*results["ranks"], full)
  ]
  return markdown(head, rows)


def placement_table(results: Mapping[str, Any]) -> str:
  """Where A and B are, at equal parameters."""
  head = ("adapted", "rank", "trained", "ROUGE-L", "validation loss", "pretraining text", "step / full")
  rows = [
    (
      row["placement"],
      str(row["rank"]),
      f"{row['trainable_parameters']:,}",
      cell(row["figures"]["rougeL"], 1),
      cell(row["figures"]["validation_loss"], 3),
      cell(row["figures"]["pretraining_loss"], 3),
      harness.ratio_cell(results["timing"]["over_full"][row["method"]]),
    )
    for row in results["placements"]
  ]
  return markdown(head, rows)


def rate_table(results: Mapping[str, Any]) -> str:
  """The validation loss by peak learning rate."""
  curves = [*results["rates"]["lora"], results["rates"]["full"]]
  rates = sorted({point["learning_rate"] for curve in curves for point in curve["points"]})
  rows = []
  for curve in curves:
    points = {point["learning_rate"]: point for point in curve["points"]}
    losses = [
      ""
      if rate not in points
      else "diverged"
      if mean_loss(points[rate]) == float("inf")
      else f"{mean_loss(points[rate]):.3f}"
      for rate in rates
    ]
    least = "-" if curve["vertex"] is None else f"{curve['vertex']:.2g}"
    rows.append((plain(curve), *losses, f"{curve['best']:.2g}{' (an end)' if curve['best_at_an_end'] else ''}", least))
  return markdown(("method", *(f"{rate:.2g}" for rate in rates), "best", "parabola's least"), rows)


def forgetting_table(results: Mapping[str, Any]) -> str:
  """The loss on held-out pretraining text, before and after."""
  base = results["base"]["pretraining_loss"]
  rows = [("base, not adapted", f"{base:.3f}", "-", "-", "-")]
  for row in results["main"]:
    after, removed = row["figures"]["pretraining_loss"], row["figures"].get("pretraining_loss_removed")
    rise = {**after, "mean": after["mean"] - base}
    rows.append((plain(row), cell(after, 3), cell(rise, 3, "+"), cell(removed, 3), cell(row["figures"]["rougeL"], 1)))
  return markdown(("method", "loss after", "rise", "adapter removed", "ROUGE-L"), rows)


def tables(results: Mapping[str, Any]) -> str:
  """All tables of a result, in Markdown; nothing but the result is read."""
  data, settings = results["data"], results["settings"]
  counts = data["used"]
  seeds, versions, hardware = settings["seeds"], results["versions"], results["hardware"]
  rates = results["rates"]["chosen"]
  of = {
    split: ", ".join(
      f"{name} {one['version']}" for name, one in data["packages"].items() if one["split"] == split and one["pairs"]
    )
    for split in ("validation", "test")
  }
  trained_on = sum(one["split"] == "train" and one["pairs"] > 0 for one in data["packages"].values())
  how = (
    f"{results['pretrained']['parameters']:,} parameters, pretrained for {settings['pretrain_steps']:,} steps of"
    f" {settings['pretrain_batch']} x {docstrings.WINDOW} tokens; adapted for {settings['steps']} steps of"
    f" {settings['batch_size']} pairs. {counts['train']:,} training pairs from {trained_on} packages (the standard"
    f" library among them); {counts['validation']} validation pairs from {of['validation']};"
    f" {counts['test']} test pairs from"
    f" {of['test']}. Data {data['digest']}; other versions give others. Python {versions['python']}, jax"
    f" {versions['jax']}, flax {versions['flax']}, tokenizers {versions['tokenizers']}, rouge-score"
    f" {versions['rouge_score']}; {hardware['cpu']}, {hardware['cores']} cores."
  )
  what = (
    f"Mean ± half of the 95 % t-interval over {seeds} seeds (factors and order of batches). The base, the data and the"
    " split are the same in all of them: the interval does not cover another pretraining or other test texts. ROUGE is"
    " F1 in percent, with stemming; a summary is one line, so that Lsum is L. Decoding is greedy unless it says beam."
    f" Peak rates, chosen on the validation loss with other seeds: LoRA {rates['lora']:.2g}, full {rates['full']:.2g}."
    f" step / full: median (min-max) of {settings['rounds']} interleaved rounds; the A/A control is"
    f" {harness.ratio_cell(results['timing']['over_full'][FULL.name() + harness.CONTROL])}."
  )
  sections = [
    ("Summaries", f"{how}\n\n{what}", main_table(results)),
    ("Rank", "LoRA on every attention and MLP kernel, alpha 32 for all ranks, one learning rate.", rank_table(results)),
    ("Placement", f"Equal parameters, {seeds} seeds.", placement_table(results)),
    (
      "Learning rate",
      f"Validation loss by peak rate, mean over {settings['sweep_seeds']} seed(s). {rate_findings(results)}",
      rate_table(results),
    ),
    (
      "Forgetting",
      "Nats per token on held-out pretraining text (bodies and the language reference).",
      forgetting_table(results),
    ),
  ]
  parts = [f"#### {title}\n\n{text}\n\n{table}" for title, text, table in sections]
  return "\n\n".join([*parts, f"#### What came out\n\n{findings(results)}"])


def rate_findings(results: Mapping[str, Any]) -> str:
  """The ratio of the best rates, where the curves have a least point inside."""
  full, loras = results["rates"]["full"], results["rates"]["lora"]
  least = {curve["rank"]: curve["vertex"] for curve in (*loras, full)}
  if None in least.values():
    return "Not every curve has its least point inside: no ratio of rates."
  ratios = ", ".join(f"{least[curve['rank']] / full['vertex']:.1f} at rank {curve['rank']}" for curve in loras)
  across = max(least[curve["rank"]] for curve in loras) / min(least[curve["rank"]] for curve in loras)
  return f"LoRA's best rate over full's, by the parabolas: {ratios}; between the ranks it moves {across:.2f}-fold."


def gained(results: Mapping[str, Any], field: str) -> str:
  """How much of full fine-tuning's gain over the base LoRA has."""
  base = results["base"][field]
  lora, full = (row["figures"][field]["mean"] for row in results["main"])
  return "no share" if full == base else f"{100 * (lora - base) / (full - base):.0f} %"


def apart(figure: Mapping[str, Any]) -> str:
  """Whether an interval of differences excludes zero."""
  if figure["half"] is None:
    return "one seed, no interval"
  return "apart" if abs(figure["mean"]) > figure["half"] else "the interval holds zero"


def findings(results: Mapping[str, Any]) -> str:
  """What the tables say, in sentences with the numbers of this result."""
  score, loss = (results["difference"][field] for field in ("rougeL", "validation_loss"))
  lines = [
    f"LoRA has {gained(results, 'rougeL')} of full fine-tuning's gain over the base in ROUGE-L and"
    f" {gained(results, 'validation_loss')} in validation loss.",
    f"LoRA - full: ROUGE-L {cell(score, 1, '+')} ({apart(score)}),"
    f" validation loss {cell(loss, 3, '+')} ({apart(loss)}).",
    f"The body's first words, without any model, have ROUGE-L {results['lead']['rougeL']:.1f}.",
  ]
  losses = {row["rank"]: row["figures"]["validation_loss"] for row in results["ranks"]}
  if all(losses.values()):
    best = min(losses, key=lambda rank: losses[rank]["mean"])
    ends = " to ".join(f"{losses[rank]['mean']:.3f} at rank {rank}" for rank in (min(losses), max(losses)))
    lines.append(f"Validation loss from the least rank to the largest: {ends}; it is lowest at rank {best}.")
  lora, full = (row["figures"]["pretraining_loss"]["mean"] for row in results["main"])
  base = results["base"]["pretraining_loss"]
  removed = {run["pretraining_loss_removed"] for run in results["main"][0]["seeds"]}
  off = "exactly the base's" if removed == {base} else f"{min(removed):.3f} to {max(removed):.3f}"
  lines.append(
    f"On the pretraining text the loss rises by {lora - base:.3f} with LoRA and by {full - base:.3f} with full"
    f" fine-tuning; with the adapter taken off it is {off}."
  )
  better = frugal_rates(results)
  if better:
    lora_rate = results["rates"]["chosen"]["lora"]
    lines.append(
      f"But that is a matter of the rate: in the sweep, full fine-tuning at {' and at '.join(better)} is ahead of LoRA"
      f" at {lora_rate:.2g} in both, the loss on summaries and the loss on the pretraining text."
    )
  return "\n".join(f"- {line}" for line in lines)


def frugal_rates(results: Mapping[str, Any]) -> list[str]:
  """Rates at which full fine-tuning both learns more and forgets less than LoRA at its best, on the sweep's seeds."""
  loras = results["rates"]["lora"]
  curve = next((curve for curve in loras if curve["rank"] == results["settings"]["rank"]), loras[0])
  rate = results["rates"]["chosen"]["lora"]
  (lora,) = (point for point in curve["points"] if point["learning_rate"] == rate)

  def ahead(point: Mapping[str, Any]) -> bool:
    pairs = [(point["figures"][field], lora["figures"][field]) for field in ("validation_loss", "pretraining_loss")]
    return all(a and b and a["mean"] < b["mean"] for a, b in pairs)

  return [f"{point['learning_rate']:.2g}" for point in results["rates"]["full"]["points"] if ahead(point)]


# ----------------------------------------------------------------------------------------------------------------------
# Plots.


def whisker(axes: Axes, x: float, figure: Mapping[str, Any], **style: Any) -> None:
  """A point with its interval."""
  axes.errorbar(x, figure["mean"], figure["half"] or 0, capsize=4, markersize=7, linewidth=1, zorder=3, **style)


def plot_rouge(axes: Axes, results: Mapping[str, Any]) -> None:
  """ROUGE of base, LoRA and full fine-tuning as bars."""
  groups = [("the body's first words", "silver", exact(results["lead"])), ("base", "gray", exact(results["base"]))]
  colors = ("tab:blue", "tab:red")
  groups += [(plain(row), color, row["figures"]) for row, color in zip(results["main"], colors, strict=True)]
  for k, (label, color, scores) in enumerate(groups):
    x = np.arange(len(SCORES)) + (k - 1.5) * 0.2
    halves = [scores[field]["half"] for field in SCORES]
    whiskers = None if None in halves else halves
    axes.bar(x, [scores[field]["mean"] for field in SCORES], 0.2, yerr=whiskers, label=label, color=color, capsize=3)
  axes.set_xticks(range(len(SCORES)), list(SCORES.values()))
  axes.set(ylabel="F1 (%)", title=f"Unseen packages, {results['settings']['seeds']} seeds, 95 % intervals")
  axes.figure.legend(loc="outside lower center", ncols=4, frameon=False)


def plot_ranks(axes: Axes, results: Mapping[str, Any], field: str = "rougeL", label: str = "ROUGE-L (%)") -> None:
  """Quality over what trains: ranks, placements, full fine-tuning."""
  rows = results["ranks"]
  axes.plot(
    [row["trainable_parameters"] for row in rows],
    [row["figures"][field]["mean"] for row in rows],
    color="tab:blue",
    linewidth=1,
  )
  for k, row in enumerate(rows):
    style = {"color": "tab:blue", "marker": "o", "label": None if k else "LoRA, all-linear"}
    whisker(axes, row["trainable_parameters"], row["figures"][field], **style)
    axes.annotate(
      f"r={row['rank']}",
      (row["trainable_parameters"], row["figures"][field]["mean"]),
      (6, -12),
      textcoords="offset points",
      fontsize=8,
    )
  for row, (color, marker, shift) in zip(
    results["placements"][1:], (("tab:green", "^", 0.93), ("tab:orange", "v", 1.07)), strict=True
  ):
    style = {"color": color, "marker": marker, "label": f"LoRA, {row['placement']} (r={row['rank']})"}
    whisker(axes, row["trainable_parameters"] * shift, row["figures"][field], **style)
  full = results["main"][-1]
  whisker(axes, full["trainable_parameters"], full["figures"][field], color="tab:red", marker="D", label="full")
  axes.set(xscale="log", xlabel="trainable parameters", ylabel=label)
  axes.grid(alpha=0.3)


def plot_rates(axes: Axes, results: Mapping[str, Any]) -> None:
  """The U-curves."""
  curves = [*results["rates"]["lora"], results["rates"]["full"]]
  shades = [*np.linspace(0.45, 0.95, len(curves) - 1)]
  for k, curve in enumerate(curves):
    lora = curve["rank"] is not None
    losses = [mean_loss(point) for point in curve["points"]]
    axes.plot(
      [point["learning_rate"] for point in curve["points"]],
      losses,
      marker="o" if lora else "D",
      color=(0.1, 0.35, 0.75, shades[k]) if lora else "tab:red",
      label=plain(curve),
    )
  base = results["base"]["validation_loss"]
  axes.axhline(base, color="black", linestyle=":", linewidth=1, label="base")
  lowest = min(mean_loss(point) for curve in curves for point in curve["points"])
  axes.set_ylim(
    min(lowest, base) - 0.1 * abs(base - lowest), base + 0.5 * abs(base - lowest)
  )  # diverging ends leave it
  axes.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss")
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)


def plot_forgetting(axes: Axes, results: Mapping[str, Any]) -> None:
  """What is lost on the pretraining text for what is gained on the summaries, by rate and by method."""
  fields, base = ("validation_loss", "pretraining_loss"), results["base"]
  curves = results["rates"]
  swept = next((curve for curve in curves["lora"] if curve["rank"] == results["settings"]["rank"]), curves["lora"][0])
  for curve, color in ((swept, "tab:blue"), (curves["full"], "tab:red")):
    points = [point for point in curve["points"] if all(point["figures"][field] for field in fields)]
    places = np.array([[point["figures"][field]["mean"] for field in fields] for point in points]).reshape(-1, 2)
    axes.plot(*places.T, ".--", color=color, linewidth=1, label=f"{plain(curve)}, by rate")
    for point, place in zip(points, places, strict=True):
      if place[0] < base["validation_loss"]:
        offset = (4, -10) if curve is swept else (-6, 6)
        label = f"{point['learning_rate']:.0e}".replace("e-0", "e-")
        axes.annotate(label, place, offset, textcoords="offset points", fontsize=7, color=color)
  rows = {row["method"]: row for row in (*results["ranks"], *results["placements"], *results["main"])}
  colors = {"all-linear": "tab:blue", "attention": "tab:green", "MLP": "tab:orange"}
  for row in rows.values():
    full = row["rank"] is None
    x, y = (row["figures"][field] for field in fields)
    if not x or not y:
      continue
    style = {"color": "tab:red" if full else colors[row["placement"]], "marker": "D" if full else "o"}
    name = (
      "full" if full else {"all-linear": "", "attention": "attention "}.get(row["placement"], "MLP ") + f"{row['rank']}"
    )
    axes.errorbar(x["mean"], y["mean"], y["half"], x["half"], capsize=2, linewidth=1, markersize=5, **style)
    axes.annotate(name, (x["mean"], y["mean"]), (3, 4), textcoords="offset points", fontsize=8)
  axes.axhline(base["pretraining_loss"], color="black", linestyle=":", linewidth=1, label="base; adapter removed")
  lowest = min(row["figures"][fields[0]]["mean"] for row in rows.values() if row["figures"][fields[0]])
  highest = max(row["figures"][fields[1]]["mean"] for row in rows.values() if row["figures"][fields[1]])
  axes.set_xlim(lowest - 0.1 * (base[fields[0]] - lowest), lowest + 0.6 * (base[fields[0]] - lowest))
  axes.set_ylim(
    base[fields[1]] - 0.1 * (highest - base[fields[1]]), base[fields[1]] + 1.4 * (highest - base[fields[1]])
  )
  axes.set(xlabel="loss on summaries (validation)", ylabel="loss on held-out pretraining text")
  axes.grid(alpha=0.3)
  axes.legend(frameon=False, fontsize=8)


def plot(results: Mapping[str, Any], folder: Path) -> list[Path]:
  """A figure for each question."""
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  for name, draw in (("rouge", plot_rouge), ("learning_rate", plot_rates), ("forgetting", plot_forgetting)):
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    draw(figure.add_subplot(), results)
    paths.append(folder / f"{name}.png")
    figure.savefig(paths[-1], dpi=150)
  figure = Figure(figsize=(10, 4.4), layout="constrained")
  left, right = figure.subplots(1, 2)
  plot_ranks(left, results)
  plot_ranks(right, results, "validation_loss", "validation loss")
  left.legend(frameon=False, fontsize=8)
  paths.append(folder / "rank.png")
  figure.savefig(paths[-1], dpi=150)
  return paths


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def make_parser() -> argparse.ArgumentParser:
  """The options; their defaults take about half an hour on two CPU cores."""
  parser = harness.make_parser("summarize", __doc__, "--seeds 3 --ranks 1,8,64", rounds=15)
  count, rate = harness.positive(int), harness.positive(float)
  counts, rates = harness.several(count), harness.several(rate)
  parser.add_argument("--rank", type=count, default=8, help="LoRA's rank in the main table")
  parser.add_argument("--ranks", type=counts, default="1,4,8,16,32,64", help="ranks to compare")
  parser.add_argument("--sweep-ranks", type=counts, default="1,8,64", help="ranks whose learning rates are swept")
  parser.add_argument("--rates-lora", type=rates, default="3e-4,1e-3,3e-3,1e-2,3e-2", help="peak rates of LoRA")
  parser.add_argument("--rates-full", type=rates, default="1e-4,3e-4,1e-3,3e-3,1e-2", help="peak rates of full")
  parser.add_argument("--seeds", type=count, default=5, help="seeds of the main table and of the placements")
  parser.add_argument("--rank-seeds", type=count, default=5, help="seeds of each other rank")
  parser.add_argument("--sweep-seeds", type=count, default=1, help="seeds of each learning rate")
  parser.add_argument("--steps", type=count, default=160, help="steps of adaptation, for every method")
  parser.add_argument("--batch-size", type=count, default=8, help="pairs per step of adaptation")
  parser.add_argument("--pretrain-steps", type=count, default=1500, help="steps of pretraining")
  parser.add_argument("--pretrain-batch", type=count, default=16, help="windows of text per step of pretraining")
  parser.add_argument("--pretrain-rate", type=rate, default=3e-3, help="peak learning rate of pretraining")
  parser.add_argument("--vocabulary", type=count, default=2048, help="tokens that there are")
  parser.add_argument("--width", type=count, default=128, help="the model's width")
  parser.add_argument("--depth", type=count, default=4, help="transformer blocks")
  parser.add_argument("--heads", type=count, default=4, help="attention heads")
  parser.add_argument("--validation", type=count, default=250, help="validation pairs")
  parser.add_argument("--test", type=count, default=300, help="test pairs")
  parser.add_argument("--beam", type=count, default=4, help="width of the beam")
  parser.add_argument("--packages", type=lambda text: text.split(","), help="take docstrings from these alone")
  parser.add_argument(
    "--cache", type=harness.folder, default=HERE / ".cache", help="where the base and the text are kept"
  )
  parser.add_argument("--no-cache", action="store_true", help="pretrain anew and keep nothing")
  parser.add_argument("--fresh", action="store_true", help="forget the finished runs in --out")
  return parser


QUICK = {
  **{"ranks": "2,4", "sweep_ranks": "4", "rank": 4, "rates_lora": "1e-2,3e-2", "rates_full": "1e-3,3e-3"},
  **{"seeds": 2, "rank_seeds": 1, "sweep_seeds": 1, "steps": 20, "pretrain_steps": 60, "rounds": 2},
  **{"vocabulary": 512, "width": 32, "depth": 1, "validation": 50, "test": 50, "packages": "numpy,chex,flax,optax"},
}


def check(args: argparse.Namespace) -> None:
  """Raises ValueError before any work where the model cannot be made or adapted so."""
  if args.width % args.heads:
    raise ValueError(f"--width {args.width} is no multiple of --heads {args.heads}; each head has an equal part")
  if args.vocabulary < len(docstrings.SPECIAL) + 256:
    raise ValueError(f"--vocabulary {args.vocabulary} has no room for every byte; expected at least 258")
  for one in [*args.ranks, *args.sweep_ranks, args.rank]:
    if one > args.width:
      raise ValueError(f"rank {one} is larger than the weights' smaller side, --width {args.width}")
  if 2 * args.rank > args.width:
    raise ValueError(f"--rank {args.rank}: the placements have twice that rank, more than --width {args.width}")
  harness.check_writable(args.out, "--out")
  if not args.no_cache:
    harness.check_writable(args.cache, "--cache")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Checks the arguments and runs everything; returns what summarize.json holds."""
  parser = make_parser()
  args = harness.parse(parser, argv, **QUICK)
  try:
    check(args)
    cache = None if args.no_cache else args.cache
    data = docstrings.load(args.packages, args.vocabulary, args.validation, args.test, cache)
  except ValueError as error:
    parser.error(str(error))
  try:
    return run_all(args, data)
  except KeyboardInterrupt:
    print(
      f"Interrupted. Finished runs are kept in {args.out / 'runs'}: the same command, without --fresh, goes on.",
      file=sys.stderr,
    )
    raise SystemExit(130) from None


def count_steps(args: argparse.Namespace) -> int:
  """How far the progress bar goes."""
  sweeps = args.sweep_seeds * (len(args.sweep_ranks) * len(args.rates_lora) + len(args.rates_full))
  rows = args.seeds * 4 + args.rank_seeds * len([rank for rank in args.ranks if rank != args.rank])
  timed = (len(all_methods(args)) + 1) * (args.rounds + 1) * STEPS_PER_ROUND
  return args.pretrain_steps + (sweeps + rows) * args.steps + timed


def run_all(args: argparse.Namespace, data: Data) -> dict[str, Any]:
  """Pretrains, sweeps, compares and times, and writes what came of it."""
  with harness.progress(count_steps(args), "step", args.quiet) as bar:
    bar.set_description("pretraining")
    bench = Bench(args, data, bar.update)
    base = bench.kept("base", lambda: tuning.evaluate(bench.model, data, bench.base, [1, args.beam], 8), 0)
    bar.set_description("learning rates")
    rates = compare_rates(bench)
    bar.set_description("LoRA and full")
    main_rows = compare(bench, main_methods(args), rates["chosen"], args.seeds)
    bar.set_description("placements")
    lora = main_rows[0]
    placements = [lora, *compare(bench, placement_methods(args)[1:], rates["chosen"], args.seeds)]
    bar.set_description("ranks")
    others = [Method(rank) for rank in args.ranks if rank != args.rank]
    ranks = compare(bench, others, rates["chosen"], args.rank_seeds)
    bar.set_description("timing")
    timing = time_steps(bench, bar.update)
    bar.set_description("done")

  results = {
    "settings": {name: value for name, value in harness.settings(args).items() if name not in ("out", "cache")},
    "versions": versions(),
    "hardware": harness.hardware(),
    "data": data.report,
    "model": bench.model.settings(),
    "pretrained": {
      "name": bench.decisive["pretrained"],
      "parameters": sum(leaf.size for leaf in jax.tree.leaves(bench.base)),
    },
    "lead": tuning.rouge(data, tuning.lead(data)),
    "base": base,
    "rates": rates,
    "main": main_rows,
    "difference": differences(*main_rows),
    "placements": placements,
    "ranks": sorted([lora, *ranks], key=lambda row: row["rank"]),
    "timing": timing,
  }
  results = json.loads(json.dumps(results))
  harness.write(args.out / "summarize.json", results)
  plot(results, args.out)
  print(tables(results))
  return results


if __name__ == "__main__":
  main()
