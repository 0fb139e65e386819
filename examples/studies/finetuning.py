"""Results of `finetune.py`: rows over seeds, the tables for a terminal and for the READMEs, and the plot."""

from collections.abc import Sequence
from pathlib import Path
import statistics
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from studies import harness, methods


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
  """Mean and sample standard deviation over seeds; None for a score that the method does not have."""
  known = [value for value in values if value is not None]
  if not known:
    return None
  return {"mean": statistics.fmean(known), "std": statistics.stdev(known) if len(known) > 1 else 0.0}


def summarize(
  program: methods.Program, runs: list[dict[str, Any]], ratio: dict[str, Any], total: int
) -> dict[str, Any]:
  """A method's row: scores over seeds, sizes and times, and the runs themselves."""
  return {
    "method": program.method.name,
    "rank": program.method.rank,
    "learning_rate": program.method.lr,
    **{field: spread([run[field] for run in runs]) for field in ("new", "old", "old_removed")},
    "trainable_parameters": program.trainable,
    "trainable_share": program.trainable / total,
    "optimizer_bytes": program.optimizer_bytes,
    "adapter_file_bytes": runs[0]["adapter_file_bytes"],
    "step_over_full": ratio,
    "flops_per_step": program.flops,
    "seeds": runs,
  }


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of the table, then its rows."""

  def percent(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['mean']:.1%} ± {100 * value['std']:.1f}"

  head = ("method", "new digits", "old, kept", "old, removed", "trainable", "optimizer", "file", "step / full", "FLOPs")
  rows = []
  for row in results["methods"]:
    rows.append(
      (
        row["method"],
        *(percent(row[field]) for field in ("new", "old", "old_removed")),
        f"{row['trainable_parameters']:,} ({row['trainable_share']:.1%})",
        *(f"{row[field] / 1024:,.1f} KiB" for field in ("optimizer_bytes", "adapter_file_bytes")),
        harness.ratio_cell(row["step_over_full"]),
        f"{row['flops_per_step'] / 1e9:.3f} G",
      )
    )
  return [head, *rows]


def table(results: dict[str, Any]) -> str:
  """The table for a terminal."""
  head, *rows = cells(results)
  settings = results["settings"]
  return "\n".join(
    [
      harness.table(head, rows),
      f"Accuracy on the {settings['evaluate_on']} split: mean ± sample standard deviation, seeds:"
      f" {settings['seeds']}. The pretrained model has {results['pretrained']['old']:.1%} on the old digits.",
      "old, kept: the tuned backbone under the old head; old, removed: the same after the adapter is taken off.",
      f"step / full: median (min-max) of {settings['rounds']} interleaved rounds. FLOPs: XLA's count for one step.",
    ]
  )


def tables(results: dict[str, Any]) -> str:
  """The table of examples/README.md."""
  head, *rows = cells(results)
  pretrained = results["pretrained"]
  lines = (
    f"{pretrained['parameters']:,} parameters; the pretrained model has {pretrained['old']:.1%} on the old digits."
    f" {results['settings']['seeds']} seeds, mean ± sample standard deviation; {results['settings']['rounds']} rounds.",
    f"{harness.conditions(results)}.",
  )
  return "\n".join([*lines, "", harness.markdown(head, rows)])


def brief(results: dict[str, Any]) -> str:
  """The table of docs/numbers.md: rank 8 alone, and fewer columns."""
  head, *loras, full = results["methods"]
  shown = [head, *(row for row in loras if row["rank"] == 8), full]

  def percent(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['mean']:.1%}" + (f" ± {100 * value['std']:.1f}" if value["std"] else "")

  rows = [
    (
      row["method"],
      *(percent(row[field]) for field in ("new", "old", "old_removed")),
      f"{row['trainable_parameters']:,}",
      *(f"{row[field] / 1024:,.0f} KiB" for field in ("optimizer_bytes", "adapter_file_bytes")),
      f"{row['step_over_full']['median']:.2f}",
      f"{row['flops_per_step'] / full['flops_per_step']:.2f}",
    )
    for row in shown
  ]
  scores = ("new digits", "old digits kept", "adapter removed")
  return harness.markdown(("", *scores, "trained", "Adam's moments", "file", "step / full", "FLOPs / full"), rows)


def plot(results: dict[str, Any], path: Path) -> None:
  """Accuracy on the new and on the old digits over the number of trainable parameters."""
  figure = Figure(figsize=(10, 4.4), layout="constrained")
  left, right = figure.subplots(1, 2, sharex=True)
  head, *loras, full = results["methods"]
  styles = [("head alone", "tab:gray", "s", [head]), ("LoRA", "tab:blue", "o", loras)]
  styles.append(("full fine-tuning", "tab:red", "D", [full]))
  for axes, field in ((left, "new"), (right, "old")):
    for label, color, marker, rows in styles:
      x = [row["trainable_parameters"] for row in rows]
      mean, std = ([100 * row[field][part] for row in rows] for part in ("mean", "std"))
      axes.errorbar(
        x, mean, std, label=label, color=color, marker=marker, markersize=7, capsize=4, linewidth=1, zorder=3
      )
    for row in loras:
      lowest = (row["trainable_parameters"], 100 * (row[field]["mean"] - row[field]["std"]))
      text = axes.annotate(f"r={row['rank']}", lowest, (0, -6), textcoords="offset points", ha="center", va="top")
      text.set(fontsize=9, zorder=4, path_effects=[withStroke(linewidth=3, foreground="white")])
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    axes.margins(x=0.12, y=0.15)
    axes.set_ylim(top=100 + 0.05 * (100 - axes.get_ylim()[0]))
  x, removed = ([row["trainable_parameters"] for row in loras], [100 * row["old_removed"]["mean"] for row in loras])
  right.plot(x, removed, "o", color="tab:blue", markerfacecolor="white", markersize=7, label="LoRA, adapter removed")
  right.axhline(100 * results["pretrained"]["old"], color="black", linestyle=":", linewidth=1, label="pretrained")
  left.set_title("New digits (5-9)")
  right.set_title("Old digits (0-4), under the old head")
  handles, labels = right.get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
  figure.savefig(path, dpi=150)
