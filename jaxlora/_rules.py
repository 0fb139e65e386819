"""One rule per family of primitives: what an equation means for a weight that is `base + A B`.

A rule takes the equation as an `Op` and its operands, of which at least one is `Factored`, and returns the results,
which may be `Factored` in turn. What it cannot do in factored form it refuses with `Unfactorable` and a reason; the
transform then materialises. Rules are keyed by primitive names, and use public JAX alone.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora import _banked, _lowrank, _recompute
from jaxlora._axes import RANK, factor_axes, laid_along
from jaxlora._lowrank import Factored, Labelled, Pairing, Result, Shrink
from jaxlora._recompute import Recipe
from jaxlora._weight import wider_dtype


class Unfactorable(Exception):
  """Why an equation needs the weight as one array."""


class Op(NamedTuple):
  """An equation as its rule sees it."""

  name: str
  params: dict[str, Any]
  bind: Callable[..., list[Any]]  # the same primitive on other operands, its parameters the same but for those given
  result: Any  # the type of the equation's first result
  use: int  # how many products this weight went through before: picks its dropout mask
  recipe: Callable[[Any], Recipe | None]  # how to make an operand again in the backward pass
  recompute: bool  # whether the backward pass makes again what is cheap to make
  looping: bool  # whether the equation is inside the body of a loop
  h: Labelled | None  # a product's first half, where it was computed ahead
  took: Callable[[str], None]  # hears by which way a product of a mixed batch is computed


Rule = Callable[[Op, Sequence[Any]], list[Any]]
RULES: dict[str, Rule] = {}

# Rules whose result holds the product of the weight with something; the others only rearrange the weight.
PRODUCTS = ("dot_general", "conv_general_dilated", "gather")
# Rules that know weights with the factors of many adapters; the others get one whose factors are picked.
BANKED = ("dot_general", "convert_element_type", "reshape", "squeeze")


def rule(*names: str) -> Callable[[Rule], Rule]:
  def register(fn: Rule) -> Rule:
    RULES.update(dict.fromkeys(names, fn))
    return fn

  return register


def only_weight(args: Sequence[Any]) -> Factored:
  """The weight, where an equation takes it as its first operand and no other one."""
  w, *rest = args
  if not isinstance(w, Factored) or any(isinstance(arg, Factored) for arg in rest):
    raise Unfactorable("an adapted weight is used as an index or a parameter")
  return w


# ----------------------------------------------------------------------------------------------------------------------
# Layout: the axes of the weight move, and each factor follows with the axes it holds.


def restricted(w: Factored, own: str, per_axis: Sequence[Any], rank_entry: Any) -> list[Any]:
  """A per-axis parameter of the weight, cut down to the axes that a factor holds."""
  return [rank_entry if d == RANK else per_axis[d] for d in factor_axes(w.roles, own)]


@rule("transpose")
def _transpose(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  permutation = tuple(int(d) for d in op.params["permutation"])
  return [permuted(w, permutation, op.bind(w.base)[0])]


def permuted(w: Factored, permutation: Sequence[int], base: Any) -> Factored:
  """`w` with its axes in a new order; `base` is the base already in that order."""
  roles = "".join(w.roles[d] for d in permutation)

  def moved(factor, own):
    wanted = [d if d == RANK else permutation[d] for d in factor_axes(roles, own)]
    return Labelled(factor, factor_axes(w.roles, own)).ordered(wanted)

  return w.mapped(moved, base=base, roles=roles)


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
  """Splits a reshape into its smallest independent pieces: which old axes become which new ones."""
  groups: list[tuple[list[int], list[int]]] = []
  i = j = 0
  while i < len(old) or j < len(new):
    left: list[int] = []
    right: list[int] = []
    left_size = right_size = 1
    while True:
      if left_size == right_size and (left or right):
        break
      if left_size <= right_size and i < len(old):
        left_size *= old[i]
        left.append(i)
        i += 1
      elif j < len(new):
        right_size *= new[j]
        right.append(j)
        j += 1
      else:
        left_size *= old[i]
        left.append(i)
        i += 1
    groups.append((left, right))
  return groups


def regrouped_roles(roles: str, old: Sequence[int], new: Sequence[int]) -> str | None:
  """The roles after a reshape; `None` where it merges axes of different roles. Axes of size 1 fit any group."""
  out = ["o"] * len(new)
  for left, right in reshape_groups(old, new):
    real = {roles[d] for d in left if old[d] != 1}
    if len(real) > 1:
      return None
    role = real.pop() if real else (roles[left[0]] if left else "o")
    for d in right:
      out[d] = role
  return "".join(out)


@rule("reshape")
def _reshape(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  new = tuple(int(size) for size in op.params["new_sizes"])
  given = w.base
  if op.params.get("dimensions") is not None:  # a transposition first
    w = _lowrank.picked(w)
    w = permuted(w, op.params["dimensions"], lax.transpose(w.base, op.params["dimensions"]))
  if 0 in new:
    raise Unfactorable("a reshape of nothing")
  roles = regrouped_roles(w.roles, w.shape, new)
  if roles is None:
    raise Unfactorable(f"a reshape from {w.shape} to {new} that merges axes of different roles ({w.roles!r})")
  return [reshaped(w, new, roles, op.bind(given)[0])]


def reshaped(w: Factored, shape: tuple[int, ...], roles: str, base: Any) -> Factored:
  """`w` reshaped where no group of axes mixes roles; axes of size 1 may change hands between the factors."""

  def sized(factor, own):
    bank, rank = factor.shape[: w.slot is not None], rank_of(w, factor)
    return lax.reshape(factor, (*bank, *(rank if d == RANK else shape[d] for d in factor_axes(roles, own))))

  return w.mapped(sized, base=base, roles=roles)


def rank_of(w: Factored, factor: jax.Array) -> int:
  """The size of the rank axis of one of its factors, behind a bank's and the stacked ones."""
  return factor.shape[(w.slot is not None) + w.roles.count("s")]


def with_roles(w: Factored, roles: str) -> Factored:
  """`w` with other roles for its axes of size 1, which lie in both factors as well as in either."""
  return w if roles == w.roles else reshaped(w, w.shape, roles, w.base)


@rule("squeeze")
def _squeeze(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  gone = {int(d) for d in op.params["dimensions"]}
  base = op.bind(w.base)[0]
  roles = "".join(role for d, role in enumerate(w.roles) if d not in gone)
  return [reshaped(w, base.shape, roles, base)]


@rule("broadcast_in_dim")
def _broadcast(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  shape = tuple(int(size) for size in op.params["shape"])
  source = {int(out): d for d, out in enumerate(op.params["broadcast_dimensions"])}
  # A new axis only B needs to hold: its contraction and its batching then cost what they cost the base.
  roles = "".join(w.roles[source[d]] if d in source else "o" for d in range(len(shape)))

  def spread(factor, own):
    before, after = factor_axes(w.roles, own), factor_axes(roles, own)
    sizes = tuple(rank_of(w, factor) if d == RANK else shape[d] for d in after)
    places = tuple(after.index(d if d == RANK else int(op.params["broadcast_dimensions"][d])) for d in before)
    return lax.broadcast_in_dim(factor, sizes, places)

  return [w.mapped(spread, base=op.bind(w.base)[0], roles=roles)]


@rule("slice")
def _slice(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  start, limit = op.params["start_indices"], op.params["limit_indices"]
  strides = op.params["strides"] or (1,) * len(start)

  def cut(factor, own):
    return lax.slice(
      factor,
      restricted(w, own, start, 0),
      restricted(w, own, limit, rank_of(w, factor)),
      restricted(w, own, strides, 1),
    )

  return [w.mapped(cut, base=op.bind(w.base)[0])]


@rule("dynamic_slice")
def _dynamic_slice(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  starts = args[1:]
  if len(starts) != len(w.roles):
    raise Unfactorable("a dynamic slice with dynamic sizes")

  def cut(factor, own):
    zero = jnp.zeros((), jnp.asarray(starts[0]).dtype)
    indices = restricted(w, own, starts, zero)
    sizes = restricted(w, own, op.params["slice_sizes"], rank_of(w, factor))
    # The primitive clamps its starts; negative ones were counted from the end before they came here.
    return lax.dynamic_slice(factor, indices, sizes, allow_negative_indices=False)

  return [w.mapped(cut, base=op.bind(*args_with(args, w.base))[0])]


def args_with(args: Sequence[Any], base: Any) -> list[Any]:
  """The operands with the base in the weight's place."""
  return [base if isinstance(arg, Factored) else arg for arg in args]


@rule("split")
def _split(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  axis, sizes = int(op.params["axis"]), [int(size) for size in op.params["sizes"]]
  bases = op.bind(w.base)

  def pieces(factor, own):
    axes = factor_axes(w.roles, own)
    return lax.split(factor, sizes, axis=axes.index(axis)) if axis in axes else [factor] * len(sizes)

  gains = [None] * len(sizes) if w.gain is None else pieces(w.gain, w.gained)
  parts = zip(bases, pieces(w.a, "i"), pieces(w.b, "o"), gains, strict=True)
  return [w.replace(base=base, a=a, b=b, gain=gain) for base, a, b, gain in parts]


@rule("rev")
def _rev(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  dimensions = {int(d) for d in op.params["dimensions"]}

  def reversed_(factor, own):
    return lax.rev(factor, [k for k, d in enumerate(factor_axes(w.roles, own)) if d in dimensions])

  return [w.mapped(reversed_, base=op.bind(w.base)[0])]


@rule("reduce_precision")
def _rounded(op: Op, args: Sequence[Any]) -> list[Any]:
  """A cast to a format that no dtype has: of the base, as with any cast the factors stay finer."""
  w = only_weight(args)
  return [w.replace(base=op.bind(w.base)[0])]


@rule("mesh_cast", "reshard")
def _mesh_cast(op: Op, args: Sequence[Any]) -> list[Any]:
  """Another place on the mesh, or another view of it: every part goes there, by the names of the axes it holds."""
  w = only_weight(args)
  target = op.params["dst_sharding"]
  spec = (*target.spec, *(None,) * (len(w.roles) - len(target.spec)))

  def of_factor(factor, own):
    names = jax.sharding.PartitionSpec(*restricted(w, own, spec, None))
    return op.bind(factor, dst_sharding=jax.sharding.NamedSharding(target.mesh, names))[0]

  return [w.mapped(of_factor, base=op.bind(w.base)[0])]


@rule("sharding_constraint")
def _base_only(op: Op, args: Sequence[Any]) -> list[Any]:
  """Where the weight lies: the base goes there, the factors are small and follow the compiler."""
  w = only_weight(args)
  return [w.replace(base=op.bind(w.base)[0])]


@rule("copy", "copy_p", "name", "stop_gradient", "pvary")
def _each(op: Op, args: Sequence[Any]) -> list[Any]:
  """Identities on one value: what they say of the weight holds of its parts."""
  w = only_weight(args)
  return [w.mapped(lambda factor, own: op.bind(factor)[0], base=op.bind(w.base)[0])]


@rule("optimization_barrier")
def _barrier(op: Op, args: Sequence[Any]) -> list[Any]:
  """An identity on several values at once: the parts of the weights take their places among them."""
  held = [arg.replace(key=None) if isinstance(arg, Factored) else arg for arg in args]
  parts, treedef = jax.tree.flatten(held)
  out = jax.tree.unflatten(treedef, op.bind(*parts))
  return [new.replace(key=arg.key) if isinstance(arg, Factored) else new for arg, new in zip(args, out, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# Linear in the weight: casts, signs and scalar factors.


@rule("convert_element_type")
def _cast(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  dtype = op.params["new_dtype"]
  if not jnp.issubdtype(dtype, jnp.inexact):
    raise Unfactorable(f"a cast to {jnp.dtype(dtype).name}")
  if w.slot is not None:  # of a bank only what is picked is cast
    return [w.replace(base=op.bind(w.base)[0])]
  return [w.mapped(lambda factor, own: _lowrank.beside(factor, dtype), base=op.bind(w.base)[0])]


@rule("neg")
def _neg(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  return [w.replace(base=op.bind(w.base)[0], b=-w.b)]


@rule("mul", "div")
def _scale(op: Op, args: Sequence[Any]) -> list[Any]:
  """Times or over a scalar. Only one factor takes it: the product is linear in each."""
  x, y = args
  w, scalar = (x, y) if isinstance(x, Factored) else (y, x)
  if isinstance(scalar, Factored) or jnp.ndim(scalar) != 0 or (op.name == "div" and w is y):
    raise Unfactorable("a product with something that is not a scalar")
  base = op.bind(*args_with(args, w.base))[0]
  b = op.bind(*args_with(args, w.b))[0]
  return [w.replace(base=base, b=b)]


# ----------------------------------------------------------------------------------------------------------------------
# Products: the base's own product, and beside it the two thin ones.


def matched_sizes(w: Factored, groups: Sequence[tuple[Sequence[int], str]]) -> Factored:
  """Gives axes of size 1 the roles that a product wants of them; `groups` holds (axes, wanted role)."""
  roles = list(w.roles)
  for axes, role in groups:
    for d in axes:
      if w.shape[d] == 1:
        roles[d] = role
  return with_roles(w, "".join(roles))


def meeting(params: dict[str, Any], w: Factored, weight_first: bool) -> tuple[Factored, Pairing]:
  """How a `dot_general` brings its input and a weight together, of which no axis of role `o` is contracted.

  Axes of both roles may not be contracted together; where only `o` axes are, the factors trade places.
  """
  (contract, batch) = params["dimension_numbers"]
  contracted, batched = (
    {int(d): int(k) for d, k in zip(*(pair if weight_first else pair[::-1]), strict=True)} for pair in (contract, batch)
  )
  pairing = Pairing(contracted, batched, weight_first, params["precision"])
  summed = {w.roles[d] for d in pairing.contracted if w.shape[d] != 1} - {"s"}
  if len(summed) > 1:
    raise Unfactorable(f"a contraction across roles {sorted(summed)} of a weight with roles {w.roles!r}")
  if not summed:
    if any(w.shape[d] != 1 for d in pairing.contracted) or not pairing.contracted:
      raise Unfactorable("a product that contracts neither the input axes nor the output axes of the weight")
    summed = {"i"}
  w = matched_sizes(w, [(tuple(pairing.contracted), next(iter(summed)))])
  return (w.flipped() if "o" in summed else w), pairing


@rule("dot_general")
def _dot_general(op: Op, args: Sequence[Any]) -> list[Any]:
  lhs, rhs = args
  if isinstance(lhs, Factored) and isinstance(rhs, Factored):
    raise Unfactorable("the product of two adapted weights")
  weight_first = isinstance(lhs, Factored)
  w, x = (lhs, rhs) if weight_first else (rhs, lhs)
  w, pairing = meeting(op.params, w, weight_first)
  recipe = op.recipe(x)
  if w.gain is not None and w.gained == "i":
    x, recipe = gained_before(x, w, pairing.input_labels(x.ndim)), None
  base = _base_product(op, x, w.base, pairing)
  if w.slot is not None:
    sharded = _lowrank.explicitly_sharded(x) or _lowrank.explicitly_sharded(base)
    op.took(way := _banked.GATHERED if sharded else _banked.way(jnp.shape(x), w, pairing))
    if way != _banked.GATHERED:
      delta = _banked.delta(x, w, pairing, base.dtype, way, op.looping)
      return [_lowrank.add(base, delta, op.looping)]
    w = _lowrank.picked(w)
  u, recipe = _lowrank.dropped(x, w, op.use, recipe)
  result = _lowrank.dot(u, w, pairing, base, recipe, op.looping, op.h)
  if w.gain is not None and w.gained == "o":
    result = gained_after(result, w, pairing.result_labels(x.ndim, len(w.roles)))
  return [result]


def gained_before(x: Any, w: Factored, labels: Sequence[Any]) -> Any:
  """The input of a product that contracts the axes over which the weight has a gain."""
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    raise Unfactorable("integers meet a weight along the axes that its variant scales")
  return _lowrank.gained(x, gain_along(w, labels, "leaves one free"))


def gained_after(result: Any, w: Factored, labels: Sequence[Any]) -> Any:
  """The result of a product times the weight's gain along its outputs."""
  return _lowrank.gained(result, gain_along(w, labels, "sums over one"))


def gain_along(w: Factored, labels: Sequence[Any], otherwise: str) -> jax.Array:
  """The weight's gain beside an array with these labels, which must have every axis of it."""
  axes = factor_axes(w.roles, w.gained)
  if set(axes) - {RANK} - set(labels):
    raise Unfactorable(f"of the axes along which its variant scales the weight, the product {otherwise}")
  return laid_along(w.gain, axes, labels)


def _base_product(op: Op, x: Any, base: Any, pairing: Pairing) -> Any:
  """The base's own product. Of a half-precision weight CPUs make a wider copy, which is not to be kept."""

  def product(base: Any, x: Any) -> Any:
    y = _lowrank.base_dot(x, base, pairing, op.result)
    return pairing.product(x, base, op.bind)[0] if y is None else y

  widened = base.dtype.itemsize == 2 and jax.default_backend() == "cpu" and not _lowrank.explicitly_sharded(x)
  if op.recompute and widened:
    return _recompute.late(lambda leaves, x: product(leaves[0], x), (base,), x)
  return product(base, x)


def first_half(eqn: Any, w: Factored, weight_first: bool, looping: bool) -> tuple[Shrink, Any] | None:
  """The first thin product of a `dot_general`, and its A, where it may be computed ahead of the rest; else `None`."""
  if w.key is not None or "s" in w.roles:
    return None
  try:
    w, pairing = meeting(eqn.params, w, weight_first)
  except Unfactorable:
    return None
  if w.gained == "i" and w.gain is not None:
    return None
  x, out = eqn.invars[1 if weight_first else 0].aval, eqn.outvars[0].aval
  if w.slot is not None:
    if _banked.way(x.shape, w, pairing) != _banked.GATHERED:
      return None
    w = _lowrank.picked(w)
  return _lowrank.shrinking(x, w, pairing, out.dtype, looping=looping), w.a


@rule("conv_general_dilated")
def _conv(op: Op, args: Sequence[Any]) -> list[Any]:
  """A convolution: A is a kernel of `rank` output features, and B acts on that axis alone.

  Where the kernel is used backwards (its `o` axis is contracted, as in the gradient of a convolution), B acts first and
  A is a kernel of `rank` input features. With feature groups every group has its own output features but shares A: the
  A kernel is laid out once per group.
  """
  x, w = args
  if not isinstance(w, Factored) or isinstance(x, Factored):
    raise Unfactorable("a convolution that has an adapted weight as its input")
  if op.params["batch_group_count"] != 1:
    raise Unfactorable("a convolution with batch groups")
  numbers, groups = op.params["dimension_numbers"], op.params["feature_group_count"]
  out_axis, in_axis, *spatial = numbers.rhs_spec
  if any(w.roles[d] == "o" for d in spatial if w.shape[d] != 1):
    w = w.flipped()
  backwards = w.roles[in_axis] == "o" and w.shape[in_axis] != 1 and w.roles[out_axis] != "o"
  thin = in_axis if backwards else out_axis  # the axis that B holds
  w = matched_sizes(w, [((thin,), "o"), ([d for d in range(len(w.roles)) if d != thin], "i")])
  if w.roles != "".join("o" if d == thin else "i" for d in range(len(w.roles))) or (backwards and groups > 1):
    raise Unfactorable(f"a convolution with {groups} feature groups and a kernel of roles {w.roles!r}")
  if w.gain is not None and (w.gained == "i" or backwards):
    raise Unfactorable("a convolution that contracts the axes along which its variant scales the weight")
  base = op.bind(x, w.base)[0]
  u, recipe = _lowrank.dropped(x, w, op.use, op.recipe(x))
  thin_result = Result(base.dtype, op.params["precision"], looping=op.looping)

  def convolve(u, a):
    kernel = jnp.moveaxis(a, 0, thin)
    dtype = wider_dtype(u.dtype, base.dtype)
    return lax.conv_general_dilated(
      u.astype(dtype),
      (jnp.concatenate([kernel] * groups, axis=thin) if groups > 1 else kernel).astype(dtype),
      window_strides=op.params["window_strides"],
      padding=op.params["padding"],
      lhs_dilation=op.params["lhs_dilation"],
      rhs_dilation=op.params["rhs_dilation"],
      dimension_numbers=numbers,
      feature_group_count=groups,
      precision=op.params["precision"],
    )

  if backwards:
    u = _along_features(u, Labelled(w.b, (RANK, "in")), numbers.lhs_spec[1], thin_result)
    return [_lowrank.add(base, convolve(u, w.a), op.looping)]
  h = _lowrank.first_product(convolve, u, w.a, recipe)
  feature = numbers.out_spec[1]
  grow = functools.partial(_per_group, groups=groups) if groups > 1 else _rank_to_features
  delta = grow(h, w.b, feature, result=thin_result)
  result = _lowrank.add(base, delta, op.looping)
  if w.gain is None:
    return [result]
  before, after = _around(result, feature)
  return [gained_after(result, w, [*before, thin, *after])]


def _around(array: Any, feature: int) -> tuple[list[Any], list[Any]]:
  """Labels for the axes before and after the feature axis."""
  labels: list[Any] = [("x", k) for k in range(array.ndim)]
  return labels[:feature], labels[feature + 1 :]


def _along_features(x: Any, matrix: Labelled, feature: int, result: Result) -> Any:
  """`x M^T` along one axis of `x`."""
  before, after = _around(x, feature)
  out, summed = matrix.labels
  return _lowrank.contract(Labelled(x, (*before, summed, *after)), matrix, [summed], result).ordered(
    [*before, out, *after]
  )


def _rank_to_features(h: Any, b: Any, feature: int, result: Result) -> Any:
  """`h B` along one axis of `h`, all other axes flattened to one where they are adjacent."""
  before, after = _around(h, feature)
  flat = Labelled(h, (*before, RANK, *after)).merged(before).merged(after)
  out = _lowrank.second_product(flat, Labelled(b, (RANK, "out")), [RANK], result)
  return out.expanded().ordered([*before, "out", *after])


def _per_group(h: Any, b: Any, feature: int, groups: int, result: Result) -> Any:
  """`h B` along the feature axis, each group of `h` with its own slice of B's columns."""
  before, after = _around(h, feature)
  rank = b.shape[0]
  spread = h.reshape(*h.shape[:feature], groups, rank, *h.shape[feature + 1 :])
  columns = Labelled(b.reshape(rank, groups, -1), (RANK, "group", "out"))
  out = _lowrank.contract(Labelled(spread, (*before, "group", RANK, *after)), columns, [RANK], result)
  laid_out = out.ordered([*before, "group", "out", *after])
  return laid_out.reshape(*h.shape[:feature], b.shape[1], *h.shape[feature + 1 :])


def _moving_axis(op: Op, shape: Sequence[int]) -> int | None:
  """The one axis that a slice of whole other axes moves along, where a gather is written so: `vmap` of `w[k]`."""
  numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
  moving = [d for d in numbers.start_index_map if sizes[d] != shape[d]]
  clipped = op.params["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
  written_so = len(numbers.start_index_map) > 1 and len(moving) == 1 and sizes[moving[0]] == 1
  return moving[0] if written_so and clipped else None


def _batched_slice(op: Op, w: Factored, indices: Any, axis: int) -> list[Any]:
  """That slice as a lookup along its axis; the axis of size 1 that it keeps is put back afterwards."""
  numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
  k = numbers.start_index_map.index(axis)
  gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  offsets = dict(zip((d for d in range(len(sizes)) if d not in gone), numbers.offset_dims, strict=True))
  place = offsets.get(axis)
  if set(numbers.collapsed_slice_dims) - {axis}:
    raise Unfactorable("a gather of more than whole slices along one axis")
  simple = {
    "dimension_numbers": numbers._replace(
      offset_dims=tuple(o - (place is not None and o > place) for o in numbers.offset_dims if o != place),
      collapsed_slice_dims=(axis,),
      start_index_map=(axis,),
    )
  }
  lookup = op._replace(params=op.params | simple, bind=lambda *args: op.bind(*args, **simple))
  (out,) = _gather(lookup, [w, lax.slice_in_dim(indices, k, k + 1, axis=-1)])
  if place is None:
    return [out]
  if not isinstance(out, Factored):
    return [lax.expand_dims(out, (place,))]
  base = lax.expand_dims(out.base, (place,))
  return [reshaped(out, base.shape, out.roles[:place] + "s" + out.roles[place:], base)]


@rule("gather")
def _gather(op: Op, args: Sequence[Any]) -> list[Any]:
  """A lookup along one axis: `take(W, ids) = take(base, ids) + take(A, ids) B` for an axis of role `i`."""
  w = only_weight(args)
  indices = args[1]
  if (moving := _moving_axis(op, w.shape)) is not None:
    return _batched_slice(op, w, indices, moving)
  numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
  batching = tuple(numbers.operand_batching_dims)
  looked_up = tuple(numbers.start_index_map)
  if len(looked_up) != 1 or tuple(numbers.collapsed_slice_dims) != looked_up or sizes[looked_up[0]] != 1:
    raise Unfactorable("a gather of more than whole slices along one axis")
  axis = looked_up[0]
  whole = [d for d in range(len(w.roles)) if d != axis and d not in batching]
  if any(sizes[d] != w.shape[d] for d in whole):
    raise Unfactorable("a gather of parts of slices")
  if any(w.roles[d] != "s" for d in batching):
    raise Unfactorable("a gather batched over an axis that is not stacked")

  # Labels of the result: the gathered axes stand where offset_dims says, the index's own axes fill the rest in order.
  rank_of_result = len(numbers.offset_dims) + indices.ndim - 1
  offsets = dict(zip(numbers.offset_dims, whole, strict=True))
  index_labels: list[Any] = [("x", k) for k in range(indices.ndim - 1)]
  for d, k in zip(batching, numbers.start_indices_batching_dims, strict=True):
    index_labels[k] = d
  remaining = iter(index_labels)
  result_labels = [offsets[k] if k in offsets else next(remaining) for k in range(rank_of_result)]

  def looked_up_in(factor, own):
    """The factor's rows: index axes, then its own other axes; whole where it lacks the axis."""
    axes = factor_axes(w.roles, own)
    if axis not in axes:
      return Labelled(factor, axes)
    kept = [d for d in axes if d != axis and d not in batching]
    out = lax.gather(
      factor,
      indices,
      lax.GatherDimensionNumbers(
        offset_dims=tuple(range(len(index_labels), len(index_labels) + len(kept))),
        collapsed_slice_dims=(axes.index(axis),),
        start_index_map=(axes.index(axis),),
        operand_batching_dims=tuple(axes.index(d) for d in batching),
        start_indices_batching_dims=numbers.start_indices_batching_dims,
      ),
      slice_sizes=tuple(1 if d == axis or d in batching else factor.shape[k] for k, d in enumerate(axes)),
      mode=op.params["mode"],
      fill_value=0,  # out of bounds the base alone has the fill: the update is zero there, and so is its gradient
    )
    return Labelled(out, (*index_labels, *kept))

  base = op.bind(*args_with(args, w.base))[0]
  a, b = looked_up_in(w.a, "i"), looked_up_in(w.b, "o")
  if w.roles[axis] != "s":
    result = _lowrank.add(base, _lowrank.contract(a, b, [RANK], Result(base.dtype)).ordered(result_labels), op.looping)
    if w.gain is None:
      return [result]
    gain = looked_up_in(w.gain, w.gained)  # along the index's own axes where those are stacked
    return [_lowrank.gained(result, laid_along(gain.array, gain.labels, result_labels))]

  # Along a stacked axis the result is again a weight: which expert, which layer.
  roles = "".join("s" if isinstance(label, tuple) else w.roles[label] for label in result_labels)

  def laid_out(factor, own):
    return factor.ordered([d if d == RANK else result_labels[d] for d in factor_axes(roles, own)])

  gain = None if w.gain is None else laid_out(looked_up_in(w.gain, w.gained), w.gained)
  return [w.replace(base=base, a=laid_out(a, "i"), b=laid_out(b, "o"), gain=gain, roles=roles)]
