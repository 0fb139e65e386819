"""Equations of coded values: rearranged by their parts, put off, computed with the array formed inside, or refused."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.memory import moved as moved_to
from jaxlora._jax.jaxpr import bind
from jaxlora._jax.primitives import IDENTITIES, PLACEMENTS, RESHARDS, TRANSFERS
from jaxlora._platform.policy import Policy
from jaxlora._quant.array import QuantizedArray
from jaxlora._transform.coded import ELEMENTWISE, Coded, product_with
from jaxlora._transform.moves import lookup_of, moved, moves_of

BILINEAR = ("dot_general", "conv_general_dilated", "ragged_dot_general")  # in their first two operands
# What is put off where parts do not follow.
LAYOUT = ("transpose", "squeeze", "reshape", "broadcast_in_dim", "slice", "dynamic_slice", "rev")
# What is done to codes where they rest; what else moves them fetches them first.
ON_THE_HOST = ("slice", "dynamic_slice", "squeeze", "split")


def bind_coded(
  eqn: Any,
  params: dict[str, Any],
  args: Sequence[Any],
  policy: Policy,
  looping: bool,
  form: Callable[[Coded, str], jax.Array],
) -> list[Any]:
  """The results of an equation of which some operand is a coded value: arrays, or coded values in turn.

  Args:
    eqn: the equation.
    params: its parameters, of which some may have been changed.
    args: its operands.
    policy: how codes become numbers.
    looping: whether it is inside the body of a loop.
    form: forms a value as one array, and says so, with the reason.
  """
  name = eqn.primitive.name
  if name in TRANSFERS:
    return [_sent(arg, target) for arg, target in zip(args, params["devices"], strict=True)]
  coded = [arg for arg in args if isinstance(arg, Coded)]
  out: list[Any] | None = None
  if len(coded) == 1:
    (w,) = coded
    if name in BILINEAR:
      return [_product(eqn, params, args, w, policy, looping)]
    out = _rearranged(eqn, params, args, w, policy)
  if out is not None:
    return out
  reason = f"no rule keeps codes through `{name}`"
  return bind(eqn, [form(arg, reason) if isinstance(arg, Coded) else arg for arg in args], **changed(eqn, params))


def changed(eqn: Any, params: dict[str, Any]) -> dict[str, Any]:
  """The parameters that are not those of the equation."""
  return {name: value for name, value in params.items() if eqn.params.get(name) is not value}


def _product(eqn: Any, params: dict[str, Any], args: Sequence[Any], w: Coded, policy: Policy, looping: bool) -> Any:
  weight_first = args[0] is w
  fn = Bound(eqn.primitive, tuple(sorted(params.items())), weight_first)
  return product_with(fn, args[1 if weight_first else 0], w, policy, looping, *args[2:])


@dataclasses.dataclass(frozen=True)
class Bound:
  """An equation of an input and a weight as a function of them and the rest: equal for equations that are alike."""

  primitive: Any
  given: tuple[tuple[str, Any], ...]
  weight_first: bool

  @property
  def params(self) -> dict[str, Any]:
    return dict(self.given)

  def __call__(self, x: Any, w: Any, *rest: Any) -> Any:
    return bind(self, (*((w, x) if self.weight_first else (x, w)), *rest))[0]


def _rearranged(eqn: Any, params: dict[str, Any], args: Sequence[Any], w: Coded, policy: Policy) -> list[Any] | None:
  """The results as coded values; `None` where the array has to be formed."""
  name = eqn.primitive.name
  if name not in (*ON_THE_HOST, *ELEMENTWISE):
    here = w.fetched()
    args, w = [here if arg is w else arg for arg in args], here
  if name in IDENTITIES:
    return [jax.tree.map(lambda part: bind(eqn, [part])[0], w)]
  if name == "transpose" and w.moves and policy.turns:
    return [w.turned(params["permutation"])]
  if name not in ELEMENTWISE:
    here = w.settled()
    args, w = [here if arg is w else arg for arg in args], here
  if name in PLACEMENTS:
    return [placed(w, params.get("sharding"))]
  if name in RESHARDS:
    return _resharded(eqn, params, w)
  if name in ELEMENTWISE:
    return [w.later(eqn, params, args)]
  if name == "gather" and args[0] is w and w.moves:
    move = lookup_of(params, args[1], w.shape)
    node = None if move is None else moved(w.node, move)
    return None if node is None else [w.moved(node)]
  if args[0] is not w or name not in (*LAYOUT, "split"):
    return None
  if w.moves and (moves := moves_of(name, params, args, w.shape)) is not None:
    nodes = [moved(w.node, move) for move in moves]
    if None not in nodes:
      return [w.moved(node) for node in nodes]
  return [w.later(eqn, params, args)] if name in LAYOUT else _split(eqn, params, w)


def _resharded(eqn: Any, params: dict[str, Any], w: Coded) -> list[Any] | None:
  """An array whose type is to say another sharding: each part lies along it; `None` where it has no such parts."""
  if not isinstance(w.node, QuantizedArray) or not w.moves:
    return None
  return [_each_along(w, params["dst_sharding"], lambda part, there: bind(eqn, [part], dst_sharding=there)[0])]


def _split(eqn: Any, params: dict[str, Any], w: Coded) -> list[Any]:
  """A split as slices that are put off."""
  axis, first = int(params["axis"]), 0
  out: list[Any] = []
  for size in params["sizes"]:
    cut = lambda x, first=first, size=size: lax.slice_in_dim(x, first, first + int(size), axis=axis)
    (equation,) = jax.make_jaxpr(cut)(w.like).eqns
    out.append(w.later(equation, dict(equation.params), [w]))
    first += int(size)
  return out


def placed(w: Coded, sharding: Any) -> Coded:
  """A coded value whose parts lie along its array, which is to lie so.

  All of them: of whole codes and scales in shards a compiler would form shards, and send floats.
  """
  if not isinstance(w.node, QuantizedArray) or not w.moves or sharding is None:
    return w
  w = w.settled()
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return w.moved(w.node.with_parts({"codes": lax.with_sharding_constraint(w.node.codes, sharding)}))
  return _each_along(w, sharding, lax.with_sharding_constraint)


def _sent(value: Any, target: Any) -> Any:
  """A value on other devices or in another memory; a coded one with all its parts, fetched where it is formed."""
  if isinstance(target, jax.memory.Space):
    return value if isinstance(value, Coded) and target == jax.memory.Space.Device else moved_to(value, target)
  if not isinstance(value, Coded) or target is None:
    return value if target is None else jax.device_put(value, target)
  if isinstance(target, jax.sharding.NamedSharding):
    return _each_along(value.settled(), target, jax.device_put)
  return jax.tree.map(lambda part: jax.device_put(part, target), value)


def _each_along(w: Coded, sharding: jax.sharding.NamedSharding, put: Callable[[Any, Any], Any]) -> Coded:
  """A coded value with each part put where its array is to lie, `put(part, its sharding)`; whole if blocks were cut."""
  sizes = dict(sharding.mesh.shape)

  def along(part: Any) -> Any:
    spec = spec_of_part(sharding.spec, jnp.shape(part), w.shape, sizes) or ()
    return put(part, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec)))

  return jax.tree.map(along, w)


def spec_of_part(spec: Any, part: Sequence[int], shape: Sequence[int], mesh: dict[Any, int]) -> tuple[Any, ...] | None:
  """How a part is partitioned where its array is so; `None` where a device would hold a part of a block."""
  if len(part) != len(shape):
    return None
  out: list[Any] = []
  for n, k, names in zip(shape, part, (*spec, *[None] * (len(shape) - len(spec))), strict=True):
    count = 1
    for name in names if isinstance(names, tuple) else (names,):
      count *= mesh.get(name, 1)  # neither nothing nor what is left to the compiler splits an axis
    if k == 1 != n:
      out.append(None)
    elif k % count:
      return None
    else:
      out.append(names)
  return tuple(out)


def coded_specs(w: Any, spec: Any, mesh: Any) -> Any:
  """The specs of the parts of a coded value inside of `shard_map`; `None` where a device would hold a part of a block.

  Any other value has the spec itself.
  """
  if not isinstance(w, Coded):
    return spec
  if not w.moves or w.scalars:
    return None
  if w.turn is not None:  # its parts lie in another order
    spec = [(*spec, *[None] * (w.ndim - len(spec)))[w.turn.index(d)] for d in range(w.ndim)]
  sizes, leaves = dict(mesh.shape), jax.tree.leaves(w)
  found = [spec_of_part(spec, jnp.shape(leaf), w.node.shape, sizes) for leaf in leaves]
  if any(each is None for each in found):
    return None
  specs = [jax.sharding.PartitionSpec(*each) for each in found if each is not None]
  return jax.tree.unflatten(jax.tree.structure(w), specs)
