"""One run of adaptation: LoRA and full fine-tuning differ only in which half of the parameters is trained."""

from collections.abc import Callable, Iterator
import functools
from typing import Any, NamedTuple

from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np

import jaxlora

from . import scores
from .decoder import Decoder, Params
from .steps import init_adam, make_step, schedule, summary_loss
from .tokens import Data, Rows

ALPHA = 32  # for every rank, so that the update's scale falls with it: 32 / rank, as in arXiv:2106.09685, section 4.1
PLACEMENTS = {"all-linear": "all-linear", "attention": "attention", "MLP": r".*/(mlp_in|mlp_out)/kernel"}


# ----------------------------------------------------------------------------------------------------------------------
# The methods.


class Method(NamedTuple):
  """A way to adapt: LoRA of a rank on the kernels of a placement; full fine-tuning where the rank is None."""

  rank: int | None
  placement: str = "all-linear"

  def name(self) -> str:
    """Its name in tables."""
    return "full fine-tuning" if self.rank is None else f"LoRA r={self.rank}, {self.placement}"


FULL = Method(None)


def split(model: Decoder, method: Method, params: Params, seed: int) -> tuple[Any, Any]:
  """The frozen and the trainable half ahead of the first step."""
  if method.rank is None:
    return {}, params
  config = jaxlora.LoraConfig(rank=method.rank, alpha=ALPHA, targets=PLACEMENTS[method.placement])
  tokens, valid = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
  probe = lambda params: model.apply({"params": params}, tokens, valid)[0]
  return jaxlora.split(jaxlora.adapt(params, config, jax.random.key(seed), probe=probe))


def join(method: Method, frozen: Any, trainable: Any) -> Any:
  """The tree that the model is applied to."""
  return trainable if method.rank is None else jaxlora.join(frozen, trainable)


class Program(NamedTuple):
  """A method's compiled step, and its sizes, which are equal for all runs."""

  step: Callable[..., Any]
  trainable: int
  optimizer_bytes: int
  temp_bytes: int
  flops: float


@functools.lru_cache
def apply_of(model: Decoder) -> Callable[..., Any]:
  """The wrapped apply function; it raises where a weight cannot stay factored."""
  return jaxlora.wrap(model.apply, on_materialize="error")


def compile_step(model: Decoder, method: Method, params: Params, batch: Rows) -> Program:
  """Compiles a method's step ahead of time, for all rates and seeds."""
  apply = apply_of(model)
  frozen, trainable = split(model, method, params, seed=0)
  opt_state = init_adam(trainable)
  step = make_step(lambda trainable, frozen, batch: summary_loss(apply, join(method, frozen, trainable), batch))
  compiled = step.lower(trainable, opt_state, frozen, batch, np.float32(0)).compile()
  return Program(
    step=compiled,
    trainable=sum(leaf.size for leaf in jax.tree.leaves(trainable)),
    optimizer_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state)),
    temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
    flops=compiled.cost_analysis()["flops"],
  )


# ----------------------------------------------------------------------------------------------------------------------
# One run.


def batches(rows: Rows, batch_size: int, steps: int, seed: int) -> Iterator[Rows]:
  """Shuffled batches, epoch after epoch; they depend on the seed alone, so that all methods see the same ones."""
  rng = np.random.default_rng(seed)
  count = len(rows.tokens)
  order = np.concatenate([rng.permutation(count) for _ in range(-(-steps * batch_size // count))])
  for index in order[: steps * batch_size].reshape(steps, batch_size):
    yield rows.take(index)


def file_bytes(trainable: Any) -> int:
  """The size of a file that holds the trained arrays as a flat dict."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(trainable)
  named = {jax.tree_util.keystr(place, simple=True, separator="/"): np.asarray(leaf) for place, leaf in leaves}
  return len(serialization.msgpack_serialize(named))


class Run(NamedTuple):
  """What decides a run: method, peak learning rate, seed, and the beam widths that are scored after it."""

  method: Method
  lr: float
  seed: int
  widths: tuple[int, ...] = ()


def run(
  one: Run, program: Program, model: Decoder, data: Data, base: Params, steps: int, batch_size: int, tick: Any
) -> dict[str, Any]:
  """Trains from the base, and returns losses, scores and the size of the file."""
  frozen, trainable = split(model, one.method, base, one.seed)
  opt_state, losses = init_adam(trainable), []
  for batch, rate in zip(batches(data.train, batch_size, steps, one.seed), schedule(one.lr, steps), strict=True):
    trainable, opt_state, loss = program.step(trainable, opt_state, frozen, batch, rate)
    losses.append(loss)
    tick(1)
  result = {
    "seed": one.seed,
    "learning_rate": one.lr,
    "train_loss": float(np.mean(losses[-20:])),
    "file_bytes": file_bytes(trainable),
  }
  if not np.isfinite(result["train_loss"]):
    return {**result, "train_loss": None, "validation_loss": None, "pretraining_loss": None}
  tree = join(one.method, frozen, trainable)
  result |= scores.evaluate(model, data, jaxlora.merge(tree), list(one.widths), examples=8 if one.seed == 0 else 0)
  if one.method.rank is not None:
    result["pretraining_loss_removed"] = float(scores.pretraining_loss(model, jaxlora.strip(tree), data.held_out))
  return result
