"""The tables and the plot of the study, of its JSON alone."""

from collections.abc import Mapping
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from studies import harness

LN2 = math.log(2)  # the loss where policy and reference are the same
HEAD = ("starts at zero", "rate", "seed", "margin", "pairs won", "loss", "other papers: margin", "won")


def row(one: Mapping[str, Any]) -> tuple[str, ...]:
  """One run's cells."""
  own, others = one["train"], one["validation"]
  cells = [f"{one['zero'].upper()}", f"{one['rate']:g}", str(one["seed"])]
  cells += [f"{own['margin']:+.4f}", f"{own['won']:.0%}", f"{own['loss']:.4f}"]
  return (*cells, f"{others['margin']:+.4f}", f"{others['won']:.0%}")


def memory(results: Mapping[str, Any]) -> str:
  """What a step holds."""
  used = results["memory"]
  return (
    f"A step's arguments are {used['arguments']:,} bytes: the base once ({used['base']:,}), and {used['rest']:,} of"
    f" factors, moments and batch. With a copy of the base as the reference they would be"
    f" {used['arguments'] + used['base']:,}."
  )


def text(results: Mapping[str, Any]) -> str:
  """All of it, for a terminal."""
  runs, starts = ([row(one) for one in results[part]] for part in ("runs", "starts"))
  return "\n\n".join(
    [harness.table(HEAD, runs), f"Rates (ln 2 = {LN2:.4f}):\n{harness.table(HEAD, starts)}", memory(results)]
  )


def tables(results: Mapping[str, Any]) -> str:
  """The same in Markdown."""
  s = results["settings"]
  above = (
    f"{results['pairs']} pairs of training papers, {results['validation_pairs']} of others; {s['steps']} steps of"
    f" {s['batch']} pairs, beta {s['beta']:g}, rank {s['rank']}. {harness.conditions(results)}. {memory(results)}"
  )
  rows = [row(one) for one in (*results["runs"], *results["starts"])]
  return harness.documented(above, [HEAD, *rows])


def plot(results: Mapping[str, Any], path: Path) -> None:
  """Margins over the steps, and the loss that each start reaches at each rate."""
  left, right = (figure := Figure(figsize=(10, 4), layout="constrained")).subplots(1, 2)
  for one in results["runs"]:
    left.plot(np.arange(1, len(one["margin"]) + 1), one["margin"], label=f"seed {one['seed']}", linewidth=1)
  left.axhline(0, color="gray", linewidth=0.5)
  left.set(xlabel="step", ylabel="reward margin of the batch (nats)", title="chosen less rejected")
  left.legend(frameon=False)
  for zero, marker in (("b", "o"), ("a", "s")):
    ours = [one for one in results["starts"] if one["zero"] == zero]
    rates, losses = [one["rate"] for one in ours], [one["train"]["loss"] for one in ours]
    right.semilogx(rates, losses, marker=marker, label=f"{zero.upper()} = 0")
  right.axhline(LN2, color="gray", linestyle="--", linewidth=1, label="ln 2: nothing learned")
  right.set(xlabel="learning rate", ylabel="loss on the training pairs", title="which factor starts at zero")
  right.legend(frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
