"""Builders: each makes a case, a function with one kind of weight; they register themselves in four families."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

import jaxlora
from tests.helpers.adapters import trained
from tests.helpers.arrays import array


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


BUILDERS: dict[str, Callable[[Any], Case]] = {}
FAMILIES: dict[str, list[str]] = {}


def builder(family: str) -> Callable[[Callable[[Any], Case]], Callable[[Any], Case]]:
  """Registers what makes a case of a dtype, as one of a family."""

  def register(fn):
    FAMILIES.setdefault(family, []).append(fn.__name__)
    BUILDERS[fn.__name__] = functools.cache(fn)
    return fn

  return register


def plain(fn: Callable[..., Any], weight: tuple[int, ...], data: tuple[int, ...], roles: str, dtype: Any) -> Case:
  """A case with one array as its weight."""
  return Case(fn, {"w": array(1, weight, dtype)}, (array(2, data, dtype),), {"w": roles})


def linen(module: nn.Module, x: jax.Array, roles: dict[str, str], dtype: Any) -> Case:
  """A case with a Linen module's parameters."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  leaves, treedef = jax.tree.flatten(shapes)
  params = jax.tree.unflatten(treedef, [array(k, leaf.shape, dtype) for k, leaf in enumerate(leaves)])
  return Case(lambda p, x: module.apply({"params": p}, x), params, (x,), roles)


# ----------------------------------------------------------------------------------------------------------------------
# Matrices.


@builder("matrices")
def dense(dtype):
  return plain(lambda p, x: x @ p["w"], (5, 7), (3, 4, 5), "io", dtype)


@builder("matrices")
def left(dtype):
  return plain(lambda p, x: p["w"] @ x.T, (7, 5), (4, 5), "oi", dtype)


@builder("matrices")
def left_of_batch(dtype):
  return plain(lambda p, x: jnp.einsum("oi,bit->bot", p["w"], x), (7, 5), (3, 5, 4), "oi", dtype)


@builder("matrices")
def used_twice(dtype):
  return plain(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], (5, 5), (3, 5), "io", dtype)


@builder("matrices")
def autoencoder(dtype):
  return plain(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, (5, 7), (3, 5), "io", dtype)


@builder("matrices")
def scaled_and_cast(dtype):
  wide = jnp.float32 if dtype == jnp.bfloat16 else dtype
  return plain(
    lambda p, x: x.astype(wide) @ (-(p["w"].astype(wide) * jnp.asarray(0.5, wide)) / jnp.asarray(3, wide)),
    (5, 7),
    (3, 5),
    "io",
    dtype,
  )


@builder("matrices")
def reshaped(dtype):
  return plain(lambda p, x: x @ p["w"].reshape(6, 5, 1, 7)[:, :, 0].reshape(30, 7), (2, 15, 7), (3, 30), "iio", dtype)


@builder("matrices")
def qkv_split_after(dtype):
  def fn(p, x):
    q, k, v = jnp.split(x @ p["w"], 3, axis=-1)
    return jax.nn.softmax(q @ k.mT) @ v

  return plain(fn, (5, 21), (3, 4, 5), "io", dtype)


@builder("matrices")
def qkv_split_before(dtype):
  def fn(p, x):
    q, k, v = (x @ part for part in jnp.split(p["w"], 3, axis=1))
    return jax.nn.softmax(q @ k.mT) @ v

  return plain(fn, (5, 21), (3, 4, 5), "io", dtype)


@builder("matrices")
def rows_sliced(dtype):
  return plain(lambda p, x: x @ p["w"][1:6, ::2] + x @ lax.rev(p["w"][-5:, :4], (0,)), (9, 7), (3, 5), "io", dtype)


@builder("matrices")
def outputs_in_chunks(dtype):
  """A large head, scanned over in chunks of its outputs: no result of all of them at once."""

  def fn(p, x):
    chunks = p["w"].reshape(5, 3, 7).transpose(1, 0, 2)
    return lax.map(lambda kernel: jax.nn.softmax(x @ kernel), chunks).sum(0)

  return plain(fn, (5, 21), (4, 5), "io", dtype)


@builder("matrices")
def inputs_in_chunks(dtype):
  def fn(p, x):
    step = lambda total, pair: (total + pair[0] @ pair[1], None)
    chunks = x.reshape(-1, 3, 5).transpose(1, 0, 2), p["w"].reshape(3, 5, 7)
    return lax.scan(step, jnp.tile(0 * x[:, :1], (1, 7)), chunks)[0]

  return plain(fn, (15, 7), (4, 15), "io", dtype)


@builder("matrices")
def outputs_in_dynamic_chunks(dtype):
  def fn(p, x):
    part = lambda k: jnp.tanh(x @ lax.dynamic_slice_in_dim(p["w"], 7 * k, 7, axis=1))
    return lax.fori_loop(0, 3, lambda k, total: total + part(k), jnp.tile(0 * x[:, :1], (1, 7)))

  return plain(fn, (5, 21), (4, 5), "io", dtype)


# ----------------------------------------------------------------------------------------------------------------------
# More axes: attention, stacks, experts.


@builder("stacks")
def dense_general(dtype):
  return linen(nn.DenseGeneral((2, 7), param_dtype=dtype), array(2, (3, 4, 5), dtype), {"kernel": "ioo"}, dtype)


@builder("stacks")
def dense_general_two_inputs(dtype):
  return linen(
    nn.DenseGeneral(7, axis=(-2, -1), param_dtype=dtype), array(2, (3, 4, 5), dtype), {"kernel": "iio"}, dtype
  )


@builder("stacks")
def attention(dtype):
  roles = {f"{name}/kernel": "iio" if name == "out" else "ioo" for name in ("query", "key", "value", "out")}
  module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=7, param_dtype=dtype)
  return linen(module, array(2, (3, 4, 5), dtype), roles, dtype)


@builder("stacks")
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


@builder("stacks")
def vmapped_layers(dtype):
  stacked = nn.vmap(nn.Dense, in_axes=0, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})
  return linen(stacked(7, param_dtype=dtype), array(2, (3, 4, 5), dtype), {"kernel": "sio"}, dtype)


@builder("stacks")
def vmapped_convs(dtype):
  """JAX turns a stack of convolutions into one with feature groups: A is shared along the stack, B is not."""
  stacked = nn.vmap(nn.Conv, in_axes=0, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})
  return linen(stacked(7, (3,), param_dtype=dtype), array(2, (2, 3, 4, 5), dtype), {"kernel": "oiio"}, dtype)


@builder("stacks")
def layer_picked(dtype):
  def fn(p, x):
    for k in range(3):
      x = jnp.tanh(x @ p["w"][k])
    return x

  return plain(fn, (3, 5, 5), (4, 5), "sio", dtype)


@builder("stacks")
def experts_dispatched(dtype):
  return plain(lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]), (3, 5, 7), (3, 4, 5), "sio", dtype)


@builder("stacks")
def experts_all(dtype):
  def fn(p, x):
    h = jax.nn.silu(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("tef,efd->td", h, p["down"])

  params = {"up": array(1, (3, 5, 7), dtype), "down": array(3, (3, 7, 5), dtype)}
  return Case(fn, params, (array(2, (4, 5), dtype),), {"up": "sio", "down": "sio"}, told=True)


@builder("stacks")
def experts_stacked(dtype):
  def fn(p, x):
    h = jax.nn.silu(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("tef,efd->ted", h, p["down"]).sum(1)

  params = {"up": array(1, (3, 5, 7), dtype), "down": array(3, (3, 7, 5), dtype)}
  return Case(fn, params, (array(2, (4, 5), dtype),), {"up": "sio", "down": "sio"})


@builder("stacks")
def experts_picked(dtype):
  def fn(p, x):
    chosen = p["w"][jnp.array([0, 2, 2, 1])]
    return jnp.einsum("ti,tio->to", x, chosen)

  return plain(fn, (3, 5, 7), (4, 5), "sio", dtype)


@builder("stacks")
def experts_ragged(dtype):
  """Rows in groups, one of which is empty; the last row is in none."""

  def fn(p, x):
    sizes = jnp.array([2, 0, 1])
    return lax.ragged_dot(jax.nn.silu(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)

  params = {"up": array(1, (3, 5, 7), dtype), "down": array(3, (3, 7, 5), dtype)}
  return Case(fn, params, (array(2, (4, 5), dtype),), {"up": "sio", "down": "sio"})


# ----------------------------------------------------------------------------------------------------------------------
# Convolutions.


def conv_case(dtype, kernel, data, dims, **options):
  spatial = len(kernel) - 2
  options = {"window_strides": (1,) * spatial, "padding": "SAME"} | options
  fn = lambda p, x: lax.conv_general_dilated(x, p["w"], dimension_numbers=dims, **options)
  return plain(fn, kernel, data, "i" * (spatial + 1) + "o", dtype)


@builder("convolutions")
def conv_1d(dtype):
  return conv_case(dtype, (3, 4, 5), (2, 6, 4), ("NHC", "HIO", "NHC"))


@builder("convolutions")
def conv_2d_strided(dtype):
  return conv_case(dtype, (3, 2, 4, 5), (2, 7, 6, 4), ("NHWC", "HWIO", "NHWC"), window_strides=(2, 1), padding="VALID")


@builder("convolutions")
def conv_2d_dilated(dtype):
  return conv_case(dtype, (3, 2, 4, 5), (2, 7, 6, 4), ("NHWC", "HWIO", "NHWC"), rhs_dilation=(2, 1))


@builder("convolutions")
def conv_3d(dtype):
  return conv_case(dtype, (2, 3, 2, 3, 5), (1, 4, 4, 3, 3), ("NHWDC", "HWDIO", "NHWDC"))


@builder("convolutions")
def conv_channels_first(dtype):
  case = conv_case(dtype, (5, 4, 3, 2), (2, 4, 7, 6), ("NCHW", "OIHW", "NCHW"))
  return dataclasses.replace(case, roles={"w": "oiii"})


@builder("convolutions")
def conv_grouped(dtype):
  return conv_case(dtype, (3, 2, 6), (2, 7, 4), ("NHC", "HIO", "NHC"), feature_group_count=2)


@builder("convolutions")
def conv_depthwise(dtype):
  return conv_case(dtype, (3, 1, 4), (2, 7, 4), ("NHC", "HIO", "NHC"), feature_group_count=4)


def depthwise(dtype, channels, multiplier):
  """As Keras keeps kernels for each channel, (width, channels, multiplier)."""

  def fn(p, x):
    kernel = p["w"].reshape(3, 1, channels * multiplier)
    dims = {"dimension_numbers": ("NHC", "HIO", "NHC"), "feature_group_count": channels}
    return lax.conv_general_dilated(x, kernel, (1,), "SAME", **dims)

  return plain(fn, (3, channels, multiplier), (2, 7, channels), "ioo", dtype)


@builder("convolutions")
def conv_for_each_channel(dtype):
  return depthwise(dtype, 4, 1)


@builder("convolutions")
def conv_for_each_channel_twice(dtype):
  return depthwise(dtype, 3, 2)


@builder("convolutions")
def conv_transpose(dtype):
  roles = {"kernel": "iio"}
  return linen(nn.ConvTranspose(5, (3,), strides=(2,), param_dtype=dtype), array(2, (2, 4, 3), dtype), roles, dtype)


@builder("convolutions")
def conv_transpose_flipped(dtype):
  module = nn.ConvTranspose(5, (3, 2), strides=(2, 1), transpose_kernel=True, param_dtype=dtype)
  return linen(module, array(2, (2, 4, 4, 3), dtype), {"kernel": "iioi"}, dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Lookups.


@builder("lookups")
def embed(dtype):
  params = {"w": array(1, (11, 5), dtype)}
  return Case(lambda p, ids: jnp.take(p["w"], ids, axis=0), params, (jnp.array([[1, 9, 1], [0, 10, 3]]),), {"w": "io"})


@builder("lookups")
def embed_columns(dtype):
  params = {"w": array(1, (5, 11), dtype)}
  return Case(lambda p, ids: p["w"][:, ids].sum(0), params, (jnp.array([[1, 9, 1], [0, 10, 3]]),), {"w": "oi"})


@builder("lookups")
def embed_tied(dtype):
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
      table = nn.Embed(11, 5, param_dtype=dtype)
      return table.attend(jnp.tanh(nn.Dense(5, param_dtype=dtype)(table(ids))))

  ids = jnp.array([[1, 9, 1], [0, 10, 3]])
  return linen(Tied(), ids, {"Embed_0/embedding": "io", "Dense_0/kernel": "io"}, dtype)
