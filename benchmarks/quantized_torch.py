"""PEFT on bitsandbytes' layers over PEFT on floats, on torch's CPU: the model, batch and optimizer of `quantized.py`.

Another framework has other kernels: its ratios can be compared with JAX's, its times cannot.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import harness
from peft_torch import TARGETS, check_trains, make_batch, make_model, trainer

FLOATS = "float base"
FORMATS = ("nf4", "nf4, double", "int8")


def on_codes(args: argparse.Namespace, format: str) -> Any:
  """The model with every adapted layer as one of bitsandbytes."""
  import bitsandbytes
  import torch
  from torch import nn

  def layer(old: nn.Linear) -> nn.Module:
    sizes = (old.in_features, old.out_features)
    if format == "int8":
      new = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
      options = {"compress_statistics": format.endswith("double"), "quant_type": "nf4"}
      new = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, **options)
    new.load_state_dict(old.state_dict())
    return new.to("cpu")  # where it becomes codes

  model = make_model(args)
  for block in model.blocks:
    for name in TARGETS:
      setattr(block, name, layer(getattr(block, name)))
  model.is_loaded_in_8bit, model.is_loaded_in_4bit = format == "int8", format != "int8"  # where PEFT looks
  return model


def adapted(args: argparse.Namespace, model: Any) -> Any:
  """The model with PEFT's adapters."""
  import peft

  return peft.get_peft_model(model, peft.LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=TARGETS))


def prepared(args: argparse.Namespace, batch: Any, model: Any) -> Callable[[], float]:
  """A step, which was seen to train the factors alone."""
  step = trainer(model := adapted(args, model), batch)
  check_trains(step, model)
  return step


# ----------------------------------------------------------------------------------------------------------------------
# Results.

HEAD = ("torch", "step / floats", "time")


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The rows of the table."""
  times = results["seconds"].items()
  return [(name, harness.ratio_cell(results["over_floats"][name]), harness.milliseconds(time)) for name, time in times]


def tables(results: dict[str, Any]) -> str:
  """The table of benchmarks/README.md."""
  sizes, torch = results["settings"], results["torch"]
  shape = f"d={sizes['d']}, {sizes['layers']} layers, {sizes['batch']} x {sizes['seq']} tokens, rank {sizes['rank']}"
  packages = ", ".join(f"{name} {torch[name]}" for name in ("torch", "peft", "bitsandbytes"))
  hardware = f"{results['hardware']['cores']} CPU cores ({results['hardware']['cpu']}), {torch['threads']} threads"
  return "\n\n".join([f"{shape}. {hardware}, {packages}.", harness.markdown(HEAD, cells(results))])


def plot(results: dict[str, Any], path: Any) -> None:
  """Times over the float base's."""
  rows = {name: results["over_floats"][name] for name in FORMATS}
  harness.plot_bars([harness.Panel("torch", "step time / float base's", rows, None)], path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what quantized_torch.json holds."""
  parser = harness.make_parser(__file__, __doc__, "--d 256")
  harness.add_layers(parser)
  harness.add_sizes(parser)
  parser.add_argument("--threads", type=harness.positive(int), default=2, help="torch's threads")
  args = harness.parse(parser, argv, d=128, layers=2, rounds=3)
  if not all(harness.installed(name) for name in ("torch", "peft", "bitsandbytes")):
    parser.error("torch, peft and bitsandbytes are not installed: pip install 'jaxlora[peers]' bitsandbytes")
  import torch

  torch.set_num_threads(args.threads)
  batch = make_batch(args)
  runs = {FLOATS: prepared(args, batch, make_model(args))}
  runs |= {format: prepared(args, batch, on_codes(args, format)) for format in FORMATS}
  runs = harness.with_control(runs, FLOATS, runs[FLOATS])
  calls = harness.calls_per_turn(runs)
  with harness.progress((args.rounds + 1) * len(runs) * calls, "call", args.quiet) as bar:
    seconds = harness.interleave(runs, args.rounds, calls, bar.update)
  results = {
    **harness.provenance(args),
    "torch": harness.versions(*harness.PEERS, "bitsandbytes") | {"threads": args.threads},
    "seconds": {name: harness.summarize(values) for name, values in seconds.items()},
    "over_floats": harness.ratios(seconds, FLOATS),
  }
  harness.publish(args, "quantized_torch", results, plot)
  print(harness.table(HEAD, cells(results)))
  return results


if __name__ == "__main__":
  main()
