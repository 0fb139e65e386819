"""Results of `sentence_encoder.py`: rows over seeds, the tables for a terminal and for the README, and the plot."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from studies import harness, methods

from .training import FULL, HEAD

UNTOUCHED = "untouched"
METRICS = {"accuracy": "accuracy", "mrr": "MRR", "recall@1": "recall@1"}


def summarize(
  program: methods.Program, runs: list[dict[str, Any]], ratio: dict[str, Any], total: int
) -> dict[str, Any]:
  """A method's row in a task's table: scores over seeds, sizes and times, and the runs themselves."""
  scores = [field for field in runs[0] if field in METRICS]
  return {
    "method": program.method.name,
    "rank": program.method.rank,
    "learning_rate": program.method.lr,
    "head_learning_rate": program.method.settings["lr_head"],
    **{field: harness.interval([run[field] for run in runs]) for field in scores},
    "trainable_parameters": program.trainable,
    "trainable_share": program.trainable / total,
    "optimizer_bytes": program.optimizer_bytes,
    "temp_bytes": program.temp_bytes,
    "file_bytes": runs[0]["file_bytes"],
    "step_over_full": ratio,
    "flops_per_step": program.flops,
    "seeds": runs,
  }


def cells(results: dict[str, Any]) -> dict[str, list[tuple[str, ...]]]:
  """Each task's table: its head, then its rows."""
  tables = {}
  for name, task in results["tasks"].items():
    scores = [field for field in METRICS if field in task["methods"][0]]
    costs = ("trained", "step / full", "GFLOPs a step", "XLA temp", "Adam's moments", "file")
    rows: list[tuple[str, ...]] = [("method", *(METRICS[field] for field in scores), *costs)]
    if task["untouched"]:
      rows.append((UNTOUCHED, *(f"{task['untouched'][field]:.1%}" for field in scores), *"-" * len(costs)))
    for row in task["methods"]:
      rows.append(
        (
          row["method"],
          *(harness.percent_cell(row[field]) for field in scores),
          f"{row['trainable_parameters']:,} ({row['trainable_share']:.1%})",
          harness.ratio_cell(row["step_over_full"]),
          f"{row['flops_per_step'] / 1e9:.1f}",
          *(f"{row[field] / 1e6:,.1f} MB" for field in ("temp_bytes", "optimizer_bytes", "file_bytes")),
        )
      )
    tables[name] = rows
  return tables


def tables(results: dict[str, Any]) -> str:
  """The tables of examples/README.md."""
  parts = []
  for name, (head, *rows) in cells(results).items():
    task = results["tasks"][name]
    texts = ", ".join(f"{count:,} {what}" for what, count in task["texts"].items())
    control = harness.ratio_cell(task["control"])
    parts.append(f"{name.capitalize()} ({texts}); A/A control {control}:\n\n{harness.markdown(head, rows)}")
  return "\n\n".join(parts)


def describe(results: dict[str, Any]) -> str:
  """The tables for a terminal."""
  settings = results["settings"]
  lines = []
  for name, (head, *rows) in cells(results).items():
    lines += [f"{name}: {results['tasks'][name]['texts']}", harness.table(head, rows)]
    lines.append(f"A/A control (full fine-tuning again): {harness.ratio_cell(results['tasks'][name]['control'])}")
  lines.append(
    f"Scores on the {settings['evaluate_on']} split: mean ± half of the 95 % t-interval over {settings['seeds']} seeds."
  )
  return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
  """Scores with their intervals, and costs over full fine-tuning's."""
  figure = Figure(figsize=(11, 3.4 * len(results["tasks"])), layout="constrained")
  grid = figure.subplots(len(results["tasks"]), 2, squeeze=False)
  for (left, right), (name, task) in zip(grid, results["tasks"].items(), strict=True):
    score = next(field for field in METRICS if field in task["methods"][0])
    names = [row["method"] for row in task["methods"]]
    colors = [{HEAD: "tab:gray", FULL: "tab:red"}.get(name, "tab:blue") for name in names]
    means = [100 * row[score]["mean"] for row in task["methods"]]
    halves = [100 * (row[score]["half"] or 0) for row in task["methods"]]
    left.errorbar(means, range(len(names)), xerr=halves, fmt="none", ecolor="dimgray", capsize=4)
    left.scatter(means, range(len(names)), color=colors, zorder=3)
    for k, row in enumerate(task["methods"]):
      left.plot([100 * run[score] for run in row["seeds"]], [k + 0.2] * len(row["seeds"]), "|", color=colors[k])
    if task["untouched"]:
      left.axvline(100 * task["untouched"][score], color="black", linestyle=":", label=UNTOUCHED)
      left.legend(frameon=False, fontsize=8)
    left.set(yticks=range(len(names)), yticklabels=names, title=name, xlabel=f"{METRICS[score]} (%), 95 % t-interval")
    left.invert_yaxis()
    left.margins(y=0.2)
    left.grid(axis="x", alpha=0.3)
    full = task["methods"][-1]
    costs = {"step time": lambda row: row["step_over_full"]["median"]}
    for label, field in (("temp memory", "temp_bytes"), ("moments", "optimizer_bytes"), ("file", "file_bytes")):
      costs[label] = lambda row, field=field: row[field] / full[field]
    width = 0.8 / len(names)
    for k, row in enumerate(task["methods"]):
      heights = [cost(row) for cost in costs.values()]
      bars = right.bar(np.arange(len(costs)) + k * width, heights, width, color=colors[k], label=row["method"])
      right.bar_label(bars, [f"{height:.2g}" for height in heights], fontsize=7)
    right.set(yscale="log", title="cost over full fine-tuning's", ylim=(None, 4))
    right.set_xticks(np.arange(len(costs)) + 0.4 - width / 2, list(costs))
    right.legend(frameon=False, fontsize=8, ncols=len(names), loc="upper center")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
