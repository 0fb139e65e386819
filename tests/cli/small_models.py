"""What `module:function` names in tests: models of every form."""

import jax
import jax.numpy as jnp

import jaxlora

PARAMS = {f"layers_{i}": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)} for i in range(4)}
X = jax.ShapeDtypeStruct((2, 8), jnp.float32)


def _apply(params, x):
  for layer in params.values():
    x = x @ layer["kernel"]
  return x @ jnp.tanh(params["layers_0"]["kernel"])


def shapes():
  return _apply, PARAMS, X


def alone():
  return PARAMS


def adapted():
  return _apply, jaxlora.adapt(PARAMS, jaxlora.LoraConfig(rank=2), jax.random.key(0)), X


def broken():
  raise RuntimeError("no weights here")
