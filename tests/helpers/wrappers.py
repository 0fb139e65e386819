"""Wrappers: each puts a function into control flow, or differentiates it, and gives one of the same arguments."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from tests.helpers.meshes import mesh_of

WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {}
FORWARD_ONLY = {"while"}  # no reverse mode through a loop of unknown length
NEEDS_FLOAT_DATA = {"grad", "jvp", "scan_carry"}


def wrapper(fn: Callable[..., Any]) -> Callable[..., Any]:
  WRAPPERS[fn.__name__.rstrip("_")] = fn
  return fn


@wrapper
def alone(fn):
  return fn


@wrapper
def jit(fn):
  inner = jax.jit(lambda p, *args, twice: fn(p, *args) * 2 if twice else None, static_argnames="twice")
  return lambda p, *args: inner(p, *args, twice=True)


@wrapper
def scan(fn):
  """The weights are constants of a scan over the data and its reverse, backwards."""

  def wrapped(p, *args):
    xs = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), args)
    body = lambda total, here: (total / 2 + weighed(fn(p, *here)), fn(p, *here))  # the order of steps counts
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
def host_memory(fn):
  """The weights rest in the host's memory, and are fetched where they are used."""

  def wrapped(p, *args):
    rest = jax.device_put(p, jax.memory.Space.Host, src=jax.memory.Space.Device)
    return fn(jax.device_put(rest, jax.memory.Space.Device), *args)

  return wrapped


@wrapper
def shard_map(fn):
  """Copies of the data on two devices, the weights on both."""

  def wrapped(p, *args):
    mesh = mesh_of(data=2)
    spec = jax.sharding.PartitionSpec
    here = lambda p, x: fn(p, x[0])[None]
    mapped = jax.shard_map(here, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data"))
    return mapped(p, jnp.stack([args[0], args[0][::-1]]))

  return wrapped


def weighed(y):
  """A sum in which every element has a weight of its own."""
  return jnp.sum(y * jnp.linspace(0, 1, y.size, dtype=y.dtype).reshape(y.shape))


def result(fn, p, args):
  return jax.eval_shape(fn, p, *args)


def legal(build: str, wrap: str) -> bool:
  if build.startswith("experts_ragged") and wrap == "vmap":  # JAX batches a ragged_dot only where all of it is batched
    return False
  return not (build.startswith("embed") and wrap in NEEDS_FLOAT_DATA - {"scan_carry"})
