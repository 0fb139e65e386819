"""Cells of the tables, and names of rows and columns."""

from collections.abc import Mapping
from typing import Any

SCORES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}


def cell(figure: Mapping[str, Any] | None, digits: int, sign: str = "") -> str:
  """A mean, with half of its interval if there is one."""
  if figure is None:
    return "-"
  mean = f"{figure['mean']:{sign}.{digits}f}"
  return mean if figure["half"] is None else f"{mean} ± {figure['half']:.{digits}f}"


def exact(scores: Mapping[str, float]) -> dict[str, dict[str, Any]]:
  """Scores of something that has no seeds, in the form of figures."""
  return {name: {"mean": value, "half": None} for name, value in scores.items() if isinstance(value, float)}


def plain(method: Mapping[str, Any]) -> str:
  """A row's name, without the default placement."""
  return method["method"].removesuffix(", all-linear")
