"""Adapted trees: the one way to make them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlora
from tests.helpers.arrays import array, normal


def drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any, fan_in: int, rank: int) -> jax.Array:
  """A as wide as by default, drawn by NumPy from the key: nothing to compile."""
  if isinstance(key, jax.core.Tracer):
    return jaxlora.init.kaiming(key, shape, dtype, fan_in, rank)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  return jax.device_put((rng.uniform(-1, 1, shape) / math.sqrt(fan_in)).astype(dtype))


def adapted(params: Any, key: int = 0, *, probe: Any = None, seed: int | None = 11, **fields: Any) -> Any:
  """Adapts as `LoraConfig(**fields)` says and moves the factors; with `seed=None` they are as `adapt` leaves them."""
  config = jaxlora.LoraConfig(**{"rank": 2, "init": drawn} | fields)
  tree = jaxlora.adapt(params, config, jax.random.key(key), probe=probe)
  return tree if seed is None else trained(tree, seed)


def trained(tree: Any, seed: int = 11, width: float = 0.3) -> Any:
  """A tree whose factors have moved, as if by training."""
  frozen, trainable = jaxlora.split(tree)
  leaves, treedef = jax.tree.flatten(trainable)
  moved = [np.asarray(leaf) + normal(seed + k, leaf.shape, leaf.dtype, width) for k, leaf in enumerate(leaves)]
  return jaxlora.join(frozen, jax.tree.unflatten(treedef, jax.device_put(moved)))


def one_weight(shape: tuple[int, ...] = (5, 7), seed: int = 1, **fields: Any) -> Any:
  """A tree of one adapted array, `w`."""
  return adapted({"w": array(seed, shape, jnp.float32)}, **{"alpha": 3, "targets": "w"} | fields)


def square_weights(count: int, **fields: Any) -> Any:
  """A tree of adapted matrices that are alike in shape, `layer_0` and so on."""
  params = {f"layer_{k}": array(k, (5, 5), jnp.float32) for k in range(count)}
  return adapted(params, **{"alpha": 3, "targets": ".*"} | fields)


def factored(
  base: Any, roles: str = "io", rank: int = 2, alpha: float = 2.0, *, seed: int = 1, width: float = 1.0, **fields: Any
) -> jaxlora.LoraWeight:
  """An array with random factors, without `adapt`."""
  sizes = {role: [n for n, own in zip(base.shape, roles, strict=True) if own == role] for role in "sio"}
  shapes = [(*sizes["s"], rank, *sizes[role]) for role in "io"]
  a, b = (array(seed + k, shape, base.dtype, width) for k, shape in enumerate(shapes))
  return jaxlora.LoraWeight(base, a, b, roles=roles, rank=rank, alpha=alpha, **fields)


def adapted_paths(tree: Any) -> list[str]:
  return [leaf.path for leaf in jaxlora.summary(tree).leaves]


def lora_weights(tree: Any) -> list[jaxlora.LoraWeight]:
  nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, jaxlora.LoraWeight))
  return [node for node in nodes if isinstance(node, jaxlora.LoraWeight)]
