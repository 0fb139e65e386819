"""LoRA in jaxlora and in the real PEFT on torch's CPU: the same weights, first factors, batches and steps.

Whether the losses agree, tokens a second (without padding; the first step of each shape is left out), and the peak
memory while training. Every side runs in a process of its own, one after the other, round by round; full fine-tuning by
the same loop of jaxlora's is beside them. What is done is kept: an interrupted command goes on with the next run.

It needs torch, peft and transformers beside jaxlora[llm], in the same environment.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

from lm import beside, memory
from lm.beside import harness  # of benchmarks/, where `lm` has found it
from lm.methods import Method
from lm.runs import prepare, resumable
from lm.training import Schedule

SIDES = {
  "jaxlora": ("lm.side_jaxlora", "lora"),
  "PEFT": ("lm.side_peft", None),
  "jaxlora, full": ("lm.side_jaxlora", "full"),
}
AGREE = 1e-3


def make_parser() -> argparse.ArgumentParser:
  """The options."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="examples:\n  python examples/llm/beside_peft.py --rounds 3\n"
    "  python examples/llm/beside_peft.py --steps 3 --no-full        # do the losses agree?",
  )
  positive = harness.positive(int)
  add = parser.add_argument
  add("--steps", type=positive, default=20, help="updates (default: 20)")
  add("--batch", type=positive, default=4, help="pairs an update (default: 4)")
  add("--rank", type=positive, default=8, help="of LoRA, on every linear layer (default: 8)")
  add("--rate", type=harness.positive(float), default=3e-3, help="peak learning rate (default: 3e-3)")
  add("--rounds", type=positive, default=1, help="times that every side runs, in turn (default: 1)")
  add("--threads", type=positive, default=os.cpu_count() or 1, help="torch's threads (default: one a core)")
  add("--no-full", action="store_true", help="without full fine-tuning")
  add("--model", type=Path, help="a GGUF file of a Llama-family model (default: SmolLM2-135M-Instruct)")
  add("--data", type=Path, help="a folder of data in ACLSum's form (default: ACLSum)")
  add("--out", type=Path, default=Path(__file__).parents[2] / "out" / "beside_peft", help="where results go")
  return parser


def run(side: str, inputs: Path, out: Path, threads: int) -> dict[str, Any]:
  """One side's result: from its file, or by running it.

  Raises:
    RuntimeError: if its process fails.
  """
  if not out.exists():
    module, argument = SIDES[side]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    partial = out.with_suffix(".partial")
    command = [sys.executable, "-m", module, str(inputs), str(partial), argument or str(threads)]
    # What the other side brings is not loaded: its memory would count.
    frameworks = {"USE_TF": "0", "USE_JAX": "0", "USE_TORCH": "1"}
    environment = memory.huge_pages(os.environ) | {"PYTHONPATH": path, **frameworks}
    if subprocess.run(command, env=environment).returncode:
      raise RuntimeError(f"{side}: its process failed, see above; what is done is kept, the same command goes on")
    partial.replace(out)
  return json.loads(out.read_text())


def summarise(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
  """Agreement, speed and memory from all rounds."""
  ours, theirs = found["jaxlora"][0]["loss"], found["PEFT"][0]["loss"]
  apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
  sides = {
    side: {**beside.speed(runs), "peak": max((run["peak"] for run in runs if run["peak"]), default=None)}
    for side, runs in found.items()
  }
  return {"losses_apart": apart, "agree": apart <= AGREE, "sides": sides}


def table(summary: dict[str, Any]) -> str:
  """A row a side, over jaxlora's."""
  first = summary["sides"]["jaxlora"]
  rows = []
  for side, own in summary["sides"].items():
    speed = ["-", "-", "-"]
    if own["step"] is not None:
      speed = [f"{own['tokens']:,.0f}", f"{own['step']:.2f}", f"{first['tokens'] / own['tokens']:.2f}"]
    memory = "-" if own["peak"] is None else f"{own['peak'] / 2**20:,.0f}"
    rows.append([side, *speed, memory])
  return harness.table(("", "tokens / s", "s / step", "jaxlora's speed over it", "peak MiB"), rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs what is not done yet; prints and returns the summary."""
  parser = make_parser()
  args = parser.parse_args(argv)
  if missing := [name for name in ("torch", "peft", "transformers") if not harness.installed(name)]:
    parser.error(f"{', '.join(missing)}: not installed; pip install torch peft transformers (torch's CPU build)")
  method = Method("lora", args.rank, float(args.rank))
  schedule = Schedule(args.rate, args.steps, args.batch)
  try:
    setup = prepare(args.model, args.data, 3)
  except (OSError, ValueError) as error:
    parser.error(str(error))
  settings = {"method": dataclasses.asdict(method), "schedule": schedule.settings}
  folder = args.out / harness.digest([settings, setup.digest])[:8]
  inputs = folder / "inputs"
  if not (inputs / "plan.json").exists():
    inputs.mkdir(parents=True, exist_ok=True)
    beside.write_inputs(inputs, setup, method, schedule)
  del setup
  sides = [side for side in SIDES if not (args.no_full and side == "jaxlora, full")]
  found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
  try:
    for number in range(args.rounds):
      for side in sides:
        name = side.replace(", ", "-").lower()
        found[side].append(run(side, inputs, folder / f"{name}-t{args.threads}-{number}.json", args.threads))
  except RuntimeError as error:
    parser.error(str(error))
  summary = {"settings": settings, **summarise(found), "hardware": harness.cpu(), "runs": found}
  harness.write(folder / "summary.json", summary)
  print(table(summary))
  print(f"\nThe losses of {args.steps} steps are at most {summary['losses_apart']:.1e} apart ({AGREE:g} expected).")
  return summary


if __name__ == "__main__":
  resumable(main)
