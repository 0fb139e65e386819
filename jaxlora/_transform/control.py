"""Control flow, rebuilt with the public calls that made it. Traced weights are pytrees: those calls carry their parts.

Each function gives the results of the equation, then the handler's sums over the inner programs (`Transform.sums`).

Reading order: weights at the borders -> calls -> branches -> loops -> shard_map.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._jax.control_flow import Branches, Call, Jit, Remat, Scan, ShardMap, Structure, While, forwarded
from jaxlora._jax.jaxpr import open_jaxpr, specified_sharding
from jaxlora._jax.shortcut import SHORTCUTS
from jaxlora._transform.coded import Coded
from jaxlora._transform.coded_equations import coded_specs, placed
from jaxlora._transform.factored import TracedWeight, Unfactorable, weights_in
from jaxlora._transform.record import Record, Use
from jaxlora._weight.placement import factor_spec

# `(handler, equation, what it holds, operands) -> results`; the handler is a `Transform`.
Rebuild = Callable[[Any, Any, Any, Sequence[Any]], Sequence[Any]]


# ----------------------------------------------------------------------------------------------------------------------
# Weights at the borders.


def as_arrays(handler: Any, values: Sequence[Any], eqn: Any, what: str) -> list[Any]:
  """Results that must be arrays: weights among them are formed where they leave."""
  return [handler.materialized(value, eqn, f"it leaves {what} as a result") for value in values]


class Carry:
  """A loop's carry without the weights that only pass through it; what the body changes must be an array."""

  def __init__(self, handler: Any, eqn: Any, body: Any, constants: int, values: Sequence[Any]):
    passed = forwarded(body) if weights_in(values) else []
    kept = {k for k, value in enumerate(values) if isinstance(value, TracedWeight) and passed[k] == constants + k}
    reason = "a loop carries it and changes it"
    self.count = len(values)
    self.kept = {k: values[k] for k in kept}
    self.free = [handler.materialized(value, eqn, reason) for k, value in enumerate(values) if k not in kept]

  def pack(self, values: Sequence[Any]) -> list[Any]:
    """The values that the loop really carries."""
    return [value for k, value in enumerate(values) if k not in self.kept]

  def unpack(self, free: Sequence[Any], step: Any = None) -> list[Any]:
    """All values of the carry, in one step of the loop."""
    left = iter(free)
    return [at_step(self.kept[k], step) if k in self.kept else next(left) for k in range(self.count)]


def at_step(value: Any, step: Any) -> Any:
  """A weight inside one step of a loop: every step has a dropout mask of its own."""
  if step is None or not isinstance(value, TracedWeight) or value.key is None:
    return value
  return value.replace(key=jax.random.fold_in(value.key, step))


def drops(values: Sequence[Any]) -> bool:
  """Whether some weight has dropout."""
  return any(w.key is not None for w in weights_in(values))


# ----------------------------------------------------------------------------------------------------------------------
# Calls.


class Inner(NamedTuple):
  """An inner jit, rebuilt, and what happened inside it: the weights there go by their place among its operands."""

  fn: Callable[..., list[Any]]
  record: Record


def _jit(handler: Any, eqn: Any, jit: Jit, values: Sequence[Any]) -> list[Any]:
  """Layers that are one jitted function stay one: it is rebuilt once for all weights of one structure."""
  record = handler.record
  if jit.name in SHORTCUTS and not drops(values):
    return list(SHORTCUTS[jit.name].factored(handler.called, values))
  anonymous = [_anonymous(record, k, value) for k, value in enumerate(values)]
  leaves, treedef = jax.tree.flatten(anonymous)
  own = (jit.name, tuple(jit.in_shardings), tuple(jit.out_shardings), tuple(sorted(jit.options.items())))
  key = (id(jit.jaxpr), own, record.looping, record.policy, treedef, tuple(jax.typeof(leaf) for leaf in leaves))
  if key not in record.jits:
    record.jits[key] = _rebuilt_jit(handler, jit)
  inner = record.jits[key]
  out = inner.fn(*anonymous)
  for use in inner.record.uses:
    _replay(record, use, values[int(use.path)])
  return [_renamed(value, values) for value in out]


def _anonymous(record: Record, k: int, value: Any) -> Any:
  """A weight without what tells it from others of its structure; its next uses have dropout masks of their own."""
  if not isinstance(value, TracedWeight):
    return value
  key = value.key
  if key is not None:
    key = jax.random.fold_in(jax.random.fold_in(key, record.products[value.path]), k)
  return value.replace(path=str(k), key=key)


def _renamed(value: Any, operands: Sequence[Any]) -> Any:
  """A weight that leaves the jit, with the path and the key that it has outside."""
  if not isinstance(value, TracedWeight):
    return value
  original = operands[int(value.path)]
  return value.replace(path=original.path, key=original.key)


def _replay(record: Record, use: Use, w: TracedWeight) -> None:
  """Notes for one weight what was noted when the jit around it was rebuilt."""
  here = next(filter(None, reversed(record.places)), "")
  use = dataclasses.replace(use, path=w.path, source=use.source or here)
  if use.factored:
    record.products[w.path] += 1
    record.uses.append(use)
  else:
    record.report(use, w.key is not None)


def _rebuilt_jit(handler: Any, jit: Jit) -> Inner:
  record = handler.record.of_inner_jit()
  inner = handler.inner(jit.jaxpr, record)

  def body(*args: Any) -> list[Any]:
    record.uses.clear()  # should JAX trace this again, it is still the same uses
    record.products.clear()
    out = inner(*(_pinned(*pair) for pair in zip(args, jit.in_shardings, strict=True)))
    count = len(jit.out_shardings)
    return [*(_pinned(*pair) for pair in zip(out[:count], jit.out_shardings, strict=True)), *out[count:]]

  return Inner(jax.jit(named(body, jit.name), compiler_options=jit.options or None), record)


def _pinned(value: Any, sharding: Any) -> Any:
  """The inner jit's own sharding of an operand or a result, where the user gave one."""
  sharding = specified_sharding(sharding)
  if sharding is None:
    return value
  if isinstance(value, TracedWeight):
    if isinstance(value.base, Coded):
      return value.replace(base=placed(value.base, sharding))
    return value.replace(base=lax.with_sharding_constraint(value.base, sharding))
  return lax.with_sharding_constraint(value, sharding)


def named(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
  """The function under the name that profiles show."""
  fn.__name__ = fn.__qualname__ = name
  return fn


def inlined(handler: Any, eqn: Any, call: Any, values: Sequence[Any]) -> list[Any]:
  """A call whose body is interpreted in its place."""
  del eqn
  return handler.inner(call.jaxpr)(*values)


def _remat(handler: Any, eqn: Any, remat: Remat, values: Sequence[Any]) -> list[Any]:
  del eqn
  if remat.backward and remat.prevent_cse:
    # The backward half of a remat: it was to keep the compiler from merging it with the forward half.
    values = lax.optimization_barrier(list(values))
  inner = handler.inner(remat.jaxpr)
  with handler.record.in_a_remat():
    return jax.checkpoint(inner, policy=remat.policy, prevent_cse=remat.prevent_cse)(*values)


# ----------------------------------------------------------------------------------------------------------------------
# Branches.


def _branches(handler: Any, eqn: Any, found: Branches, values: Sequence[Any]) -> list[Any]:
  index, *operands = values
  if isinstance(index, TracedWeight):
    raise Unfactorable("it decides which branch runs")
  kept = _alike_in_all_branches(found.branches, operands)

  def branch(jaxpr: Any) -> Callable[..., list[Any]]:
    inner = handler.inner(jaxpr)

    def run(*args: Any) -> list[Any]:
      out = inner(*args)
      arrays = as_arrays(handler, [None if k in kept else value for k, value in enumerate(out)], eqn, "a branch")
      return [out[k] if k in kept else array for k, array in enumerate(arrays)]

    return run

  branches = [branch(jaxpr) for jaxpr in found.branches]
  if not found.platforms:
    return lax.switch(index, branches, *operands)
  by_platform = {
    name: fn for names, fn in zip(found.platforms, branches, strict=True) for name in names or ("default",)
  }
  return lax.platform_dependent(*operands, **by_platform)


def _alike_in_all_branches(branches: Sequence[Any], operands: Sequence[Any]) -> set[int]:
  """Which results are weights of one structure whichever branch runs: those leave the branches factored."""
  ways = list(zip(*(forwarded(jaxpr) for jaxpr in branches), strict=True))

  def shape_of(k: int | None) -> Any:
    if k is None or not isinstance(operands[k], TracedWeight):
      return None
    leaves, treedef = jax.tree.flatten(operands[k])
    return treedef, *(jax.typeof(leaf) for leaf in leaves)

  found = [{shape_of(k) for k in way} for way in ways]
  return {k for k, shapes in enumerate(found) if len(shapes) == 1 and None not in shapes}


# ----------------------------------------------------------------------------------------------------------------------
# Loops.


def _scan(handler: Any, eqn: Any, scan: Scan, values: Sequence[Any]) -> list[Any]:
  first, last = scan.constants, scan.constants + scan.carries
  consts = values[:first]
  carry = Carry(handler, eqn, scan.jaxpr, scan.constants, values[first:last])
  xs = [_with_slices(handler, eqn, x) for x in values[last:]]
  runs = [x.along_first() if isinstance(x, TracedWeight) else (x, lambda here: here) for x in xs]
  steps = jnp.arange(scan.length) if drops(values) else None
  inner, results = handler.inner(scan.jaxpr), len(eqn.outvars) - scan.carries

  def body(free: Any, step_and_xs: Any) -> Any:
    step, here = step_and_xs
    here = [at_step(whole(x), step) for (_, whole), x in zip(runs, here, strict=True)]
    with handler.record.in_a_loop():
      out = inner(*(at_step(const, step) for const in consts), *carry.unpack(free, step), *here)
    new = as_arrays(handler, carry.pack(out[: scan.carries]), eqn, "a scan")
    ys = [_without_steps(handler, eqn, y) for y in out[scan.carries :]]
    return new, [y.replace(key=None) if isinstance(y, TracedWeight) else y for y in ys]

  loop = {"length": scan.length, "reverse": scan.reverse, "unroll": scan.unroll}
  free, ys = lax.scan(body, carry.free, (steps, [sliced for sliced, _ in runs]), **loop, **scan.options)
  by_path = {w.path: w.key for w in weights_in(values)}
  stacked = [y.replace(roles="s" + y.roles, key=by_path[y.path]) if isinstance(y, TracedWeight) else y for y in ys]
  return [*carry.unpack(free), *stacked[:results], *(jnp.sum(total, 0) for total in stacked[results:])]


def _with_slices(handler: Any, eqn: Any, x: Any) -> Any:
  """What a scan runs over: a quantised weight whose parts it cannot slice is formed ahead of it."""
  if not isinstance(x, TracedWeight) or not isinstance(x.base, Coded) or x.base.along_first() is not None:
    return x
  return handler.dequantized(x, eqn, "a scan runs over an axis along which its blocks run")


def _without_steps(handler: Any, eqn: Any, y: Any) -> Any:
  """A result that a scan stacks: a quantised weight of which more is put off than casts and scalars is formed."""
  if not isinstance(y, TracedWeight) or not isinstance(y.base, Coded):
    return y
  if y.base.moves:
    return y.replace(base=y.base.settled())
  return handler.dequantized(y, eqn, "a scan stacks what became of it")


def _while(handler: Any, eqn: Any, loop: While, values: Sequence[Any]) -> list[Any]:
  first, last = loop.condition_constants, loop.condition_constants + loop.body_constants
  condition_consts, body_consts = values[:first], values[first:last]
  carry = Carry(handler, eqn, loop.body, loop.body_constants, values[last:])
  condition, body = handler.inner(loop.condition), handler.inner(loop.body)
  counted = drops(values)

  def predicate(free: Any) -> Any:
    (holds,) = as_arrays(handler, condition(*condition_consts, *carry.unpack(free)), eqn, "a loop's condition")
    return holds

  def step(state: Any) -> Any:
    free, count = state
    at = count if counted else None
    with handler.record.in_a_loop():
      out = body(*(at_step(const, at) for const in body_consts), *carry.unpack(free, at))
    new = as_arrays(handler, carry.pack(out), eqn, "a loop")
    # Under vmap every element has a predicate of its own: those that are through keep what they have.
    going = predicate(free) if many else None
    return [_where(going, *pair) for pair in zip(new, free, strict=True)], count + 1 if counted else None

  (holds,) = open_jaxpr(loop.condition)[0].outvars
  many = bool(holds.aval.shape)
  start = (carry.free, jnp.zeros((), jnp.int32) if counted else None)
  free, _ = lax.while_loop(lambda state: jnp.any(predicate(state[0])), step, start)
  return carry.unpack(free)


def _where(going: Any, new: Any, old: Any) -> Any:
  """`new` where `going` holds, along the axes that lead both."""
  if going is None:
    return new
  return lax.select(lax.broadcast_in_dim(going, jnp.shape(new), tuple(range(going.ndim))), new, old)


# ----------------------------------------------------------------------------------------------------------------------
# shard_map.


def _shard_map(handler: Any, eqn: Any, found: ShardMap, values: Sequence[Any]) -> list[Any]:
  inner = handler.inner(found.jaxpr)

  def specs(value: Any, spec: Any) -> Any:
    """The specs of a weight's parts: each factor is split as the axes that it holds."""
    if not isinstance(value, TracedWeight):
      return spec
    key = None if value.key is None else jax.sharding.PartitionSpec()
    base = coded_specs(value.base, spec, found.mesh)
    return value.mapped(lambda factor, own: factor_spec(spec, value.roles, own), base=base, key=key)

  def split(value: Any, spec: Any) -> Any:
    """A quantised weight of which a device would hold a part of a block is formed ahead."""
    whole = isinstance(value, TracedWeight) and coded_specs(value.base, spec, found.mesh) is None
    return handler.dequantized(value, eqn, "a device would hold a part of a block of it") if whole else value

  values = [split(*pair) for pair in zip(values, found.in_specs, strict=True)]

  def body(*args: Any) -> tuple[Any, ...]:
    return tuple(as_arrays(handler, inner(*args), eqn, "a shard_map"))

  mapped = jax.shard_map(
    body,
    mesh=found.mesh,
    in_specs=tuple(specs(*pair) for pair in zip(values, found.in_specs, strict=True)),
    out_specs=tuple(found.out_specs),
    axis_names=found.axis_names,
    check_vma=found.check_vma,
  )
  return list(mapped(*values))


CONTROL: dict[type[Structure], Rebuild] = {
  Jit: _jit,
  Call: inlined,
  Remat: _remat,
  Branches: _branches,
  Scan: _scan,
  While: _while,
  ShardMap: _shard_map,
}
