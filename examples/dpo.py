"""Direct preference optimisation of an adapter, with its own base as the reference: one copy of the base in memory.

A small decoder is trained on abstracts and people's sentences about them; then an adapter learns to prefer, of each
abstract's own sentences, the one nearest to what people wrote. Which factor starts at zero is compared at small rates.
It needs the data: pip install --no-deps aclsum.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from studies import harness
from studies.preferences import pairs, tables, training
from studies.preferences.training import Settings
from studies.summaries import pretraining
from studies.summaries.decoder import Decoder


def make_parser() -> argparse.ArgumentParser:
  """The options; their defaults take about ten minutes on two CPU cores."""
  parser = harness.make_parser(__file__, __doc__, "--seeds 3 --rate 1e-3", caches=True)
  count, rate = harness.positive(int), harness.positive(float)
  parser.add_argument("--seeds", type=count, default=3, help="seeds of the adapter and of the order of pairs")
  parser.add_argument("--rank", type=count, default=8, help="LoRA's rank, on every kernel")
  parser.add_argument("--rate", type=rate, default=3e-3, help="peak learning rate")
  parser.add_argument("--steps", type=count, default=100, help="steps of preference training")
  parser.add_argument("--batch", type=count, default=8, help="pairs per step")
  parser.add_argument("--beta", type=rate, default=0.1, help="of the rewards")
  parser.add_argument("--zero", choices=("a", "b"), default="b", help="the factor that starts at zero")
  parser.add_argument(
    "--small-rates",
    type=harness.several(rate),
    default="1e-6,1e-5,1e-4,1e-3",
    help="rates at which A = 0 and B = 0 are compared",
  )
  parser.add_argument("--pretrain-steps", type=count, default=300, help="steps of the base")
  parser.add_argument("--vocabulary", type=count, default=1024, help="size of the vocabulary")
  parser.add_argument("--width", type=count, default=64, help="the model's width")
  parser.add_argument("--depth", type=count, default=2, help="transformer blocks")
  parser.add_argument("--data", type=Path, help="a folder with train.jsonl and val.jsonl in ACLSum's form")
  return parser


QUICK = {"seeds": 1, "steps": 20, "pretrain_steps": 30, "small_rates": "1e-6"}


def run(args: argparse.Namespace, data: pairs.Data, model: Decoder, base: Any, settings: Settings, tick: Any) -> Any:
  """One adapter: its curves, and its margins on the training pairs and on those of other papers, after training."""
  digest = harness.digest(settings._asdict(), [*jax.tree.leaves(base), *data.train])
  name = f"{settings.zero}-{settings.rate:g}-{settings.seed}-{digest}"
  tree, curves = training.train(model, base, data.train, settings, args.out / "runs" / name, digest, tick)
  measure = training.make_steps(model, settings.beta).measure
  found = {"zero": settings.zero, "rate": settings.rate, "seed": settings.seed, **curves}
  for split, rows in (("train", data.train), ("validation", data.validation)):
    parts = np.array_split(np.arange(len(rows.tokens)), -(-len(rows.tokens) // 30))
    margins = np.concatenate([np.asarray(measure(tree, rows.take(part))) for part in parts])
    loss = float(np.log1p(np.exp(-margins)).mean())
    found[split] = {"margin": float(margins.mean()), "won": float((margins > 0).mean()), "loss": loss}
  return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Checks the arguments and runs everything; returns what dpo.json holds."""
  parser = make_parser()
  args = harness.parse(parser, argv, **QUICK)
  try:
    harness.check_folders(args)
    data = pairs.load(args.vocabulary, args.data)
  except ValueError as error:
    parser.error(str(error))
  model = Decoder(args.vocabulary, args.width, args.depth, 4, pairs.PROMPT + pairs.ANSWER)
  own = [Settings(args.rate, args.steps, args.batch, args.beta, args.rank, args.zero, k) for k in range(args.seeds)]
  starts = [own[0]._replace(rate=rate, zero=zero) for zero in "ba" for rate in args.small_rates]
  with harness.progress(args.pretrain_steps + args.steps * len([*own, *starts]), "step", args.quiet) as bar:
    try:
      bar.set_description("the base")
      base, _ = pretraining.pretrain(model, data, args.pretrain_steps, 8, 3e-3, args.cache, bar.update)
      used = training.memory(model, base, data.train, own[0])
      assert used["arguments"] == used["base"] + used["rest"], used  # no second copy of the base
      bar.set_description("preferences")
      runs = [run(args, data, model, base, settings, bar.update) for settings in own]
      bar.set_description("starts")
      found = [run(args, data, model, base, settings, bar.update) for settings in starts]
    except KeyboardInterrupt:
      harness.say_interrupted(args.out / "runs")
    except ValueError as error:
      parser.error(str(error))
  counts = {"pairs": len(data.train.tokens), "validation_pairs": len(data.validation.tokens)}
  results = {**harness.provenance(args), **counts, "memory": used, "runs": runs, "starts": found}
  harness.publish(args, "dpo", results, tables.plot)
  print(tables.text(results))
  return results


if __name__ == "__main__":
  main()
