"""A plot for each question."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from .cells import SCORES, exact, plain
from .figures import mean_loss


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
  """Validation loss over the peak learning rate, by method."""
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
  )  # rates that diverge leave the axes
  axes.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss")
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)


def plot_forgetting(axes: Axes, results: Mapping[str, Any]) -> None:
  """Loss on the pretraining text over loss on the summaries, by rate and by method."""
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
  """Draws all of them into a folder."""
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
