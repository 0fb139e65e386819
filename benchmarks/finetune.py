"""Adapts a pretrained ViT, or a convolutional network, to new digits: what do its head alone, LoRA and full fine-tuning
cost?
"""

import argparse
from collections.abc import Callable, Sequence
import functools
import os
from pathlib import Path
import statistics
import time
from typing import Any, NamedTuple

import digits
from digits import ConvNet, Model, Params, Split, ViT
from flax import serialization
import harness
import jax
import jax.numpy as jnp
import learning_rates
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
import methods
from methods import Method, Program
import numpy as np

import jaxlora

HERE = Path(__file__).resolve().parent
STEPS_PER_ROUND = 5  # timed in a row before the next method has its turn


# ----------------------------------------------------------------------------------------------------------------------
# The methods.

MODELS: dict[str, Callable[[], Model]] = {"vit": lambda: ViT(), "conv": lambda: ConvNet()}


def lora(model: Model, rank: int, lr: float, targets: str) -> Method:
  """Trains A and B of the targets, and the new head whole. 4 inputs of a patch, 1 channel: no room there for a rank."""
  config = jaxlora.LoraConfig(rank=rank, alpha=2 * rank, targets=targets, exclude="embed/kernel", train="head/.*")
  return methods.lora(config, lr, lambda params: model.apply({"params": params}, np.zeros((1, 8, 8), np.float32)))


def make_methods(model: Model, args: argparse.Namespace) -> list[Method]:
  """Every method of the comparison; raises ValueError, before any work, where the model cannot be adapted so."""
  rates = {name: getattr(args, f"lr_{name}") or rate for name, rate in learning_rates.DIGITS[args.model].items()}
  loras = [lora(model, rank, rates["lora"], args.targets) for rank in args.rank]
  params, key = jax.eval_shape(lambda: (digits.init(model, 0), jax.random.key(0)))
  for method in loras:
    tree = jax.eval_shape(lambda *args, method=method: method.join(*method.split(*args)), params, key)
    jax.eval_shape(jaxlora.wrap(model.apply, on_materialize="error"), {"params": tree}, jnp.zeros((1, 8, 8)))
  head = methods.whole("head alone", rates["head"], lambda module: module == "head")
  return [head, *loras, methods.whole("full fine-tuning", rates["full"], lambda module: True)]


# ----------------------------------------------------------------------------------------------------------------------
# Training and measuring one method.


class Setup(NamedTuple):
  """What all methods share."""

  model: Model
  pretrained: Params
  train: Split
  new: Split
  old: Split
  steps: int
  batch_size: int
  out: Path


def start(method: Method, pretrained: Params, seed: int) -> tuple[Any, Any]:
  """Both halves before the first step: the pretrained backbone with a head that this seed draws for the new digits."""
  head_key, adapter_key = jax.random.split(jax.random.key(seed))
  old = pretrained["head"]
  kernel = jax.nn.initializers.lecun_normal()(head_key, old["kernel"].shape, old["kernel"].dtype)
  head = {"kernel": kernel, "bias": jnp.zeros_like(old["bias"])}
  return method.split({**pretrained, "head": head}, adapter_key)


def compile_step(method: Method, setup: Setup, make_tx: Callable[[float, int], Any] = digits.adam) -> Program:
  """Compiles a method's step once, ahead of time: XLA counts its FLOPs, and all seeds run the same program."""
  apply = jaxlora.wrap(setup.model.apply, on_materialize="error")  # hands trees without adapters straight on
  tx = make_tx(method.lr, setup.steps)
  frozen, trainable = start(method, setup.pretrained, seed=0)
  step = digits.make_step(lambda frozen, trainable, x: apply({"params": method.join(frozen, trainable)}, x), tx)
  batch = next(digits.batches(setup.train, setup.batch_size, setup.steps, seed=0))
  return methods.compile_program(method, tx, step, frozen, trainable, batch)


def save(trainable: Any, path: Path) -> int:
  """Writes what was trained as a plain dict of arrays, and returns the size of the file."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(trainable)
  named = {jax.tree_util.keystr(place, simple=True, separator="/"): np.asarray(leaf) for place, leaf in leaves}
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(serialization.msgpack_serialize(named))
  return os.path.getsize(path)


def run(program: Program, setup: Setup, seed: int, tick: Callable[[int], Any]) -> dict[str, Any]:
  """Trains one method from one seed, saves what it trained, and returns what came of it."""
  method = program.method
  frozen, trainable = start(method, setup.pretrained, seed)
  opt_state = program.tx.init(trainable)
  for batch in digits.batches(setup.train, setup.batch_size, setup.steps, seed):
    trainable, opt_state, loss = program.step(trainable, opt_state, frozen, batch)
    tick(1)
  tree = method.join(frozen, trainable)
  tuned = jaxlora.merge(tree)  # plain parameters; without adapters the tree itself
  old_head = {"head": setup.pretrained["head"]}
  removed = digits.accuracy(setup.model, {**jaxlora.strip(tree), **old_head}, setup.old)
  return {
    "seed": seed,
    "new": digits.accuracy(setup.model, tuned, setup.new),
    "old": digits.accuracy(setup.model, {**tuned, **old_head}, setup.old),
    "old_removed": removed if frozen else None,  # full fine-tuning has overwritten what it came from
    "last_loss": float(loss),
    "adapter_file_bytes": save(
      trainable, setup.out / "adapters" / f"{method.name.replace(' ', '-')}-seed{seed}.msgpack"
    ),
  }


def step_ratios(
  programs: Sequence[Program], setup: Setup, rounds: int, tick: Callable[[int], Any]
) -> dict[str, dict[str, Any]]:
  """Step time over full fine-tuning's of the same round."""
  batch = next(digits.batches(setup.train, setup.batch_size, setup.steps, seed=0))
  runs = {}
  for program in programs:
    frozen, trainable = start(program.method, setup.pretrained, seed=0)
    runs[program.method.name] = functools.partial(program.step, trainable, program.tx.init(trainable), frozen, batch)
  return harness.ratios(harness.interleave(runs, rounds, STEPS_PER_ROUND, tick), over=programs[-1].method.name)


# ----------------------------------------------------------------------------------------------------------------------
# Results: kept as they come, then a table, JSON and a plot.


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
  """Mean and sample standard deviation over seeds; None where the figure does not exist."""
  known = [value for value in values if value is not None]
  if not known:
    return None
  return {"mean": statistics.fmean(known), "std": statistics.stdev(known) if len(known) > 1 else 0.0}


def summarize(program: Program, runs: list[dict[str, Any]], ratio: dict[str, Any], total: int) -> dict[str, Any]:
  """One row of the table, with the seeds behind it."""
  return {
    "method": program.method.name,
    "rank": program.method.rank,
    "learning_rate": program.method.lr,
    **{field: spread([run[field] for run in runs]) for field in ("new", "old", "old_removed")},
    "trainable_parameters": program.trainable,
    "trainable_share": program.trainable / total,
    "optimizer_bytes": program.optimizer_bytes,
    "adapter_file_bytes": runs[0]["adapter_file_bytes"],
    "step_over_full": ratio,
    "flops_per_step": program.flops,
    "seeds": runs,
  }


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head and the rows of the table."""

  def percent(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['mean']:.1%} ± {100 * value['std']:.1f}"

  head = ("method", "new digits", "old, kept", "old, removed", "trainable", "optimizer", "file", "step / full", "FLOPs")
  rows = []
  for row in results["methods"]:
    rows.append(
      (
        row["method"],
        *(percent(row[field]) for field in ("new", "old", "old_removed")),
        f"{row['trainable_parameters']:,} ({row['trainable_share']:.1%})",
        *(f"{row[field] / 1024:,.1f} KiB" for field in ("optimizer_bytes", "adapter_file_bytes")),
        harness.ratio_cell(row["step_over_full"]),
        f"{row['flops_per_step'] / 1e9:.3f} G",
      )
    )
  return [head, *rows]


def table(results: dict[str, Any]) -> str:
  """The rows for people."""
  head, *rows = cells(results)
  settings = results["settings"]
  return "\n".join(
    [
      harness.table(head, rows),
      f"Accuracy on the {settings['evaluate_on']} split: mean ± sample standard deviation, seeds:"
      f" {settings['seeds']}. The pretrained model has {results['pretrained']['old']:.1%} on the old digits.",
      "old, kept: the tuned backbone under the old head; old, removed: after the adapter is taken off again.",
      f"step / full: median (min-max) of {settings['rounds']} interleaved rounds. FLOPs: XLA's count for one step.",
    ]
  )


def tables(results: dict[str, Any]) -> str:
  """The table of benchmarks/README.md."""
  head, *rows = cells(results)
  pretrained = results["pretrained"]
  lines = (
    f"{pretrained['parameters']:,} parameters; the pretrained model has {pretrained['old']:.1%} on the old digits."
    f" {results['settings']['seeds']} seeds, mean ± sample standard deviation; {results['settings']['rounds']} rounds.",
    f"{harness.conditions(results)}.",
  )
  return "\n".join([*lines, "", harness.markdown(head, rows)])


def brief(results: dict[str, Any]) -> str:
  """The table of README.md: one rank, and what matters most."""
  head, *loras, full = results["methods"]
  shown = [head, *(row for row in loras if row["rank"] == 8), full]

  def percent(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['mean']:.1%}" + (f" ± {100 * value['std']:.1f}" if value["std"] else "")

  rows = [
    (
      row["method"],
      *(percent(row[field]) for field in ("new", "old", "old_removed")),
      f"{row['trainable_parameters']:,}",
      *(f"{row[field] / 1024:,.0f} KiB" for field in ("optimizer_bytes", "adapter_file_bytes")),
      f"{row['step_over_full']['median']:.2f}",
      f"{row['flops_per_step'] / full['flops_per_step']:.2f}",
    )
    for row in shown
  ]
  scores = ("new digits", "old digits kept", "adapter removed")
  return harness.markdown(("", *scores, "trained", "Adam's moments", "file", "step / full", "FLOPs / full"), rows)


def plot(results: dict[str, Any], path: Path) -> None:
  """Accuracy on the new and on the old digits over what had to be trained for it."""
  figure = Figure(figsize=(10, 4.4), layout="constrained")
  left, right = figure.subplots(1, 2, sharex=True)
  head, *loras, full = results["methods"]
  styles = [("head alone", "tab:gray", "s", [head]), ("LoRA", "tab:blue", "o", loras)]
  styles.append(("full fine-tuning", "tab:red", "D", [full]))
  for axes, field in ((left, "new"), (right, "old")):
    for label, color, marker, rows in styles:
      x = [row["trainable_parameters"] for row in rows]
      mean, std = ([100 * row[field][part] for row in rows] for part in ("mean", "std"))
      axes.errorbar(
        x, mean, std, label=label, color=color, marker=marker, markersize=7, capsize=4, linewidth=1, zorder=3
      )
    for row in loras:
      lowest = (row["trainable_parameters"], 100 * (row[field]["mean"] - row[field]["std"]))
      text = axes.annotate(f"r={row['rank']}", lowest, (0, -6), textcoords="offset points", ha="center", va="top")
      text.set(fontsize=9, zorder=4, path_effects=[withStroke(linewidth=3, foreground="white")])
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    axes.margins(x=0.12, y=0.15)
    axes.set_ylim(top=100 + 0.05 * (100 - axes.get_ylim()[0]))
  x, removed = ([row["trainable_parameters"] for row in loras], [100 * row["old_removed"]["mean"] for row in loras])
  right.plot(x, removed, "o", color="tab:blue", markerfacecolor="white", markersize=7, label="LoRA, adapter removed")
  right.axhline(100 * results["pretrained"]["old"], color="black", linestyle=":", linewidth=1, label="pretrained")
  left.set_title("New digits (5-9)")
  right.set_title("Old digits (0-4), under the old head")
  handles, labels = right.get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
  figure.savefig(path, dpi=150)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def make_parser() -> argparse.ArgumentParser:
  """The options; their defaults finish in well under 3 minutes on two CPU cores."""
  parser = harness.make_parser("finetune", __doc__, "--rank 4,8,16,32 --targets attention", rounds=21)
  count, rate = harness.positive(int), harness.positive(float)
  parser.add_argument("--model", choices=tuple(MODELS), default="vit", help="a transformer, or a convolutional network")
  parser.add_argument("--rank", type=harness.several(count), default="8", help="LoRA ranks, separated by commas")
  parser.add_argument("--targets", default="all-linear", help="all-linear, attention, or a regex over whole paths")
  parser.add_argument("--seeds", type=count, default=3, help="number of seeds: heads, factors and batches")
  parser.add_argument("--steps", type=count, default=150, help="steps of adaptation, for every method")
  parser.add_argument("--pretrain-steps", type=count, default=300, help="steps of pretraining on the old digits")
  parser.add_argument("--batch-size", type=count, default=32, help="images per step")
  for name in ("head", "lora", "full"):
    best = ", ".join(f"{rates[name]:g} for {model}" for model, rates in learning_rates.DIGITS.items())
    parser.add_argument(
      f"--lr-{name}", type=rate, help=f"peak learning rate; unless given the best on the validation split, {best}"
    )
  parser.add_argument(
    "--evaluate-on", choices=("test", "validation"), default="test", help="use validation to choose settings"
  )
  parser.add_argument(
    "--cache", type=harness.folder, default=HERE / ".cache", help="where pretrained parameters are kept"
  )
  parser.add_argument("--no-cache", action="store_true", help="pretrain anew and keep nothing")
  parser.add_argument("--fresh", action="store_true", help="forget the finished runs in --out")
  return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Checks the arguments and runs the comparison; returns what finetune.json holds."""
  parser = make_parser()
  args = harness.parse(parser, argv, seeds=1, steps=40, pretrain_steps=80, rounds=3)
  if args.model != "vit" and args.out == parser.get_default("out"):  # a result beside the other's, not over it
    args.out = args.out.with_name(f"{args.out.name}_{args.model}")
  model = MODELS[args.model]()
  try:
    everybody = make_methods(model, args)
    harness.check_writable(args.out, "--out")
    if not args.no_cache:
      harness.check_writable(args.cache, "--cache")
  except ValueError as error:
    parser.error(str(error))
  try:
    return compare(model, everybody, args)
  except KeyboardInterrupt:
    harness.say_interrupted(args.out)


def compare(model: Model, everybody: Sequence[Method], args: argparse.Namespace) -> dict[str, Any]:
  """Pretrains, trains and times every method, and writes what came of it."""
  begin = time.perf_counter()
  old, new = digits.load_task(0), digits.load_task(5)
  old_eval, new_eval = getattr(old, args.evaluate_on), getattr(new, args.evaluate_on)

  steps = args.pretrain_steps + len(everybody) * (args.seeds * args.steps + (args.rounds + 1) * STEPS_PER_ROUND)
  with harness.progress(steps, "step", args.quiet) as bar:
    bar.set_description("pretraining")
    cache = None if args.no_cache else args.cache
    pretrained, name = digits.pretrain(model, old.train, args.pretrain_steps, args.batch_size, cache, bar.update)
    setup = Setup(model, pretrained, new.train, new_eval, old_eval, args.steps, args.batch_size, args.out)

    programs = []
    for method in everybody:
      bar.set_description(f"compiling {method.name}")
      programs.append(compile_step(method, setup))

    kept = harness.Runs(args.out / "runs.json", args.fresh)
    decisive = {field: getattr(args, field) for field in ("steps", "batch_size", "evaluate_on")}
    decisive |= {"pretrained": name, "versions": harness.versions()}
    decisive["source"] = harness.source_digest(*(HERE / f"{name}.py" for name in ("digits", "finetune", "methods")))
    runs: dict[str, list[dict[str, Any]]] = {method.name: [] for method in everybody}
    for program in programs:
      for seed in range(args.seeds):
        bar.set_description(f"{program.method.name}, seed {seed}")
        key = harness.digest({**decisive, **program.method.settings, "seed": seed})
        if key in kept.found:
          bar.update(args.steps)
        else:
          kept.keep(key, run(program, setup, seed, bar.update))
        runs[program.method.name].append(kept.found[key])

    bar.set_description("timing")
    ratios = step_ratios(programs, setup, args.rounds, bar.update)
    bar.set_description("done")

  total = sum(leaf.size for leaf in jax.tree.leaves(pretrained))
  results = {
    "settings": harness.settings(args),
    "versions": harness.versions(),
    "hardware": harness.hardware(),
    "model": model.settings(),
    "pretrained": {"name": name, "parameters": total, "old": digits.accuracy(model, pretrained, old_eval)},
    "methods": [summarize(p, runs[p.method.name], ratios[p.method.name], total) for p in programs],
    "seconds": time.perf_counter() - begin,
  }
  harness.write(args.out / "finetune.json", results)
  plot(results, args.out / "finetune.png")
  print(table(results))
  return results


if __name__ == "__main__":
  main()
