"""Layout and scalar steps: each turns the weight into another array."""

import math

from hypothesis import strategies as st
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from tests._transform.fuzz.programs import MAX_AXES, MAX_SIZE, step


def draw_transpose(d):
  order = d.order(d.axes)
  d.roles = "".join(d.roles[k] for k in order)
  return (order,)


@step("layout", draw=draw_transpose)
def transpose(w, data, order):
  return lax.transpose(w, order)


def draw_reshape(d):
  """One reshape made of several moves; a strict one merges within a role."""
  shape, roles = list(d.shape), list(d.roles)
  for _ in range(d.draw(st.integers(1, 3))):
    kind = lambda k: "1" if shape[k] == 1 else roles[k]
    pairs = [
      k
      for k in range(len(shape) - 1)
      if not d.strict
      or kind(k) == kind(k + 1)
      or ("1" in (kind(k), kind(k + 1)) and d.usable((*shape[:k], 2, *shape[k + 2 :]), _merged(roles, kind, k)))
    ]
    composite = [k for k, n in enumerate(shape) if n > 3 and any(n % p == 0 for p in range(2, n))]
    moves = ["merge"] * bool(pairs) + ["split"] * bool(composite) + ["one"] * (len(shape) < MAX_AXES)
    if not moves:
      break
    move = d.draw(st.sampled_from(moves))
    if move == "merge":
      k = d.axis(pairs)
      roles = list(_merged(roles, kind, k))
      shape[k : k + 2] = [shape[k] * shape[k + 1]]
    elif move == "split":
      k = d.axis(composite)
      part = d.draw(st.sampled_from([p for p in range(2, shape[k]) if shape[k] % p == 0]))
      shape[k : k + 1], roles[k : k + 1] = [part, shape[k] // part], [roles[k]] * 2
    else:
      k = d.draw(st.integers(0, len(shape)))
      shape.insert(k, 1)
      roles.insert(k, "o")
  d.roles = "".join(roles)
  return (tuple(shape),)


def _merged(roles, kind, k):
  return "".join([*roles[:k], roles[k + 1] if kind(k) == "1" else roles[k], *roles[k + 2 :]])


@step("layout", draw=draw_reshape)
def reshape(w, data, shape):
  return jnp.reshape(w, shape)


def draw_reshape_of_transposed(d):
  order = draw_transpose(d)[0]
  d.shape = tuple(d.shape[k] for k in order)
  return (order, *draw_reshape(d))


@step("layout", draw=draw_reshape_of_transposed)
def reshape_of_transposed(w, data, order, shape):
  return lax.reshape(w, shape, order)


def can_squeeze(d):
  return [
    k for k in d.axes if d.shape[k] == 1 and d.usable((*d.shape[:k], *d.shape[k + 1 :]), d.roles[:k] + d.roles[k + 1 :])
  ]


def draw_squeeze(d):
  k = d.axis(can_squeeze(d))
  d.roles = d.roles[:k] + d.roles[k + 1 :]
  return (k,)


@step("layout", can_squeeze, draw_squeeze)
def squeeze(w, data, k):
  return lax.squeeze(w, (k,))


def draw_expand(d):
  k = d.draw(st.integers(0, len(d.shape)))
  d.roles = d.roles[:k] + "o" + d.roles[k:]
  return (k,)


@step("layout", lambda d: len(d.shape) < MAX_AXES, draw_expand)
def expand_dims(w, data, k):
  return jnp.expand_dims(w, k)


def draw_broadcast(d):
  """A new axis; where roles do not count, axes of size 1 grow, too."""
  shape = [n if n > 1 or d.strict else d.one_of(1, 3) for n in d.shape]
  k = d.draw(st.integers(0, len(shape)))
  shape.insert(k, d.draw(st.integers(1, 3)))
  places = tuple(j for j in range(len(shape)) if j != k)
  d.roles = d.roles[:k] + "o" + d.roles[k:]
  return tuple(shape), places


@step("layout", lambda d: len(d.shape) < MAX_AXES and math.prod(d.shape) < MAX_SIZE / 27, draw_broadcast)
def broadcast_in_dim(w, data, shape, places):
  return lax.broadcast_in_dim(w, shape, places)


def draw_slice(d):
  starts = tuple(d.draw(st.integers(0, n - 1)) for n in d.shape)
  limits = tuple(d.draw(st.integers(start + 1, n)) for start, n in zip(starts, d.shape, strict=True))
  return starts, limits, tuple(d.one_of(1, 1, 2, 3) for _ in d.shape)


@step("layout", draw=draw_slice)
def slice_(w, data, starts, limits, strides):
  return lax.slice(w, starts, limits, strides)


def draw_dynamic_slice(d):
  starts = tuple(d.one_of("traced", *range(-2, n + 2)) for n in d.shape)
  return starts, tuple(d.draw(st.integers(1, n)) for n in d.shape)


def batched(d):
  """Whether a batching rule may turn slices into gathers of parts, which a strict program must not have."""
  return d.strict and d.batched_weight


@step("layout", lambda d: d.shape and not batched(d), draw_dynamic_slice)
def dynamic_slice(w, data, starts, sizes):
  starts = [data["start"] if start == "traced" else jnp.int32(start) for start in starts]
  return lax.dynamic_slice(w, starts, sizes)


def draw_split(d):
  k = d.axis()
  first = d.draw(st.integers(1, max(1, d.shape[k] - 1)))
  sizes = tuple(n for n in (first, d.shape[k] - first) if n)
  return k, sizes, d.axis(range(len(sizes)))


@step("layout", lambda d: d.shape, draw_split)
def split(w, data, k, sizes, kept):
  return lax.split(w, sizes, k)[kept]


def draw_halves(d):
  k = d.axis([k for k in d.axes if d.shape[k] % 2 == 0])
  d.shape = (*d.shape[:k], d.shape[k] // 2, *d.shape[k + 1 :])
  return (k,)


@step("control", lambda d: any(n % 2 == 0 for n in d.shape), draw_halves)
def both_halves(following, w, data, k):
  """Both pieces of a split go the same way."""
  return [following(half, data) for half in jnp.split(w, 2, k)]


@step("layout", lambda d: d.shape, lambda d: (tuple(k for k in d.axes if d.draw(st.booleans())),))
def rev(w, data, dims):
  return lax.rev(w, dims)


@step("layout")
def neg(w, data):
  return -w


@step("layout", draw=lambda d: (d.one_of("traced", -0.5), d.one_of("left", "right")))
def mul(w, data, by, side):
  by = jnp.asarray(data["scale"] if by == "traced" else by, w.dtype)
  return by * w if side == "left" else w * by


@step("layout", draw=lambda d: (d.one_of("traced", -1.5),))
def div(w, data, by):
  return w / jnp.asarray(data["scale"] if by == "traced" else by, w.dtype)


IDENTITIES = {
  "copy": lambda w, data: jnp.array(w, copy=True),
  "name": lambda w, data: checkpoint_name(w, "weight"),
  "barrier": lambda w, data: lax.optimization_barrier((data["start"], w))[1],
  "barrier with a float": lambda w, data: lax.optimization_barrier((data["scale"], w))[1],
  "stop_gradient": lambda w, data: lax.stop_gradient(w),
}


# Beside a float that is differentiated, the barrier adds zeros to the weight's derivative: no strict program has that.
@step("layout", draw=lambda d: (d.one_of(*[name for name in IDENTITIES if not d.strict or "float" not in name]),))
def identity(w, data, name):
  return IDENTITIES[name](w, data)


@step("layout", draw=lambda d: (d.one_of("float32", "float64"),))
def cast(w, data, dtype):
  return w.astype(dtype)


@step("layout", lambda d: len(d.shape) > 1)
def out_of_jit(w, data):
  """The weight leaves a jit, laid out otherwise and back again."""
  w, scale = jax.jit(lambda w, scale: (jnp.flip(w.mT), scale), inline=False)(w, data["scale"])
  return jax.checkpoint(lambda w: jnp.flip(w).mT)(w) * jnp.asarray(scale, w.dtype)


def can_take(d):
  return [k for k in d.axes if not d.strict or d.kind(k) == "s"]


def draw_take(d, axes=can_take):
  """Ids of any shape, some out of bounds; along a stacked axis the result is a weight again."""
  k = d.axis(axes(d))
  shape = d.one_of((), (2,), (3,), (1, 2))
  mode = d.one_of("clip", "wrap", "fill", None, 0.5)
  n = d.shape[k]
  inside = mode in ("fill", None) and d.strict  # a NaN has to be hidden, and that takes an array
  ids = st.integers(0, n - 1) if inside else st.integers(-n - 1, n + 1)
  values = [d.draw(ids) for _ in range(math.prod(shape))]
  d.ids.append(np.reshape(values, shape).tolist())
  d.roles = d.roles[:k] + "s" * len(shape) + d.roles[k + 1 :]
  hidden = mode in ("fill", None) and any(not -n <= value < n for value in values)
  return len(d.ids) - 1, k, mode, hidden


@step("layout", lambda d: can_take(d) and len(d.shape) < MAX_AXES and math.prod(d.shape) < MAX_SIZE / 3, draw_take)
def take(w, data, number, axis, mode, hidden):
  if isinstance(mode, float):
    out = jnp.take(w, data["ids"][number], axis, mode="fill", fill_value=mode)
  else:
    out = jnp.take(w, data["ids"][number], axis, mode=mode)
  return jnp.where(jnp.isnan(out), jnp.asarray(0.5, out.dtype), out) if hidden else out


@jax.custom_jvp
def steeper(w):
  """An identity by name: the rule says otherwise, and must hold."""
  return w


steeper.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))
AS_ARRAY = {
  "own derivative": lambda w, data: steeper(w),
  "out of a branch": lambda w, data: lax.cond(data["which"] > 0, lambda w: w, lambda w: -w, w),
  "changed carry": lambda w, data: lax.scan(lambda w, _: (w * jnp.asarray(0.5, w.dtype), None), w, length=2)[0],
}


def loose(d):
  return not d.strict


@step("layout", loose, lambda d: (d.one_of(*AS_ARRAY),))
def as_array(w, data, name):
  """These need the weight as an array; what follows them is then no test of the rules."""
  return AS_ARRAY[name](w, data)
