"""Control flow: each step runs all that follows it, `following`, which gives a pytree of arrays."""

from typing import Any

from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp

from tests._transform.fuzz.programs import step


def twice(data: Any) -> Any:
  """Two sets of data, of which the second has other inputs."""
  both = jax.tree.map(lambda x: jnp.stack([x, x]), data)
  return both | {"inputs": [jnp.stack([x, -x]) for x in data["inputs"]]}


def zeros_like_result(following, w, data):
  return jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(following, w, data))


def add(x, y):
  return jax.tree.map(jnp.add, x, y)


@step("control")
def jit(following, w, data):
  return jax.jit(following)(w, data)


@step("control", draw=lambda d: (d.one_of(None, "dots_saveable", "everything_saveable"),))
def remat(following, w, data, policy):
  return jax.checkpoint(following, policy=policy and getattr(jax.checkpoint_policies, policy))(w, data)


@step("control")
def cond(following, w, data):
  other = lambda w, data: jax.tree.map(jnp.negative, following(w, data))
  return lax.cond(data["which"] > 0, following, other, w, data)


@step("control")
def switch(following, w, data):
  nothing = lambda w, data: zeros_like_result(following, w, data)
  return lax.switch(data["which"], [following, nothing, following], w, data)


@step("control", draw=lambda d: (d.draw(st.booleans()), d.one_of(1, 2)))
def scan(following, w, data, reverse, unroll):
  return lax.scan(lambda _, data: (None, following(w, data)), None, twice(data), reverse=reverse, unroll=unroll)[1]


@step("control")
def scan_carry(following, w, data):
  def body(carry, here):
    w, total = carry
    return (w, add(total, following(w, here))), None

  return lax.scan(body, (w, zeros_like_result(following, w, data)), twice(data))[0][1]


def can_stack(d):
  return d.shape and d.usable(d.shape[1:], d.roles[1:]) and (not d.strict or d.kind(0) == "s")


def draw_scan_xs(d):
  d.drop(0)
  return (d.draw(st.booleans()),)


@step("control", can_stack, draw_scan_xs)
def scan_xs(following, w, data, reverse):
  return lax.scan(lambda _, w: (None, following(w, data)), None, w, reverse=reverse)[1]


@step("control")
def fori(following, w, data):
  return lax.fori_loop(0, 2, lambda k, total: add(total, following(w, data)), zeros_like_result(following, w, data))


@step("control", lambda d: "grad" not in d.seen, lambda d: (d.draw(st.booleans()),))
def while_(following, w, data, carried):
  total = zeros_like_result(following, w, data)
  going = lambda state: state[0] < data["which"] + 1
  if carried:
    body = lambda state: (state[0] + 1, state[1], add(state[2], following(state[1], data)))
    return lax.while_loop(going, body, (jnp.int32(0), w, total))[2]
  return lax.while_loop(going, lambda state: (state[0] + 1, add(state[1], following(w, data))), (jnp.int32(0), total))[
    1
  ]


@step("control", draw=lambda d: (d.strict or d.draw(st.booleans()),))
def vmap(following, w, data, inputs_only):
  """Over the data; where that is more than the inputs, every branch, bound and start is batched, too."""
  if inputs_only:
    return jax.vmap(lambda inputs: following(w, data | {"inputs": inputs}), axis_size=2)(twice(data)["inputs"])
  return jax.vmap(lambda data: following(w, data))(twice(data))


def stacks(d):
  return [k for k in d.axes if not d.strict or d.kind(k) == "s"]


def draw_vmap_weight(d):
  k = d.axis(stacks(d))
  d.drop(k)
  d.batched_weight = True
  return k, d.draw(st.booleans())


@step("control", stacks, draw_vmap_weight)
def vmap_weight(following, w, data, axis, with_inputs):
  """Over an axis of the weight, perhaps with inputs of its own for each."""
  if not with_inputs:
    return jax.vmap(lambda w: following(w, data), in_axes=axis)(w)
  inputs = [jnp.stack([x * (k + 1) for k in range(w.shape[axis])]) for x in data["inputs"]]
  return jax.vmap(lambda w, inputs: following(w, data | {"inputs": inputs}), in_axes=(axis, 0))(w, inputs)


def of_floats(following, w, data):
  floats = {"inputs": data["inputs"], "scale": data["scale"]}
  return floats, lambda floats: following(w, data | floats)


@step("control", lambda d: not d.strict and "while" not in d.seen)
def grad(following, w, data):
  """The gradient with respect to the data is part of the function."""
  floats, fn = of_floats(following, w, data)
  loss = lambda floats: sum(jnp.sum(jnp.sin(y)).astype(jnp.float64) for y in jax.tree.leaves(fn(floats)))
  return jax.grad(loss)(floats)


@step("control")
def jvp(following, w, data):
  floats, fn = of_floats(following, w, data)
  return jax.jvp(fn, (floats,), (jax.tree.map(jnp.ones_like, floats),))
