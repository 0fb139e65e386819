"""The contestants: ways to train the same model on the same batch with the same optimizer, and the floor below them.

All adapt the same kernels (`models.TARGETS`) at the same rank, start from the base model, and use AdamW. The frozen
floor trains nothing: it is the forward pass and the gradient with respect to the embedded input.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

from flax import traverse_util
from flax.training.train_state import TrainState
import harness
import jax
import jax.numpy as jnp
import models
from models import Params
import models_nnx
import numpy as np
import optax
from settings import Base, Batch, Settings, loss_of

import jaxlora

LEARNING_RATE = 1e-3
FLOOR, FULL = "frozen floor", "full fine-tuning"


class Program(NamedTuple):
  """A contestant's training step, not yet compiled.

  Attributes:
    step: `step(state, frozen, batch)` returns the next state and the loss; the state is donated, as in a real loop.
    state: the arrays that change from step to step.
    frozen: the arrays that do not.
    trained: `trained(state)` returns the arrays that the optimizer updates.
    base: `base(state, frozen)` returns the arrays that must stay bit for bit the same; None if everything trains.
  """

  step: Callable[[Any, Any, Batch], tuple[Any, jax.Array]]
  state: Any
  frozen: Any
  trained: Callable[[Any], Any]
  base: Callable[[Any, Any], Any] | None


class Contestant(NamedTuple):
  """A way to train: one row of a table.

  Attributes:
    name: of the row.
    build: `build(base)` makes its program.
    trainable: `trainable(base)` is the number of parameters that it has to train.
    package: the package that it needs.
    misfit: `misfit(settings)` says why it does not support these settings; None if it does.
  """

  name: str
  build: Callable[[Base], Program]
  trainable: Callable[[Base], int]
  package: str | None = None
  misfit: Callable[[Settings], str | None] = lambda settings: None


def make_step(logits: Callable[[Any, Any, jax.Array], jax.Array], tx: optax.GradientTransformation) -> Any:
  """The training step of all contestants whose state is `(trained, optimizer state)`."""

  def step(state: Any, frozen: Any, batch: Batch) -> tuple[Any, jax.Array]:
    trained, opt_state = state
    value, grads = jax.value_and_grad(lambda trained: loss_of(logits(trained, frozen, batch.x), batch.y))(trained)
    updates, opt_state = tx.update(grads, opt_state, trained)
    return (optax.apply_updates(trained, updates), opt_state), value

  return step


def trainer(logits: Callable[[Any, Any, jax.Array], jax.Array], trained: Any, frozen: Any) -> Program:
  """A program that trains `trained` with AdamW beside `frozen`."""
  tx = optax.adamw(LEARNING_RATE)
  state = (trained, tx.init(trained))
  return Program(make_step(logits, tx), state, frozen, lambda state: state[0], lambda state, frozen: frozen)


# ----------------------------------------------------------------------------------------------------------------------
# The contestants.


def full(base: Base) -> Program:
  """Everything trains."""
  program = trainer(lambda params, _, x: base.model.apply({"params": params}, x), base.params, None)
  return program._replace(base=None)


def floor(base: Base) -> Program:
  """Forward pass and input gradient; the returned gradient takes the donated input's place."""

  def step(eps: jax.Array, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    value, grad = jax.value_and_grad(lambda eps: loss_of(base.model.apply({"params": params}, batch.x, eps), batch.y))(
      eps
    )
    return grad, value

  eps = jnp.zeros((*base.batch.x.shape, base.settings.width), base.model.dtype)
  return Program(step, eps, base.params, lambda state: (), lambda state, frozen: frozen)


def textbook(base: Base) -> Program:
  """W + s A B, formed in every step."""
  settings = base.settings
  factors = {}
  for number, (path, kernel) in enumerate(models.adapted_kernels(base.params).items()):
    stack, size_in, size_out = models.matrix_shape(path, kernel.shape)
    a = jax.random.uniform(jax.random.key(number), (*stack, size_in, settings.rank), kernel.dtype, -1, 1)
    factors[path] = (a / np.sqrt(size_in).astype(a.dtype), jnp.zeros((*stack, settings.rank, size_out), kernel.dtype))

  def logits(factors: Any, params: Params, x: jax.Array) -> jax.Array:
    flat = traverse_util.flatten_dict(params)
    for path, (a, b) in factors.items():
      flat[path] = flat[path] + settings.alpha / settings.rank * jnp.reshape(a @ b, flat[path].shape)
    return base.model.apply({"params": traverse_util.unflatten_dict(flat)}, x)

  return trainer(logits, factors, base.params)


def wrap(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
  """`jaxlora.wrap` that raises where it would materialise."""
  return jaxlora.wrap(fn, on_materialize="error", **options)


def adapt(base: Base, variant: str = "lora") -> Any:
  """The adapted tree."""
  settings = base.settings
  config = jaxlora.LoraConfig(rank=settings.rank, alpha=settings.alpha, targets=models.TARGETS, variant=variant)
  probe = lambda params: base.model.apply({"params": params}, base.batch.x[:1])
  return jaxlora.adapt(base.params, config, jax.random.key(2), probe=probe)


def jaxlora_split(base: Base, variant: str = "lora", **options: Any) -> Program:
  """The flow with two halves: the optimizer sees the trainable one, and the frozen one is an argument."""
  apply = wrap(base.model.apply, **options)
  frozen, trainable = jaxlora.split(adapt(base, variant))
  return trainer(lambda half, frozen, x: apply({"params": jaxlora.join(frozen, half)}, x), trainable, frozen)


def jaxlora_train_state(base: Base, **options: Any) -> Program:
  """The flow with one tree in a `TrainState`, donated whole."""
  apply = wrap(base.model.apply, **options)
  tx = jaxlora.optimizer(optax.adamw(LEARNING_RATE))
  state = TrainState.create(apply_fn=apply, params=adapt(base), tx=tx).replace(step=jnp.zeros((), jnp.int32))

  def step(state: TrainState, _: None, batch: Batch) -> tuple[TrainState, jax.Array]:
    value, grads = jaxlora.value_and_grad(lambda tree: loss_of(state.apply_fn({"params": tree}, batch.x), batch.y))(
      state.params
    )
    return state.apply_gradients(grads=grads), value

  return Program(
    step, state, None, lambda state: jaxlora.split(state.params)[1], lambda state, frozen: jaxlora.strip(state.params)
  )


def qwix_model(base: Base) -> tuple[Any, Params]:
  """The model with Google's qwix, which intercepts the products of a Linen model during tracing; and the factors."""
  import qwix

  settings = base.settings
  modules = models.TARGETS.removesuffix("/kernel")
  provider = qwix.LoraProvider(module_path=modules, rank=settings.rank, alpha=settings.alpha)
  model = qwix.apply_lora_to_model(base.model, provider)
  fresh = traverse_util.flatten_dict(jax.jit(model.init)(jax.random.key(2), base.batch.x[:1])["params"])
  return model, {path: leaf for path, leaf in fresh.items() if path[-1].endswith(("_lora_a", "_lora_b"))}


def with_factors(params: Params, factors: Params) -> Params:
  """Parameters with qwix's factors beside the kernels."""
  return traverse_util.unflatten_dict({**traverse_util.flatten_dict(params), **factors})


def qwix(base: Base) -> Program:
  """Google's qwix."""
  model, factors = qwix_model(base)

  def logits(factors: Any, params: Params, x: jax.Array) -> jax.Array:
    return model.apply({"params": with_factors(params, factors)}, x)

  return trainer(logits, factors, base.params)


def nnx_lora(base: Base) -> Program:
  """Flax's own `nnx.LoRA`, on the model's twin."""
  from flax import nnx

  definition, factors, rest = models_nnx.split_twin(base.model, base.params, base.settings.rank)
  return trainer(lambda factors, rest, x: nnx.merge(definition, factors, rest)(x), factors, rest)


def no_twin(settings: Settings) -> str | None:
  """Why the NNX twin does not support these settings, or None."""
  if settings.llama:
    return "its twin is of the other model"
  return "its twin of the model is neither scanned nor remat" if settings.scan or settings.remat else None


def all_parameters(base: Base) -> int:
  """The number of parameters that full fine-tuning trains."""
  return sum(leaf.size for leaf in jax.tree.leaves(base.params))


def factor_parameters(base: Base) -> int:
  """The number of parameters of correct LoRA: rank x (input + output) for each adapted kernel."""
  total = 0
  for path, kernel in models.adapted_kernels(base.params).items():
    stack, size_in, size_out = models.matrix_shape(path, kernel.shape)
    total += int(np.prod(stack, dtype=int)) * base.settings.rank * (size_in + size_out)
  return total


def contestants(**options: Any) -> list[Contestant]:
  """All contestants on JAX, the library's with these options of `wrap`; PEFT has a process of its own."""
  return [
    Contestant(FLOOR, floor, lambda base: 0),
    Contestant(FULL, full, all_parameters),
    Contestant("textbook merge", textbook, factor_parameters),
    Contestant("qwix", qwix, factor_parameters, package="qwix"),
    Contestant("nnx.LoRA", nnx_lora, factor_parameters, misfit=no_twin),
    Contestant("jaxlora", functools.partial(jaxlora_split, **options), factor_parameters),
    Contestant("jaxlora, TrainState", functools.partial(jaxlora_train_state, **options), factor_parameters),
  ]


def recompute_contestants(**options: Any) -> list[Contestant]:
  """The library with `recompute=` off and on, and these options of `wrap`."""
  return [
    Contestant(f"jaxlora, {name}", functools.partial(jaxlora_split, recompute=on, **options), factor_parameters)
    for name, on in (("no recompute", False), ("recompute", True))
  ]


def variant_contestants(variants: Sequence[str]) -> list[Contestant]:
  """The library with each variant of LoRA; the tests check how many parameters each trains."""
  return [
    Contestant(
      variant,
      functools.partial(jaxlora_split, variant=variant),
      lambda base, variant=variant: jaxlora.summary(adapt(base, variant)).trainable_parameters,
    )
    for variant in variants
  ]


def present(candidates: Sequence[Contestant], settings: Settings) -> tuple[list[Contestant], list[str]]:
  """The contestants that can run here, and a line for each that cannot."""
  here, absent = [], []
  for contestant in candidates:
    reason = contestant.misfit(settings)
    if contestant.package and not harness.installed(contestant.package):
      reason = f"{contestant.package} is not installed; the extra `peers` brings it: pip install 'jaxlora[peers]'"
    if reason:
      absent.append(f"{contestant.name} is left out: {reason}")
    else:
      here.append(contestant)
  return here, absent
