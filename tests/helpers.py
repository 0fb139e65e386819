"""Builders of functions with one kind of weight each, wrappers that put them into control flow, and the oracle.

Builders and wrappers register themselves; tests cross them and run the legal combinations. The oracle is brute force:
what a wrapped function gives on a combined tree, its original must give on the merged one.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import jaxlora


@dataclasses.dataclass(frozen=True)
class Case:
  """A function of parameters and data with at least one weight to adapt.

  `roles` says what the probe must find. Sizes differ, so that a shape in a jaxpr tells what it belongs to.
  """

  fn: Callable[..., Any]
  params: Any
  args: tuple[Any, ...]
  roles: dict[str, str]
  rank: int = 2
  told: bool = False  # the roles are given, where the probe would find others
  made: list[Any] = dataclasses.field(default_factory=list)  # the adapted tree, once made: many tests share it

  @property
  def config(self) -> jaxlora.LoraConfig:
    targets = lambda path, leaf: path in self.roles
    return jaxlora.LoraConfig(rank=self.rank, alpha=3, targets=targets, axes=self.roles if self.told else None)

  def adapted(self) -> Any:
    """The adapted tree with B away from zero, so that the adapter does something."""
    if not self.made:
      key = jax.random.key(7)
      self.made.append(trained(jaxlora.adapt(self.params, self.config, key, probe=lambda p: self.fn(p, *self.args))))
    return self.made[0]


def trained(tree: Any, seed: int = 11) -> Any:
  """A tree whose factors have moved, as if by training."""
  frozen, trainable = jaxlora.split(tree)
  leaves, treedef = jax.tree.flatten(trainable)
  moved = [np.asarray(leaf) + normal(seed + k, leaf.shape, leaf.dtype, 0.3) for k, leaf in enumerate(leaves)]
  return jaxlora.join(frozen, jax.tree.unflatten(treedef, [jnp.asarray(leaf) for leaf in moved]))


def normal(seed: int, shape: tuple[int, ...], dtype: Any, width: float = 1.0) -> np.ndarray:
  """Made by numpy: nothing to compile."""
  return (np.random.default_rng(seed).standard_normal(shape) * width).astype(dtype)


BUILDERS: dict[str, Callable[[Any], Case]] = {}
WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {}
FORWARD_ONLY = {"while"}  # no reverse mode through a loop of unknown length
NEEDS_FLOAT_DATA = {"grad", "jvp", "scan_carry"}


def builder(fn: Callable[[Any], Case]) -> Callable[[Any], Case]:
  BUILDERS[fn.__name__] = functools.cache(fn)
  return fn


def wrapper(fn: Callable[..., Any]) -> Callable[..., Any]:
  WRAPPERS[fn.__name__.rstrip("_")] = fn
  return fn


def plain(fn: Callable[..., Any], weight: tuple[int, ...], data: tuple[int, ...], roles: str, dtype: Any) -> Case:
  """A case with one array as its weight."""
  return Case(fn, {"w": array(1, weight, dtype)}, (array(2, data, dtype),), {"w": roles})


def array(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  return jnp.asarray(normal(seed, shape, dtype))


def linen(module: nn.Module, x: jax.Array, roles: dict[str, str], dtype: Any) -> Case:
  """A case with a Linen module's parameters."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  leaves, treedef = jax.tree.flatten(shapes)
  params = jax.tree.unflatten(treedef, [array(k, leaf.shape, dtype) for k, leaf in enumerate(leaves)])
  return Case(lambda p, x: module.apply({"params": p}, x), params, (x,), roles)


# ----------------------------------------------------------------------------------------------------------------------
# Matrices.


@builder
def dense(dtype):
  return plain(lambda p, x: x @ p["w"], (5, 7), (3, 4, 5), "io", dtype)


@builder
def left(dtype):
  return plain(lambda p, x: p["w"] @ x.T, (7, 5), (4, 5), "oi", dtype)


@builder
def left_of_batch(dtype):
  return plain(lambda p, x: jnp.einsum("oi,bit->bot", p["w"], x), (7, 5), (3, 5, 4), "oi", dtype)


@builder
def used_twice(dtype):
  return plain(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], (5, 5), (3, 5), "io", dtype)


@builder
def autoencoder(dtype):
  return plain(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, (5, 7), (3, 5), "io", dtype)


@builder
def scaled_and_cast(dtype):
  wide = jnp.float32 if dtype == jnp.bfloat16 else dtype
  return plain(
    lambda p, x: x.astype(wide) @ (-(p["w"].astype(wide) * jnp.asarray(0.5, wide)) / jnp.asarray(3, wide)),
    (5, 7),
    (3, 5),
    "io",
    dtype,
  )


@builder
def reshaped(dtype):
  return plain(lambda p, x: x @ p["w"].reshape(6, 5, 1, 7)[:, :, 0].reshape(30, 7), (2, 15, 7), (3, 30), "iio", dtype)


@builder
def qkv_split_after(dtype):
  def fn(p, x):
    q, k, v = jnp.split(x @ p["w"], 3, axis=-1)
    return jax.nn.softmax(q @ k.mT) @ v

  return plain(fn, (5, 21), (3, 4, 5), "io", dtype)


@builder
def qkv_split_before(dtype):
  def fn(p, x):
    q, k, v = (x @ part for part in jnp.split(p["w"], 3, axis=1))
    return jax.nn.softmax(q @ k.mT) @ v

  return plain(fn, (5, 21), (3, 4, 5), "io", dtype)


@builder
def rows_sliced(dtype):
  return plain(lambda p, x: x @ p["w"][1:6, ::2] + x @ lax.rev(p["w"][-5:, :4], (0,)), (9, 7), (3, 5), "io", dtype)


# ----------------------------------------------------------------------------------------------------------------------
# More axes: attention, stacks, experts.


@builder
def dense_general(dtype):
  return linen(nn.DenseGeneral((2, 7), param_dtype=dtype), array(2, (3, 4, 5), dtype), {"kernel": "ioo"}, dtype)


@builder
def dense_general_two_inputs(dtype):
  return linen(
    nn.DenseGeneral(7, axis=(-2, -1), param_dtype=dtype), array(2, (3, 4, 5), dtype), {"kernel": "iio"}, dtype
  )


@builder
def attention(dtype):
  roles = {f"{name}/kernel": "iio" if name == "out" else "ioo" for name in ("query", "key", "value", "out")}
  module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=7, param_dtype=dtype)
  return linen(module, array(2, (3, 4, 5), dtype), roles, dtype)


@builder
def scanned_layers(dtype):
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return jnp.tanh(nn.Dense(5, param_dtype=dtype)(nn.Dense(7, param_dtype=dtype)(x))), None

  class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
      stacked = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
      return stacked(name="layers")(x, None)[0]

  roles = {"layers/Dense_0/kernel": "sio", "layers/Dense_1/kernel": "sio"}
  return linen(Layers(), array(2, (4, 5), dtype), roles, dtype)


@builder
def vmapped_layers(dtype):
  stacked = nn.vmap(nn.Dense, in_axes=0, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})
  return linen(stacked(7, param_dtype=dtype), array(2, (3, 4, 5), dtype), {"kernel": "sio"}, dtype)


@builder
def vmapped_convs(dtype):
  """JAX turns a stack of convolutions into one with feature groups: A is shared along the stack, B is not."""
  stacked = nn.vmap(nn.Conv, in_axes=0, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})
  return linen(stacked(7, (3,), param_dtype=dtype), array(2, (2, 3, 4, 5), dtype), {"kernel": "oiio"}, dtype)


@builder
def layer_picked(dtype):
  def fn(p, x):
    for k in range(3):
      x = jnp.tanh(x @ p["w"][k])
    return x

  return plain(fn, (3, 5, 5), (4, 5), "sio", dtype)


@builder
def experts_dispatched(dtype):
  return plain(lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]), (3, 5, 7), (3, 4, 5), "sio", dtype)


@builder
def experts_all(dtype):
  def fn(p, x):
    h = jax.nn.silu(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("tef,efd->td", h, p["down"])

  params = {"up": array(1, (3, 5, 7), dtype), "down": array(3, (3, 7, 5), dtype)}
  return Case(fn, params, (array(2, (4, 5), dtype),), {"up": "sio", "down": "sio"}, told=True)


@builder
def experts_stacked(dtype):
  def fn(p, x):
    h = jax.nn.silu(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("tef,efd->ted", h, p["down"]).sum(1)

  params = {"up": array(1, (3, 5, 7), dtype), "down": array(3, (3, 7, 5), dtype)}
  return Case(fn, params, (array(2, (4, 5), dtype),), {"up": "sio", "down": "sio"})


@builder
def experts_picked(dtype):
  def fn(p, x):
    chosen = p["w"][jnp.array([0, 2, 2, 1])]
    return jnp.einsum("ti,tio->to", x, chosen)

  return plain(fn, (3, 5, 7), (4, 5), "sio", dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Convolutions.


def conv_case(dtype, kernel, data, dims, **options):
  spatial = len(kernel) - 2
  options = {"window_strides": (1,) * spatial, "padding": "SAME"} | options
  fn = lambda p, x: lax.conv_general_dilated(x, p["w"], dimension_numbers=dims, **options)
  return plain(fn, kernel, data, "i" * (spatial + 1) + "o", dtype)


@builder
def conv_1d(dtype):
  return conv_case(dtype, (3, 4, 5), (2, 6, 4), ("NHC", "HIO", "NHC"))


@builder
def conv_2d_strided(dtype):
  return conv_case(dtype, (3, 2, 4, 5), (2, 7, 6, 4), ("NHWC", "HWIO", "NHWC"), window_strides=(2, 1), padding="VALID")


@builder
def conv_2d_dilated(dtype):
  return conv_case(dtype, (3, 2, 4, 5), (2, 7, 6, 4), ("NHWC", "HWIO", "NHWC"), rhs_dilation=(2, 1))


@builder
def conv_3d(dtype):
  return conv_case(dtype, (2, 3, 2, 3, 5), (1, 4, 4, 3, 3), ("NHWDC", "HWDIO", "NHWDC"))


@builder
def conv_channels_first(dtype):
  case = conv_case(dtype, (5, 4, 3, 2), (2, 4, 7, 6), ("NCHW", "OIHW", "NCHW"))
  return dataclasses.replace(case, roles={"w": "oiii"})


@builder
def conv_grouped(dtype):
  return conv_case(dtype, (3, 2, 6), (2, 7, 4), ("NHC", "HIO", "NHC"), feature_group_count=2)


@builder
def conv_depthwise(dtype):
  return conv_case(dtype, (3, 1, 4), (2, 7, 4), ("NHC", "HIO", "NHC"), feature_group_count=4)


@builder
def conv_transpose(dtype):
  roles = {"kernel": "iio"}
  return linen(nn.ConvTranspose(5, (3,), strides=(2,), param_dtype=dtype), array(2, (2, 4, 3), dtype), roles, dtype)


@builder
def conv_transpose_flipped(dtype):
  module = nn.ConvTranspose(5, (3, 2), strides=(2, 1), transpose_kernel=True, param_dtype=dtype)
  return linen(module, array(2, (2, 4, 4, 3), dtype), {"kernel": "iioi"}, dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Lookups.


@builder
def embed(dtype):
  params = {"w": array(1, (11, 5), dtype)}
  return Case(lambda p, ids: jnp.take(p["w"], ids, axis=0), params, (jnp.array([[1, 9, 1], [0, 10, 3]]),), {"w": "io"})


@builder
def embed_columns(dtype):
  params = {"w": array(1, (5, 11), dtype)}
  return Case(lambda p, ids: p["w"][:, ids].sum(0), params, (jnp.array([[1, 9, 1], [0, 10, 3]]),), {"w": "oi"})


@builder
def embed_tied(dtype):
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
      table = nn.Embed(11, 5, param_dtype=dtype)
      return table.attend(jnp.tanh(nn.Dense(5, param_dtype=dtype)(table(ids))))

  ids = jnp.array([[1, 9, 1], [0, 10, 3]])
  return linen(Tied(), ids, {"Embed_0/embedding": "io", "Dense_0/kernel": "io"}, dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Wrappers: each gives a function of the same arguments.


@wrapper
def alone(fn):
  return fn


@wrapper
def jit(fn):
  inner = jax.jit(lambda p, *args, twice: fn(p, *args) * 2 if twice else None, static_argnames="twice")
  return lambda p, *args: inner(p, *args, twice=True)


@wrapper
def scan(fn):
  """The weights are constants of a scan over two copies of the data, backwards."""

  def wrapped(p, *args):
    xs = jax.tree.map(lambda x: jnp.stack([x, x]), args)
    body = lambda total, here: (total + jnp.sum(fn(p, *here)), fn(p, *here))
    return lax.scan(body, jnp.zeros((), result(fn, p, args).dtype), xs, reverse=True, unroll=2)

  return wrapped


@wrapper
def scan_carry(fn):
  """The weights ride in the carry of a scan."""

  def wrapped(p, *args):
    def body(carry, _):
      p, total = carry
      return (p, total + jnp.sum(fn(p, *args))), None

    (_, total), _ = lax.scan(body, (p, jnp.zeros((), result(fn, p, args).dtype)), length=3)
    return total

  return wrapped


@wrapper
def remat(fn):
  return jax.checkpoint(fn, policy=jax.checkpoint_policies.dots_saveable)


@wrapper
def cond(fn):
  return lambda p, *args: lax.cond(jnp.size(args[0]) > 1, fn, lambda p, *args: -fn(p, *args), p, *args)


@wrapper
def switch(fn):
  branches = [lambda p, *args, k=k: k * fn(p, *args) for k in range(3)]
  return lambda p, *args: lax.switch(jnp.asarray(args[0].ndim, jnp.int32), branches, p, *args)


@wrapper
def while_(fn):
  def wrapped(p, *args):
    step = lambda state: (state[0] + 1, state[1] + fn(p, *args))
    out = result(fn, p, args)
    return lax.while_loop(lambda state: state[0] < 2, step, (0, jnp.zeros(out.shape, out.dtype)))[1]

  return wrapped


@wrapper
def vmap(fn):
  return lambda p, *args: jax.vmap(lambda x: fn(p, x))(jnp.stack([args[0], args[0][::-1]]))


@wrapper
def grad(fn):
  """The gradient with respect to the data is part of the function."""
  return lambda p, x: jax.grad(lambda x: jnp.sum(jnp.tanh(fn(p, x))))(x)


@wrapper
def jvp(fn):
  return lambda p, x: jax.jvp(lambda x: fn(p, x), (x,), (jnp.ones_like(x),))


@wrapper
def shard_map(fn):
  """Copies of the data on two devices, the weights on both."""

  def wrapped(p, *args):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec
    here = lambda p, x: fn(p, x[0])[None]
    mapped = jax.shard_map(here, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data"))
    return mapped(p, jnp.stack([args[0], args[0][::-1]]))

  return wrapped


def result(fn, p, args):
  return jax.eval_shape(fn, p, *args)


def legal(build: str, wrap: str) -> bool:
  return not (build.startswith("embed") and wrap in NEEDS_FLOAT_DATA - {"scan_carry"})


# ----------------------------------------------------------------------------------------------------------------------
# The oracle.


def loss_of(fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[Any], jax.Array]:
  """A scalar whose gradient reaches every element of the result with a weight of its own."""

  def loss(tree):
    out = jax.tree.leaves(fn(tree, *args))
    terms = [jnp.sum(y * normal(100 + k, y.shape, y.dtype)) for k, y in enumerate(out)]
    return jnp.sum(jnp.stack(terms).astype(terms[0].dtype))

  return loss


def oracle(fn: Callable[..., Any]) -> Callable[..., Any]:
  """What `wrap(fn)` must equal."""
  return lambda tree, *args: fn(jaxlora.merge(tree), *args)


def assert_close(got: Any, want: Any, tolerance: float) -> None:
  """Every leaf, relative to the largest element of the expected one."""
  got_leaves, got_def = jax.tree.flatten(got)
  want_leaves, want_def = jax.tree.flatten(want)
  assert got_def == want_def
  for x, y in zip(got_leaves, want_leaves, strict=True):
    assert x.dtype == y.dtype
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(float(np.abs(y).max(initial=0)), 1e-3))


TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 1e-5, jnp.bfloat16: 6e-2}


def check(
  fn: Callable[..., Any],
  tree: Any,
  args: tuple[Any, ...],
  tolerance: float,
  *,
  reverse: bool = True,
  on_materialize: str = "error",
) -> None:
  """Values and the gradients of every factor, factored against merged, in one compilation."""
  frozen, trainable = jaxlora.split(tree)
  tangent = jax.tree.map(lambda leaf: normal(5, leaf.shape, leaf.dtype), trainable)

  def values_and_gradients(f, frozen, trainable, args):
    loss = loss_of(f, args)
    of_factors = lambda trainable: loss(jaxlora.join(frozen, trainable))
    out = f(jaxlora.join(frozen, trainable), *args)
    if reverse:
      return out, jax.grad(of_factors)(trainable)
    return out, jax.jvp(of_factors, (trainable,), (tangent,))

  def both(frozen, trainable, args):
    wrapped = jaxlora.wrap(fn, on_materialize=on_materialize)
    return [values_and_gradients(f, frozen, trainable, args) for f in (wrapped, oracle(fn))]

  got, want = jax.jit(both)(frozen, trainable, args)
  assert_close(got, want, tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Reading jaxprs.


def equations(jaxpr: Any):
  """Every equation of a jaxpr and of those inside it."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in inner_jaxprs(eqn):
      yield from equations(inner)


def inner_jaxprs(eqn: Any):
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
        yield item


def weight_shaped_products(fn: Callable[..., Any], tree: Any, args: tuple[Any, ...]) -> list[str]:
  """Equations whose result depends on A and on B of a weight, but on no data: a delta, however it is laid out.

  Dependence is followed through inner jaxprs, too. Results of fewer elements than the weight do not count.
  """
  leaves, treedef = jax.tree.flatten((tree, args))
  kinds = jax.tree.leaves((jaxlora.labels(tree), jax.tree.map(lambda _: "data", args)))
  flat = lambda *leaves: jax.tree.leaves(fn(*_unpack(jax.tree.unflatten(treedef, leaves))))
  traced = jax.make_jaxpr(flat)(*leaves)
  found: list[str] = []

  def walk(jaxpr, inputs):
    consts = [frozenset({"data"}) if var.aval.shape else frozenset() for var in jaxpr.constvars]
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: frozenset() if hasattr(atom, "val") else env[atom]
    for eqn in jaxpr.eqns:
      kinds_in = [read(atom) for atom in eqn.invars]
      union = frozenset().union(*kinds_in)
      outs = [union] * len(eqn.outvars)
      inner = [getattr(item, "jaxpr", item) for item in inner_jaxprs(eqn)]
      for sub in inner:
        offset = len(kinds_in) - len(sub.invars)
        if offset >= 0:
          outs = walk(sub, kinds_in[offset:])
          outs = [*outs, *[union] * (len(eqn.outvars) - len(outs))][: len(eqn.outvars)]
      for var, kind in zip(eqn.outvars, outs, strict=True):
        env[var] = kind
        if {"a", "b"} <= kind and "data" not in kind and not inner:
          found.append(f"{eqn.primitive.name} -> {var.aval}")
    return [read(atom) for atom in jaxpr.outvars]

  walk(getattr(traced, "jaxpr", traced), [frozenset({kind}) for kind in kinds])
  return found


def _unpack(tree_and_args):
  tree, args = tree_and_args
  return (tree, *args)
