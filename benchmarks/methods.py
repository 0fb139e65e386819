"""Ways to adapt a model, as pairs of `split` and `join`: some modules trained whole, LoRA, everything trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import jaxlora

Params = dict[str, Any]


class Method(NamedTuple):
  """One way to adapt.

  Attributes:
    name: as tables show it.
    rank: LoRA's; None for methods without adapters.
    lr: the peak learning rate.
    settings: everything that decides its runs, as JSON.
    split: `split(params, key)` gives the frozen and the trainable half.
    join: `join(frozen, trainable)` gives the tree that the model is applied to.
  """

  name: str
  rank: int | None
  lr: float
  settings: dict[str, Any]
  split: Callable[[Params, jax.Array], tuple[Any, Any]]
  join: Callable[[Any, Any], Any]


def whole(name: str, lr: float, trains: Callable[[str], bool]) -> Method:
  """Trains the modules for which `trains(module)` holds, without adapters: the baselines need no library."""

  def split(params: Params, key: jax.Array) -> tuple[Params, Params]:
    del key
    frozen = {module: leaves for module, leaves in params.items() if not trains(module)}
    return frozen, {module: leaves for module, leaves in params.items() if trains(module)}

  return Method(name, None, lr, {"name": name, "lr": lr}, split, lambda frozen, trainable: {**frozen, **trainable})


def lora(config: jaxlora.LoraConfig, lr: float, probe: Callable[[Params], Any] | None = None) -> Method:
  """Trains the factors of the config's targets, and the leaves that its `train=` names."""

  def split(params: Params, key: jax.Array) -> tuple[Any, Any]:
    return jaxlora.split(jaxlora.adapt(params, config, key, probe=probe))

  name = f"LoRA r={config.rank}"
  return Method(name, config.rank, lr, {"name": name, "lr": lr, "config": config.to_dict()}, split, jaxlora.join)


class Program(NamedTuple):
  """A method's compiled step, and its sizes, which are equal for all seeds."""

  method: Method
  tx: optax.GradientTransformation
  step: Callable[..., Any]
  flops: float
  trainable: int
  optimizer_bytes: int
  temp_bytes: int = 0


def compile_program(
  method: Method, tx: optax.GradientTransformation, step: Any, frozen: Any, trainable: Any, batch: Any
) -> Program:
  """Compiles a jitted `step(trainable, opt_state, frozen, batch)` ahead of time, and reads XLA's figures."""
  opt_state = tx.init(trainable)
  compiled = step.lower(trainable, opt_state, frozen, batch).compile()
  return Program(
    method=method,
    tx=tx,
    step=compiled,
    flops=compiled.cost_analysis()["flops"],
    trainable=sum(leaf.size for leaf in jax.tree.leaves(trainable)),
    optimizer_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state)),
    temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
  )


def make_step(loss: Callable[[Any, Any], jax.Array], method: Method, tx: optax.GradientTransformation) -> Any:
  """A jitted training step: `loss(params, batch)` of the joined halves, differentiated by the trainable one."""

  @jax.jit
  def step(trainable, opt_state, frozen, batch):
    value, grads = jax.value_and_grad(lambda trainable: loss(method.join(frozen, trainable), batch))(trainable)
    updates, opt_state = tx.update(grads, opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state, value

  return step
