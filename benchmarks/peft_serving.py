"""PEFT's mixed batches on torch's CPU over torch's own base: the same shapes, with an adapter for each row.

`adapter_names=` takes one name per row and computes one adapter after the other. `serving.py` runs this in a process of
its own. Single tokens run without a cache, those of torch's base, too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import harness
from peft_torch import TARGETS, make_batch, make_model

BASE = "base"


def make_adapted(args: Any) -> Any:
  """The model with as many adapters as the batch with the most distinct ones needs."""
  import peft
  import torch

  config = peft.LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=TARGETS, init_lora_weights=False)
  model = peft.get_peft_model(make_model(args), config, adapter_name="0")
  for k in range(1, max(args.distinct)):
    model.add_adapter(str(k), config)
  torch.set_grad_enabled(False)
  return model.eval()


def check_mixes(model: Any, x: Any) -> float:
  """The largest difference between a row of a mixed batch and its adapter alone, over the largest logit.

  Raises:
    RuntimeError: if it is more than rounding.
  """
  mixed = model(x[:2], adapter_names=["0", "__base__"])
  model.set_adapter("0")
  alone = model(x[:1])
  difference = float((mixed[:1] - alone).abs().max() / alone.abs().max())
  if difference > (5e-2 if mixed.dtype.itemsize == 2 else 1e-4):
    raise RuntimeError(f"a row and its adapter alone differ by {difference:.1e}")
  return difference


def serve(model: Any, plain: Any, x: Any, distinct: Sequence[int], rounds: int, tick: Callable[[int], Any]) -> Any:
  """Throughput over the base's, by the number of distinct adapters."""
  names = {count: [str(row % count) for row in range(len(x))] for count in distinct}
  runs = {
    BASE: lambda: plain(x),
    **{str(count): lambda count=count: model(x, adapter_names=names[count]) for count in distinct},
  }
  seconds = harness.interleave(runs, rounds, harness.calls_per_turn(runs), tick)
  return {
    "seconds": {name: harness.summarize(values) for name, values in seconds.items()},
    "throughput": {
      name: harness.inverse(ratio) for name, ratio in harness.ratios(seconds, BASE).items() if name != BASE
    },
  }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what peft_serving.json holds."""
  parser = harness.make_parser(__file__, __doc__, "--d 256", records=False)
  harness.add_layers(parser)
  harness.add_sizes(parser)
  parser.set_defaults(batch=32)
  parser.add_argument("--distinct", type=harness.several(harness.positive(int)), default=[1, 8, 32], help="adapters")
  parser.add_argument("--threads", type=harness.positive(int), default=2, help="torch's threads")
  args = harness.parse(parser, argv, d=128, layers=2, rounds=3)
  if not all(harness.installed(name) for name in ("torch", "peft")):
    parser.error("torch and peft are not installed; the extra `peers` brings them: pip install 'jaxlora[peers]'")
  import torch

  torch.set_num_threads(args.threads)
  model, plain = make_adapted(args), make_model(args).eval()
  tokens, _ = make_batch(args)
  difference = check_mixes(model, tokens)
  # the model adds all of its positions: it must have as many as the sequence
  works = {str(args.seq): tokens, "1": tokens[:, :1]}
  served = {}
  with harness.progress(0, "call", args.quiet) as bar:
    for name, x in works.items():
      shorten(model, plain, x.shape[1])
      served[name] = serve(model, plain, x, args.distinct, args.rounds, bar.update)
  results = {
    "settings": harness.settings(args),
    "versions": harness.versions(*harness.PEERS),
    "hardware": {**harness.cpu(), "threads": args.threads},
    "difference": difference,
    "works": served,
  }
  harness.write(args.out / "peft_serving.json", results)
  rows = [
    (tokens, count, harness.ratio_cell(ratio))
    for tokens, one in served.items()
    for count, ratio in one["throughput"].items()
  ]
  print(harness.table(("tokens a row", "distinct adapters", "throughput / base"), rows))
  return results


def shorten(model: Any, plain: Any, length: int) -> None:
  """Truncates the positions of both models to this length."""
  from torch import nn

  for one in (model.base_model.model, plain):
    one.position = nn.Parameter(one.position[:length], requires_grad=False)


if __name__ == "__main__":
  main()
