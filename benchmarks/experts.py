"""A training step of sparse experts: the factors of all of them in few products, beside a product for each group.

Layers of a mixture: a router picks experts for each token, rows are put in the experts' order and meet theirs in three
grouped products (`jax.lax.ragged_dot`) each. Compared are the frozen model's step, LoRA's, LoRA's with thin products
that are grouped as the base's are (`tuning="none"`), and full fine-tuning's; all have the gradient of the input, too.
Times are measured in interleaved rounds, over the frozen model's.

With --chip the steps are compiled for a chip instead, from shapes alone, and nothing is run. A TPU's compiler gives no
cycles for grouped products in the forward pass, which are kernels there: those of the base are added at the chip's peak
to every row, any others are left out.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

from ahead import Target, compile_shapes
from chips import CHIPS, Chip, NoCompilerError, device_of, stay_on_the_host
import harness
from here import Step, compile_here, runs_of
import hlo
import jax
from jax import lax
import jax.numpy as jnp

import jaxlora

FLOOR, OURS, GROUPED, FULL = "frozen floor", "jaxlora", "jaxlora, grouped thin products", "full fine-tuning"
TARGETS = "gate|up|down"
Params = list[dict[str, Any]]


class Sizes(NamedTuple):
  """Of one comparison; `hidden` is an expert's."""

  width: int
  hidden: int
  experts: int
  top: int
  tokens: int
  layers: int
  rank: int
  dtype: Any

  def title(self) -> str:
    """Its description in tables."""
    return (
      f"{self.layers} layers of {self.experts} experts, {self.top} for each of {self.tokens:,} tokens,"
      f" d={self.width}, {self.hidden} hidden, rank {self.rank}, {jnp.dtype(self.dtype).name}"
    )

  def grouped_flops(self) -> int:
    """Of the base's products, forward and back to the input; each row with the one expert that it meets."""
    return 2 * 2 * 3 * self.layers * self.tokens * self.top * self.width * self.hidden


# ----------------------------------------------------------------------------------------------------------------------
# The model and its steps.


def make(sizes: Sizes) -> tuple[Params, jax.Array]:
  """Parameters and a batch, drawn from fixed seeds."""
  shapes = {
    "router": (sizes.width, sizes.experts),
    "gate": (sizes.experts, sizes.width, sizes.hidden),
    "up": (sizes.experts, sizes.width, sizes.hidden),
    "down": (sizes.experts, sizes.hidden, sizes.width),
  }

  def layer(key: jax.Array) -> dict[str, jax.Array]:
    keys = jax.random.split(key, len(shapes))
    pairs = zip(keys, shapes.items(), strict=True)
    return {
      name: (jax.random.normal(key, shape) / shape[-2] ** 0.5).astype(sizes.dtype) for key, (name, shape) in pairs
    }

  *keys, last = jax.random.split(jax.random.key(0), sizes.layers + 1)
  return [layer(key) for key in keys], jax.random.normal(last, (sizes.tokens, sizes.width), sizes.dtype)


def model(params: Params, x: jax.Array, sizes: Sizes) -> jax.Array:
  """The layers, one after the other."""
  for p in params:
    scores, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), sizes.top)
    order = jnp.argsort(chosen.reshape(-1))
    groups, rows = jnp.bincount(chosen.reshape(-1), length=sizes.experts), x[order // sizes.top]
    h = jax.nn.silu(lax.ragged_dot(rows, p["gate"], groups)) * lax.ragged_dot(rows, p["up"], groups)
    y = lax.ragged_dot(h, p["down"], groups)[jnp.argsort(order)]
    x = x + jnp.einsum("tkd,tk->td", y.reshape(*chosen.shape, -1), scores)
  return x


def steps(sizes: Sizes, params: Params, x: jax.Array) -> dict[str, Step]:
  """The gradients of each contestant, by its name."""

  def loss(params: Params, x: jax.Array, apply: Callable[..., jax.Array]) -> jax.Array:
    return jnp.square(apply(params, x).astype(jnp.float32)).mean()

  fn = functools.partial(model, sizes=sizes)
  config = jaxlora.LoraConfig(rank=sizes.rank, targets=rf".*/({TARGETS})", axes={".*": "sio"})
  frozen, factors = jaxlora.split(jaxlora.adapt(params, config, jax.random.key(1)))

  def of_factors(tuning: str) -> Callable[..., Any]:
    wrapped = jaxlora.wrap(fn, tuning=tuning, on_materialize="error")
    return jax.grad(lambda factors, x, frozen: loss(jaxlora.join(frozen, factors), x, wrapped), (0, 1))

  return {
    FLOOR: Step(jax.grad(lambda x, params: loss(params, x, fn)), (x, params)),
    OURS: Step(of_factors("auto"), (factors, x, frozen)),
    GROUPED: Step(of_factors("none"), (factors, x, frozen)),
    FULL: Step(jax.grad(lambda params, x: loss(params, x, fn), (0, 1)), (params, x)),
  }


# ----------------------------------------------------------------------------------------------------------------------
# Figures.


def compare_for(target: Target, sizes: Sizes, tick: Callable[[str], Any]) -> dict[str, Any]:
  """What a chip's compiler says of each step."""
  made = jax.eval_shape(lambda: make(sizes))
  rows = {}
  for name, one in steps(sizes, *made).items():
    tick(f"compiling {name}")
    rows[name] = figures(compile_shapes(target, one.step, one.args, ()), target.chip, sizes)
  return {"rows": rows, "chip": target.chip.name}


def figures(compiled: Any, chip: Chip, sizes: Sizes) -> dict[str, Any]:
  """The compiler's figures of a step."""
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  found = {"flops": cost["flops"], "bytes": cost["bytes accessed"], "temp": memory.temp_size_in_bytes}
  if chip.clock is not None and chip.platform == "tpu":
    at_peak = sizes.grouped_flops() / chip.flops * chip.clock
    found["cycles"] = hlo.cycles(compiled.as_text(), 1) + round(at_peak)
  return found


def compare(sizes: Sizes, rounds: int, tick: Callable[[str], Any]) -> dict[str, Any]:
  """Times of each step on this host, and the compiler's figures."""
  named = steps(sizes, *make(sizes))
  compiled = compile_here(named, tick)
  runs = runs_of(compiled, named)
  runs = harness.with_control(runs, FLOOR, runs[FLOOR])
  seconds = harness.interleave(runs, rounds, harness.calls_per_turn(runs), lambda calls: tick("timing"))
  over = harness.ratios(seconds, FLOOR)
  rows = {
    name: {
      "flops": one.cost_analysis()["flops"],
      "temp": one.memory_analysis().temp_size_in_bytes,
      "seconds": harness.summarize(seconds[name]),
      "over_floor": over[name],
    }
    for name, one in compiled.items()
  }
  return {"rows": rows, "control": over[FLOOR + harness.CONTROL], "chip": None}


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of the table, then its rows: all over the floor's."""
  rows = results["rows"]
  fields = [field for field in ("cycles", "temp", "bytes", "flops") if field in rows[FLOOR]]
  timed = results["chip"] is None
  table = [("step", *["time / floor", "time"] * timed, *(f"{field} / floor" for field in fields))]
  for name, row in rows.items():
    times = [harness.ratio_cell(row["over_floor"]), harness.milliseconds(row["seconds"])] if timed else []
    table.append((name, *times, *(harness.exact_cell(row[field] / rows[FLOOR][field]) for field in fields)))
  return table


def remark(results: dict[str, Any]) -> str:
  """What stands below the table."""
  if results["chip"]:
    return f"Compiled for {results['chip']}, not run: these are no times."
  return f"A/A control (the floor again / the floor): {harness.ratio_cell(results['control'])}"


def describe(results: dict[str, Any]) -> str:
  """The table, for a terminal."""
  return harness.described(results["title"], cells(results), remark(results))


def tables(results: dict[str, Any]) -> str:
  """The table of benchmarks/README.md."""
  conditions = f"{results['title']}. {harness.conditions(results, 'libtpu')}."
  return harness.documented(conditions, cells(results), remark(results))


def plot(results: dict[str, Any], path: Any) -> None:
  """Times, or a chip's cycles or bytes, over the floor's."""
  rows = results["rows"]
  if results["chip"] is None:
    field, values = "time", {name: row["over_floor"] for name, row in rows.items()}
  else:
    field = "cycles" if "cycles" in rows[FLOOR] else "bytes"
    values = {name: harness.summarize([row[field] / rows[FLOOR][field]]) for name, row in rows.items()}
  harness.plot_bars([harness.Panel(results["title"], f"{field} / floor", values, None)], path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what experts.json holds."""
  parser = harness.make_parser(__file__, __doc__, "--chip v5e:2x2 --bf16 --d 1024 --hidden 2048 --tokens 2048")
  harness.add_layers(parser)
  count = harness.positive(int)
  parser.add_argument("--d", type=count, default=256, help="the model's width (default: 256)")
  parser.add_argument("--hidden", type=count, default=512, help="an expert's width (default: 512)")
  parser.add_argument("--experts", type=count, default=8, help="experts of a layer (default: 8)")
  parser.add_argument("--top", type=count, default=2, help="experts that each token meets (default: 2)")
  parser.add_argument("--tokens", type=count, default=512, help="tokens of the batch (default: 512)")
  parser.add_argument("--rank", type=count, default=8, help="the adapter's (default: 8)")
  parser.add_argument("--bf16", action="store_true", help="parameters in bfloat16")
  parser.add_argument("--chip", choices=list(CHIPS), help="compile for this chip, and run nothing")
  args = harness.parse(parser, argv, d=64, hidden=128, tokens=64, layers=1, rounds=3)
  if args.top > args.experts:
    parser.error(f"--top {args.top}: there are {args.experts} experts")
  dtype = jnp.bfloat16 if args.bf16 else jnp.float32
  sizes = Sizes(args.d, args.hidden, args.experts, args.top, args.tokens, args.layers, args.rank, dtype)
  if args.chip is None:
    with harness.progress((args.rounds + 1) * 5 + 4, "turn", args.quiet) as bar:
      found = compare(sizes, args.rounds, harness.ticker(bar))
  else:
    harness.rename(parser, args, f"experts_{CHIPS[args.chip].short}_{args.experts}")
    stay_on_the_host()
    try:
      target = Target(CHIPS[args.chip], device_of(CHIPS[args.chip]))
    except NoCompilerError as error:
      parser.error(str(error))
    with harness.progress(4, "step", args.quiet) as bar:
      found = compare_for(target, sizes, harness.ticker(bar))
  results = {**harness.provenance(args), "title": sizes.title(), **found}
  if args.chip is not None:
    results["versions"] |= target.chip.versions()
  harness.publish(args, "experts", results, plot)
  print(describe(results))
  return results


if __name__ == "__main__":
  main()
