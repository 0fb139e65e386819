"""Modules of another trace level than the one they are called at."""

from typing import Any

from flax import errors, nnx
import jax
import jax.numpy as jnp

from jaxlora.nnx._walk import every_object


def check_level(module: Any) -> None:
  """Raises where a function that is compiled closes over the module: its weights would be constants of the program."""
  variables = [node for node in every_object(module).values() if isinstance(node, nnx.Variable)]
  if all(variable._can_update for variable in variables):
    return
  leaves = jax.tree.leaves([variable.get_raw_value() for variable in variables])
  traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
  if not traced and isinstance(jnp.zeros(()), jax.core.Tracer):
    raise level_error(module, "its weights would be constants of the compiled program")


def level_error(module: Any, why: str) -> errors.TraceContextError:
  """The error for a module that a transformed function closes over."""
  return errors.TraceContextError(
    f"{type(module).__name__}: a function under a JAX transformation closes over the adapted module: {why}. Pass the"
    " module as an argument, to a transformation of NNX: nnx.jit(lambda model, x: model(x))(model, x), and so for"
    " nnx.grad, nnx.vmap, nnx.scan and nnx.remat."
  )
