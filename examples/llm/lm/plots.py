"""Finished runs as a picture."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from .comparisons import Groups

PANELS = {"rougeL": "ROUGE-L on test", "loss": "loss on test, nats a token"}


def plot(groups: Groups, path: Path) -> None:
  """A bar for each label, its mean over seeds, with every seed as a dot; baselines have no loss."""
  labels = list(groups)
  figure = Figure(figsize=(11, max(2.5, 0.35 * len(labels) + 1)), layout="constrained")
  for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
    for k, label in enumerate(labels):
      values = [run[name] for run in groups[label].values() if run[name] is not None]
      if values:
        axes.barh(k, np.mean(values), color=_color(next(iter(groups[label].values()))), height=0.7)
        axes.plot(values, [k] * len(values), "o", color="black", markersize=3)
    axes.set(title=title, yticks=range(len(labels)), yticklabels=labels)
    axes.margins(y=0.02)
  figure.axes[0].invert_yaxis()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


def _color(run: dict[str, Any]) -> str:
  names = {"lora": "tab:blue", "full": "tab:orange", "head": "tab:green"}
  return names.get(run["settings"]["method"]["name"], "silver")
