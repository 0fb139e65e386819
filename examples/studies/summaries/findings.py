"""Sentences that say what a result shows, with its numbers."""

from collections.abc import Mapping
from typing import Any

from .cells import cell


def rate_findings(results: Mapping[str, Any]) -> str:
  """The ratios of the best rates, if no curve has its minimum at an end."""
  full, loras = results["rates"]["full"], results["rates"]["lora"]
  least = {curve["rank"]: curve["vertex"] for curve in (*loras, full)}
  if None in least.values():
    return "Not every curve has its minimum inside the sweep: no ratio of rates."
  ratios = ", ".join(f"{least[curve['rank']] / full['vertex']:.1f} at rank {curve['rank']}" for curve in loras)
  across = max(least[curve["rank"]] for curve in loras) / min(least[curve["rank"]] for curve in loras)
  return f"LoRA's best rate over full's, by the parabolas: {ratios}; between the ranks it moves {across:.2f}-fold."


def gained(results: Mapping[str, Any], field: str) -> str:
  """LoRA's share of full fine-tuning's gain over the base."""
  base = results["base"][field]
  lora, full = (row["figures"][field]["mean"] for row in results["main"])
  return "no share" if full == base else f"{100 * (lora - base) / (full - base):.0f} %"


def apart(figure: Mapping[str, Any]) -> str:
  """Whether the interval of a difference excludes zero."""
  if figure["half"] is None:
    return "one seed, no interval"
  return "apart" if abs(figure["mean"]) > figure["half"] else "the interval holds zero"


def findings(results: Mapping[str, Any]) -> str:
  """What the tables show, one sentence a line."""
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
  """Rates at which full fine-tuning has lower losses than LoRA at its chosen rate, on summaries and on the old text."""
  loras = results["rates"]["lora"]
  curve = next((curve for curve in loras if curve["rank"] == results["settings"]["rank"]), loras[0])
  rate = results["rates"]["chosen"]["lora"]
  (lora,) = (point for point in curve["points"] if point["learning_rate"] == rate)

  def ahead(point: Mapping[str, Any]) -> bool:
    pairs = [(point["figures"][field], lora["figures"][field]) for field in ("validation_loss", "pretraining_loss")]
    return all(a and b and a["mean"] < b["mean"] for a, b in pairs)

  return [f"{point['learning_rate']:.2g}" for point in results["rates"]["full"]["points"] if ahead(point)]
