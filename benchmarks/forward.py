"""An adapter that is not merged adds next to nothing to a forward pass, on whole sequences and token by token.

Four ways to run the same adapted model: the base alone (the lower limit), the adapted tree under `wrap`, its merged
parameters, and merging within every call. Each runs on whole sequences, and on one token beside a cache of keys and
values.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import contestants
import harness
import jax
import jax.numpy as jnp
import models
import numpy as np
from settings import Base, Settings, add_sizes, make_base

import jaxlora

BASE, UNMERGED, MERGED, EVERY_CALL = "base", "jaxlora, unmerged", "jaxlora, merged", "merged in every call"


class Work(NamedTuple):
  """A forward pass: `fn(params, *args)` returns logits; `reach` is the ratio of unmerged to base to stay below."""

  title: str
  fn: Callable[..., jax.Array]
  args: tuple[Any, ...]
  reach: float


def whole_batch(base: Base) -> Work:
  """All tokens of the batch at once."""
  settings = base.settings
  title = f"forward, {settings.batch} x {settings.seq} tokens"
  return Work(title, lambda params, x: base.model.apply({"params": params}, x), (base.batch.x,), 1.05)


def one_token(base: Base) -> Work:
  """The next token of every sequence, halfway through the cache; updating the cache is part of it."""
  settings = base.settings
  model = base.model.clone(decode=True)
  start = jnp.int32(settings.seq // 2)
  cache = jax.tree.map(
    lambda leaf: jnp.full_like(leaf, start) if leaf.dtype == jnp.int32 else leaf,
    models.empty_cache(model, settings.batch),
  )

  def fn(params: Any, cache: Any, x: jax.Array, start: jax.Array) -> Any:
    return model.apply({"params": params, "cache": cache}, x, start=start, mutable=["cache"])

  title = f"decode, {settings.batch} x 1 token, cache of {settings.seq}"
  return Work(title, fn, (cache, base.batch.x[:, :1], start), 1.15)


def trained(tree: Any) -> Any:
  """The tree with random values added to its factors, so that B is not zero."""
  frozen, trainable = jaxlora.split(tree)
  leaves, structure = jax.tree.flatten(trainable)
  keys = jax.random.split(jax.random.key(3), len(leaves))
  moved = [leaf + 0.01 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
  return jaxlora.join(frozen, jax.tree.unflatten(structure, moved))


def compare(base: Base, work: Work, rounds: int, tick: Callable[[str], Any]) -> dict[str, Any]:
  """Times all ways to run one forward pass; the base taken twice is the A/A control."""
  tree = trained(contestants.adapt(base))
  merged = jax.jit(jaxlora.merge)(tree)
  wrapped = contestants.wrap(work.fn)
  ways = {
    BASE: (work.fn, base.params),
    UNMERGED: (wrapped, tree),
    MERGED: (work.fn, merged),
    EVERY_CALL: (lambda tree, *args: work.fn(jaxlora.merge(tree), *args), tree),
  }
  runs, figures = {}, {}
  for name, (fn, params) in ways.items():
    tick(f"compiling {name}")
    compiled = jax.jit(fn).lower(params, *work.args).compile()
    runs[name] = lambda compiled=compiled, params=params: compiled(params, *work.args)
    figures[name] = {
      "flops": None if base.settings.scan else compiled.cost_analysis()["flops"],
      "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
  difference = check_agrees(runs, base.settings.bf16)
  runs = harness.with_control(runs, BASE, runs[BASE])
  seconds = harness.interleave(runs, rounds, harness.calls_per_turn(runs), lambda _: tick(work.title))
  over_base, over_merged = harness.ratios(seconds, BASE), harness.ratios(seconds, MERGED)
  rows = {
    name: {
      "over_base": over_base[name],
      "over_merged": over_merged[name],
      "seconds": harness.summarize(seconds[name]),
      **figures[name],
    }
    for name in ways
  }
  control = over_base[BASE + harness.CONTROL]
  return {"title": work.title, "reach": work.reach, "control": control, "difference": difference, "rows": rows}


def check_agrees(runs: dict[str, Callable[[], Any]], bf16: bool) -> float:
  """The largest difference between unmerged and merged logits, over the largest logit.

  Raises:
    RuntimeError: if it is more than rounding, or if the adapter has no effect.
  """
  base, unmerged, merged = (
    np.asarray(jax.tree.leaves(runs[name]())[0], np.float32) for name in (BASE, UNMERGED, MERGED)
  )
  scale = np.abs(merged).max()
  difference, effect = float(np.abs(unmerged - merged).max() / scale), float(np.abs(base - merged).max() / scale)
  if difference > (5e-2 if bf16 else 1e-4) or effect < 1e-3:
    raise RuntimeError(f"unmerged and merged differ by {difference:.1e}, base and merged by {effect:.1e}")
  return difference


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def describe(comparison: dict[str, Any]) -> str:
  """One piece of work's table."""
  rows = []
  for name, row in comparison["rows"].items():
    ratios = (harness.ratio_cell(row[field]) for field in ("over_base", "over_merged"))
    rows.append((name, *ratios, harness.milliseconds(row["seconds"]), f"{row['temp_bytes'] / 1e6:,.1f} MB"))
  return "\n".join(
    [
      comparison["title"],
      harness.table(("forward", "/ base", "/ merged", "time", "temp"), rows),
      f"A/A control (the base again / the base): {harness.ratio_cell(comparison['control'])}."
      f" Unmerged and merged logits differ by {comparison['difference']:.1e} of the largest.",
    ]
  )


def tables(results: dict[str, Any]) -> str:
  """The table of benchmarks/README.md: a column for each forward pass."""
  comparisons = results["comparisons"]
  rows = [
    (name.removeprefix("jaxlora, "), *(harness.ratio_cell(one["rows"][name]["over_base"]) for one in comparisons))
    for name in (UNMERGED, MERGED, EVERY_CALL)
  ]
  rows.append(("A/A control", *(harness.ratio_cell(one["control"]) for one in comparisons)))
  head = ("time / base", *(one["title"] for one in comparisons))
  lines = f"{results['settings']['rounds']} rounds, medians (min-max). {harness.conditions(results)}."
  return f"{lines}\n\n{harness.markdown(head, rows)}"


def plot(results: dict[str, Any], path: Any) -> None:
  """A panel for each forward pass."""
  panels = []
  for comparison in results["comparisons"]:
    values = {name: row["over_base"] for name, row in comparison["rows"].items()}
    panels.append(harness.Panel(comparison["title"], "time / base", values, comparison["reach"]))
  harness.plot_bars(panels, path)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def make_parser() -> argparse.ArgumentParser:
  """The options."""
  parser = harness.make_parser(__file__, __doc__, "--batch 1 --bf16")
  harness.add_layers(parser)
  add_sizes(parser)
  return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what forward.json holds."""
  parser = make_parser()
  args = harness.parse(parser, argv, d=128, layers=2, rounds=3)
  settings = Settings.parse(parser, args)
  base = make_base(settings)
  works = [whole_batch(base), one_token(base)]
  with harness.progress(len(works) * (4 + 5 * (args.rounds + 1)), "turn", args.quiet) as bar:
    comparisons = [compare(base, work, args.rounds, harness.ticker(bar)) for work in works]
  results = {**harness.provenance(args), "title": settings.title(), "comparisons": comparisons}
  harness.publish(args, "forward", results, plot)
  print("\n\n".join(map(describe, comparisons)))
  return results


if __name__ == "__main__":
  main()
