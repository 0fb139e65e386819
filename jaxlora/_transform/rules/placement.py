"""Where a weight lies: on its devices, in which memory, and as which shard of it.

Reading order: constraints -> transfers -> shards.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jaxlora._base.memory import moved
from jaxlora._jax.jaxpr import varying_axes
from jaxlora._jax.primitives import GATHERS_OF_SHARDS, PERMUTATIONS, PLACEMENTS, RESHARDS, TRANSFERS
from jaxlora._transform.factored import TracedWeight, Unfactorable
from jaxlora._transform.rule import Op, only_weight, rule
from jaxlora._transform.rules.layout import args_with
from jaxlora._weight.placement import beside_base, factor_spec, put_on
from jaxlora._weight.roles import factor_axes

# ----------------------------------------------------------------------------------------------------------------------
# Constraints.


@rule(*RESHARDS)
def _mesh_cast(op: Op, args: Sequence[Any]) -> list[Any]:
  """Another place on the mesh, or another view of it: every part goes there, by the names of the axes it holds."""
  w = only_weight(args)
  target = op.params["dst_sharding"]

  def of_factor(factor, own):
    spec = factor_spec(target.spec, w.roles, own)
    return op.bind(factor, dst_sharding=jax.sharding.NamedSharding(target.mesh, spec))[0]

  return [w.mapped(of_factor, base=op.bind(w.base)[0])]


@rule(*PLACEMENTS)
def _base_only(op: Op, args: Sequence[Any]) -> list[Any]:
  """Where the weight lies: the base goes there, the factors are small and follow the compiler."""
  w = only_weight(args)
  return [w.replace(base=op.bind(w.base)[0])]


# ----------------------------------------------------------------------------------------------------------------------
# Transfers.


@rule(*TRANSFERS)
def device_put(op: Op, args: Sequence[Any]) -> list[Any]:
  """Other devices or another memory, of several arrays at once: the base goes where the weight goes.

  Factors follow to other devices and into the device's memory. The host's they leave to the base: it is large, and they
  train.
  """
  bases = op.bind(*(arg.base if isinstance(arg, TracedWeight) else arg for arg in args))

  def follow(w: Any, base: Any, target: Any) -> Any:
    return w.mapped(lambda factor, own: _sent(factor, target, w.roles, own), base=base)

  triples = zip(args, bases, op.params["devices"], strict=True)
  return [follow(arg, base, to) if isinstance(arg, TracedWeight) else base for arg, base, to in triples]


def _sent(factor: Any, target: Any, roles: str, own: str) -> Any:
  """A factor where a weight is sent."""
  target = getattr(target, "sharding", target)  # of a layout beside it
  if isinstance(target, jax.memory.Space):
    return factor if target == jax.memory.Space.Host else moved(factor, target)
  return put_on(factor, beside_base(target, roles, own) if isinstance(target, jax.sharding.Sharding) else target)


# ----------------------------------------------------------------------------------------------------------------------
# Shards, inside of `shard_map`.


@rule(*GATHERS_OF_SHARDS)
def _all_gather(op: Op, args: Sequence[Any]) -> list[Any]:
  """The shards of a weight put together along one axis: the factors that hold it are, the other one has no shards.

  Where the shards are stacked along a new axis, that is the axis of the factors that differ.
  """
  w = only_weight(args)
  axis, names = op.params["all_gather_dimension"], op.params["axis_name"]
  names = {*names} if isinstance(names, tuple) else {names}
  differing = {own for own in ("i", "o") if names & {*varying_axes(w.a if own == "i" else w.b)}}
  if not names & {*varying_axes(w.base)} or not differing:
    raise Unfactorable("the types do not say which of its factors differ between devices")
  roles = w.roles
  if not op.params["tiled"]:
    roles = roles[:axis] + ("s" if len(differing) > 1 else next(iter(differing))) + roles[axis:]
  holders = "io" if roles[axis] == "s" else roles[axis]
  if not differing <= {*holders} or (w.gain is not None and w.gained not in holders and _differs(w.gain, names)):
    raise Unfactorable("shards of a weight are put together whose other factor differs between devices, too")

  def gathered(factor, own):
    axes = factor_axes(roles, own)
    return op.bind(factor, all_gather_dimension=axes.index(axis))[0] if axis in axes else factor

  return [w.mapped(gathered, base=op.bind(*args_with(args, w.base))[0], roles=roles)]


def _differs(x: Any, names: set[Any]) -> bool:
  return bool(names & {*varying_axes(x)})


@rule(*PERMUTATIONS)
def _ppermute(op: Op, args: Sequence[Any]) -> list[Any]:
  """Weights that go from device to device: their parts go together; where none arrives all parts are zero."""
  w = only_weight(args)
  name, pairs = op.params["axis_name"], op.params["perm"]
  return [w.mapped(lambda factor, own: lax.ppermute(factor, name, pairs), base=op.bind(w.base)[0])]
