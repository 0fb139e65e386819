"""What a training step communicates on a mesh: LoRA beside the frozen floor, full fine-tuning and Google's qwix.

Every step is compiled for eight devices from shapes and shardings alone, and nothing is run: the bytes are those of the
collectives in the program as XLA's CPU compiler has optimised it. A collective counts the bytes of its result on one
device, those in a loop as often as it runs.

The thin products' own share is a sum over the adapted kernels: A and B gathered once for each pass and their gradients
summed once, and `h` and its cotangent, (tokens, rank), summed once each. To reach is the floor and 1.1 of that share.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from pathlib import Path
import re
from typing import Any, NamedTuple

import contestants
from flax import linen as nn
from flax import traverse_util
import harness
import hlo
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import models
import numpy as np
from settings import Base, Settings, base_shapes, loss_of

import jaxlora

DEVICES = 8
Spec = tuple[Any, ...]


class Layout(NamedTuple):
  """A mesh, and what lies along its axes.

  Attributes:
    name: of the row.
    mesh: the sizes of its axes, by name.
    batch: spec of tokens, (batch, time).
    kernels: pattern of a parameter's path -> its spec, a scanned axis left out; the first that matches.
    between: spec of what goes from block to block, (batch, time, width); `None` leaves it to the compiler.
  """

  name: str
  mesh: Mapping[str, int]
  batch: Spec
  kernels: Mapping[str, Spec]
  between: Spec | None = None


def along(inputs: Any, outputs: Any) -> dict[str, Spec]:
  """Specs of all kernels: hidden and head axes along `outputs`, the axes of the residual stream along `inputs`."""
  return {
    "(query|key|value)/kernel": (inputs, outputs, None),
    "(query|key|value)/bias": (outputs, None),
    "out/kernel": (outputs, None, inputs),
    "mlp_in/kernel": (inputs, outputs),
    "mlp_in/bias": (outputs,),
    "mlp_out/kernel": (outputs, inputs),
    "embed/embedding": (outputs, inputs),
    "head/kernel": (inputs, outputs),
  }


LAYOUTS = (
  Layout("data", {"data": 8}, ("data",), {}),
  Layout("FSDP", {"data": 8}, ("data",), along("data", None), ("data",)),
  Layout("FSDP x TP", {"data": 4, "model": 2}, ("data",), along("data", "model"), ("data",)),
  Layout(
    "data x FSDP x TP",
    {"replica": 2, "data": 2, "model": 2},
    (("replica", "data"),),
    along("data", "model"),
    (("replica", "data"),),
  ),
  Layout("data x TP", {"data": 2, "model": 4}, ("data",), along(None, "model")),
  Layout("TP", {"model": 8}, (), along(None, "model")),
  Layout("2-D TP", {"x": 2, "y": 4}, (), along("x", "y")),
  Layout("sequence", {"time": 8}, (None, "time"), {}),
  Layout("data x sequence", {"data": 2, "time": 4}, ("data", "time"), {}),
  Layout("TP, Megatron's sequence", {"model": 8}, (), along(None, "model"), (None, "model", None)),
)


def mesh_of(layout: Layout, devices: Sequence[Any]) -> jax.sharding.Mesh:
  """The mesh of some devices."""
  shape = tuple(layout.mesh.values())
  return jax.sharding.Mesh(
    np.array(devices).reshape(shape), tuple(layout.mesh), axis_types=(AxisType.Auto,) * len(shape)
  )


def placed(layout: Layout, mesh: Any, params: Any) -> Any:
  """Shapes of parameters with shardings."""

  def one(path: Any, leaf: Any) -> Any:
    name = "/".join(key.key for key in path)
    spec = next((spec for pattern, spec in layout.kernels.items() if re.search(rf"(^|/){pattern}$", name)), ())
    stack = (None,) if name.startswith("blocks/") else ()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*stack, *spec)))

  return jax.tree_util.tree_map_with_path(one, params)


def apply_on(layout: Layout, mesh: Any, model: Any) -> Callable[..., Any]:
  """The model's apply function, with what goes from block to block where the layout wants it."""
  if layout.between is None:
    return model.apply
  sharding = NamedSharding(mesh, PartitionSpec(*layout.between))

  def constrained(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
    out = next_fn(*args, **kwargs)
    ends = isinstance(context.module, (models.Block, nn.Embed)) and context.method_name == "__call__"
    return jax.lax.with_sharding_constraint(out, sharding) if ends else out

  def apply(*args: Any) -> Any:
    with nn.intercept_methods(constrained):
      return model.apply(*args)

  return apply


# ----------------------------------------------------------------------------------------------------------------------
# Steps, by shapes alone.


class Step(NamedTuple):
  """A step that is not compiled yet: what it trains, what it does not, and `logits(trained, frozen, tokens)`."""

  logits: Callable[..., Any]
  trained: Any
  frozen: Any


def floor(base: Base, layout: Layout, mesh: Any, params: Any) -> Step:
  """Forward pass and gradient of the embedded input alone."""
  settings, apply = base.settings, apply_on(layout, mesh, base.model)
  shape = (settings.batch, settings.seq, settings.width)
  lies = NamedSharding(mesh, PartitionSpec(*layout.batch))
  eps = jax.ShapeDtypeStruct(shape, base.model.dtype, sharding=lies)
  return Step(lambda eps, params, x: apply({"params": params}, x, eps), eps, params)


def adapted(base: Base, params: Any) -> Any:
  """Shapes of an adapted tree, with factors where `adapt` puts them."""
  tokens = jnp.zeros((1, base.settings.seq), jnp.int32)
  config = jaxlora.LoraConfig(rank=base.settings.rank, alpha=base.settings.alpha, targets=models.TARGETS)
  probe = lambda params: base.model.apply({"params": params}, tokens)
  return jaxlora.adapt(params, config, jax.random.key(0), probe=probe)


def lora(base: Base, layout: Layout, mesh: Any, params: Any) -> Step:
  """jaxlora, with factors where `adapt` puts them."""
  return factored(base, layout, mesh, adapted(base, params))


def lora_replicated(base: Base, layout: Layout, mesh: Any, params: Any) -> Step:
  """jaxlora, with factors whole on every device."""
  tree = adapted(base, params)
  lies = jaxlora.sharding.specs(tree, mesh, replicated=True)
  moved = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return factored(base, layout, mesh, jax.tree.map(moved, tree, lies))


def factored(base: Base, layout: Layout, mesh: Any, tree: Any) -> Step:
  """A step of an adapted tree."""
  apply = jaxlora.wrap(apply_on(layout, mesh, base.model))
  frozen, trained = jaxlora.split(tree)
  return Step(lambda half, frozen, x: apply({"params": jaxlora.join(frozen, half)}, x), trained, frozen)


def full(base: Base, layout: Layout, mesh: Any, params: Any) -> Step:
  """Everything trains."""
  apply = apply_on(layout, mesh, base.model)
  return Step(lambda params, _, x: apply({"params": params}, x), params, None)


def qwix_lora(base: Base, layout: Layout, mesh: Any, params: Any) -> Step:
  """Google's qwix, whose factors lie nowhere of themselves: whole on every device."""
  import qwix

  sizes = base.settings
  modules = models.TARGETS.removesuffix("/kernel")
  provider = qwix.LoraProvider(module_path=modules, rank=sizes.rank, alpha=sizes.alpha)
  model = qwix.apply_lora_to_model(base.model, provider)
  made = jax.eval_shape(model.init, jax.random.key(2), jnp.zeros((1, sizes.seq), jnp.int32))["params"]
  whole = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
  flat = traverse_util.flatten_dict(made)
  factors = {path: whole(leaf) for path, leaf in flat.items() if path[-1].endswith(("_lora_a", "_lora_b"))}
  apply = apply_on(layout, mesh, model)
  return Step(lambda half, params, x: apply({"params": contestants.with_factors(params, half)}, x), factors, params)


STEPS = {"frozen floor": floor, "jaxlora": lora, "jaxlora, replicated": lora_replicated, "full fine-tuning": full}
if harness.installed("qwix"):
  STEPS["qwix"] = qwix_lora


def compiled(step: Step, layout: Layout, mesh: Any, settings: Settings) -> Any:
  """A step by plain gradient descent, which communicates nothing itself, compiled for a mesh."""

  def run(trained: Any, frozen: Any, x: Any, y: Any) -> Any:
    value, grads = jax.value_and_grad(lambda trained: loss_of(step.logits(trained, frozen, x), y))(trained)
    return jax.tree.map(lambda p, g: p - 1e-3 * g.astype(p.dtype), trained, grads), value

  lies = NamedSharding(mesh, PartitionSpec(*layout.batch))
  tokens = jax.ShapeDtypeStruct((settings.batch, settings.seq), jnp.int32, sharding=lies)
  out = jax.tree.map(lambda leaf: leaf.sharding, step.trained), NamedSharding(mesh, PartitionSpec())
  jitted = jax.jit(run, donate_argnums=0, out_shardings=out)
  return jitted.lower(step.trained, step.frozen, tokens, tokens).compile()


def thin_bytes(base: Base, params: Any) -> int:
  """The thin products' own share; see the top of this file."""
  settings, total = base.settings, 0
  for path, kernel in models.adapted_kernels(params).items():
    stack, size_in, size_out = models.matrix_shape(path, kernel.shape)
    factors = 3 * (size_in + size_out)
    total += math.prod(stack) * settings.rank * (factors + 2 * settings.batch * settings.seq)
  return total * jnp.dtype(base.model.dtype).itemsize


def measure(settings: Settings, layout: Layout, devices: Sequence[Any], names: Sequence[str], tick: Any) -> dict:
  """The figures of one mesh."""
  base, mesh = base_shapes(settings), mesh_of(layout, devices)
  params = placed(layout, mesh, base.params)
  found: dict[str, Any] = {}
  for name in names:
    program = compiled(STEPS[name](base, layout, mesh, params), layout, mesh, settings)
    kinds = hlo.communicated(program.as_text(), settings.layers)
    temp = program.memory_analysis().temp_size_in_bytes
    found[name] = {"bytes": sum(kinds.values()), "kinds": dict(kinds), "temp": temp}
    tick(name)
  floor_bytes, share = found["frozen floor"]["bytes"], thin_bytes(base, base.params)
  return {"steps": found, "thin": share, "reach": floor_bytes + 1.1 * share}


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def cells(rows: Mapping[str, Any]) -> list[tuple[str, ...]]:
  """The head of a table, then its rows."""
  names = list(next(iter(rows.values()))["steps"])
  table = [("mesh", *names, "to reach", *(f"temp, {name}" for name in names))]
  mega = lambda value: f"{value / 1e6:,.2f} MB"
  for name, row in rows.items():
    figures = [row["steps"][step] for step in names]
    line = [mega(figure["bytes"]) for figure in figures]
    table.append((name, *line, mega(row["reach"]), *(mega(figure["temp"]) for figure in figures)))
  return table


def describe(results: dict[str, Any]) -> str:
  """The tables, for a terminal."""
  parts = [f"{results['title']}. {NOT_RUN}."]
  for title, rows in results["settings"].items():
    head, *lines = cells(rows)
    parts += ["", title, harness.table(head, lines)]
  return "\n".join(parts)


def tables(results: dict[str, Any]) -> str:
  """The tables of benchmarks/README.md."""
  parts = [f"{results['title']}. {NOT_RUN}. {harness.conditions(results)}."]
  for title, rows in results["settings"].items():
    head, *lines = cells(rows)
    parts += [f"{title}:", harness.markdown(head, lines)]
  return "\n\n".join(parts)


def plot(results: dict[str, Any], path: Path) -> None:
  """Bytes over what is to be reached, a panel for each setting."""
  panels = []
  for title, rows in results["settings"].items():
    over = {name: row["steps"]["jaxlora"]["bytes"] / row["reach"] for name, row in rows.items()}
    values = {name: harness.summarize([ratio]) for name, ratio in over.items()}
    panels.append(harness.Panel(title, "jaxlora's bytes / to reach", values, 1.0))
  harness.plot_bars(panels, path)


# ----------------------------------------------------------------------------------------------------------------------
# The command.

NOT_RUN = "Bytes communicated in a step, per device; compiled, not run"
SETTINGS = {
  "unrolled": {},
  "scanned": {"scan": True},
  "scanned, remat": {"scan": True, "remat": True},
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what meshes.json holds."""
  parser = harness.make_parser(__file__, __doc__, "--layers 2 --only FSDP")
  harness.add_layers(parser)
  harness.add_sizes(parser)
  names = [layout.name for layout in LAYOUTS]
  parser.add_argument("--only", choices=names, action="append", help="one mesh; all unless given")
  parser.add_argument("--setting", choices=list(SETTINGS), action="append", help="one setting; all unless given")
  parser.add_argument("--step", choices=list(STEPS), action="append", help="beside floor and jaxlora; all unless given")
  args = harness.parse(parser, argv, layers=1, rounds=1)
  devices = jax.devices("cpu")[:DEVICES]
  if len(devices) < DEVICES:
    parser.error(f"found {len(devices)} CPU devices, expected {DEVICES}: set JAX_NUM_CPU_DEVICES={DEVICES}")
  layouts = [layout for layout in LAYOUTS if layout.name in (args.only or names)]
  steps = [name for name in STEPS if name in ("frozen floor", "jaxlora", *(args.step or STEPS))]
  chosen = args.setting or list(SETTINGS)
  found: dict[str, Any] = {}
  with harness.progress(len(chosen) * len(layouts) * len(steps), "step", args.quiet) as bar:
    for title in chosen:
      settings = Settings.parse(parser, args, **SETTINGS[title])
      rows = {one.name: measure(settings, one, devices, steps, harness.ticker(bar)) for one in layouts}
      found[title] = rows
  results = {**harness.provenance(args), "title": Settings.parse(parser, args).title(), "settings": found}
  harness.publish(args, "meshes", results, plot)
  print(describe(results))
  return results


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", DEVICES)
  main()
