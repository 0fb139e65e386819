"""Bar charts of ratios."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure


class Panel(NamedTuple):
  """One chart: a bar for each entry, and a line at the ratio to reach.

  Attributes:
    title, label: of the chart and of its axis.
    values: summaries (`timing.summarize`) by entry.
    reach: the ratio that entries should stay below.
  """

  title: str
  label: str
  values: Mapping[str, Mapping[str, Any]]
  reach: float | None = None


def plot_bars(panels: Sequence[Panel], path: Path) -> None:
  """Draws medians as bars and ranges as whiskers, one panel above the other."""
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
