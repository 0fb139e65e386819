"""The tables of a result, in Markdown; they read the result alone."""

from collections.abc import Mapping
from typing import Any

from studies import harness

from .cells import SCORES, cell, exact, plain
from .figures import mean_loss
from .findings import findings, rate_findings
from .tokens import WINDOW
from .tuning import FULL


def main_table(results: Mapping[str, Any]) -> str:
  """ROUGE and costs of the base, LoRA and full fine-tuning."""
  beam = results["settings"]["beam"]
  head = ("method", *SCORES.values(), f"ROUGE-L, beam {beam}", "validation loss", "trained", "Adam's moments", "file")
  head += ("step / full", "GFLOPs a step", "temp memory")
  rows = [
    (
      name,
      *(cell(scores.get(field), 1) for field in (*SCORES, "rougeL_beam")),
      cell(scores.get("validation_loss"), 3),
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
  return harness.markdown(head, [*rows, ("LoRA - full, seed by seed", *cells, *["-"] * 6)])


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
  return harness.markdown(head, rows)


def placement_table(results: Mapping[str, Any]) -> str:
  """Quality by placement, at equal parameters."""
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
  return harness.markdown(head, rows)


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
  return harness.markdown(("method", *(f"{rate:.2g}" for rate in rates), "best", "parabola's least"), rows)


def forgetting_table(results: Mapping[str, Any]) -> str:
  """The loss on held-out pretraining text, before and after."""
  base = results["base"]["pretraining_loss"]
  rows = [("base, not adapted", f"{base:.3f}", "-", "-", "-")]
  for row in results["main"]:
    after, removed = row["figures"]["pretraining_loss"], row["figures"].get("pretraining_loss_removed")
    rise = {**after, "mean": after["mean"] - base}
    rows.append((plain(row), cell(after, 3), cell(rise, 3, "+"), cell(removed, 3), cell(row["figures"]["rougeL"], 1)))
  return harness.markdown(("method", "loss after", "rise", "adapter removed", "ROUGE-L"), rows)


def tables(results: Mapping[str, Any]) -> str:
  """All tables of a result."""
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
    f" {settings['pretrain_batch']} x {WINDOW} tokens; adapted for {settings['steps']} steps of"
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
