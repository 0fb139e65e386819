"""`follow`: what an optimizer keeps, on the mesh of what it trains."""

from typing import Any

from jaxlora._weight.placement import on_the_mesh_of


def follow(state: Any, trainable: Any) -> Any:
  """Puts what lies nowhere yet, such as an optimizer's counters, whole on the mesh of the trainable half.

  Moments are made beside their factors. Counters are not, come back from the first step on the mesh, and the second
  step would be compiled once more for them. `jaxlora.optimizer` does this itself.

  Args:
    state: what `tx.init(trainable)` returned.
    trainable: the trainable half.

  Returns:
    The state; as it is where the half is on no mesh of several devices.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora, optax
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> _, trainable = jaxlora.split(tree)
    >>> state = follow(optax.adamw(1e-4).init(trainable), trainable)
  """
  return on_the_mesh_of(state, trainable)
