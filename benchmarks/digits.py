"""Scikit-learn's bundled digits, two small models of them (a ViT, a convolutional network), and their pretraining."""

from collections.abc import Callable, Iterator
import functools
from pathlib import Path
from typing import Any, NamedTuple

from flax import linen as nn
from harness import digest
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Params = dict[str, Any]

PRETRAIN_LR = 1e-3  # best of 5e-4, 1e-3, 2e-3, 4e-3 on the old validation split
SPLIT_SEED = 0  # one split for all runs: seeds vary the training, never the data


class Split(NamedTuple):
  """Images (count, 8, 8) in [0, 1] and their labels, counted from 0."""

  x: np.ndarray
  y: np.ndarray


class Task(NamedTuple):
  """The splits of five digits: `validation` chooses settings, `test` is reported."""

  train: Split
  validation: Split
  test: Split


def load_task(first: int) -> Task:
  """The five digits from `first` on, labelled 0-4: half for training, a fifth for validation, the rest for the test."""
  data = load_digits()
  mine = (data.target >= first) & (data.target < first + 5)
  x, y = (data.images[mine] / 16).astype(np.float32), (data.target[mine] - first).astype(np.int32)
  x, x_test, y, y_test = train_test_split(x, y, test_size=0.3, stratify=y, random_state=SPLIT_SEED)
  x, x_val, y, y_val = train_test_split(x, y, test_size=2 / 7, stratify=y, random_state=SPLIT_SEED)
  return Task(Split(x, y), Split(x_val, y_val), Split(x_test, y_test))


class Block(nn.Module):
  """One pre-norm transformer block."""

  heads: int
  mlp: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(nn.LayerNorm(name="norm_attention")(x))
    hidden = nn.gelu(nn.Dense(self.mlp, name="mlp_in")(nn.LayerNorm(name="norm_mlp")(x)))
    return x + nn.Dense(x.shape[-1], name="mlp_out")(hidden)


class ViT(nn.Module):
  """A vision transformer over the 16 patches, 2x2 each, of an 8x8 image."""

  width: int = 96
  depth: int = 3
  heads: int = 4
  mlp: int = 384

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    patches = jnp.reshape(images, (-1, 4, 2, 4, 2)).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    position = self.param("position", nn.initializers.normal(0.5), (1, 16, self.width))
    x = nn.Dense(self.width, name="embed")(patches) + position
    for k in range(self.depth):
      x = Block(self.heads, self.mlp, name=f"block_{k}")(x)
    return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(x.mean(axis=1)))

  def settings(self) -> dict[str, int]:
    """Its sizes, as part of a result and of the cache's key."""
    return {"width": self.width, "depth": self.depth, "heads": self.heads, "mlp": self.mlp}


class ConvBlock(nn.Module):
  """A residual block of two 3x3 convolutions; where the first halves the image, a 1x1 convolution does so beside it."""

  width: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    norm = lambda name: nn.LayerNorm(name=name)
    hidden = nn.Conv(self.width, (3, 3), self.stride, name="conv_in")(nn.gelu(norm("norm_in")(x)))
    if self.stride > 1:
      x = nn.Conv(self.width, (1, 1), self.stride, name="shortcut")(x)
    return x + nn.Conv(self.width, (3, 3), name="conv_out")(nn.gelu(norm("norm_out")(hidden)))


class ConvNet(nn.Module):
  """A residual convolutional network over an 8x8 image; its norms keep no running statistics."""

  width: int = 48
  depth: int = 2

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = nn.Conv(self.width, (3, 3), name="embed")(jnp.reshape(images, (-1, 8, 8, 1)))
    for k in range(self.depth):
      x = ConvBlock(self.width << k, stride=1 if k == 0 else 2, name=f"block_{k}")(x)
    return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=(1, 2)))

  def settings(self) -> dict[str, Any]:
    """Its sizes, as part of a result and of the cache's key."""
    return {"kind": "conv", "width": self.width, "depth": self.depth}


Model = ViT | ConvNet


@functools.partial(jax.jit, static_argnums=0)
def init(model: Model, seed: int) -> Params:
  """Fresh parameters."""
  return model.init(jax.random.key(seed), jnp.zeros((1, 8, 8)))["params"]


@functools.partial(jax.jit, static_argnums=0)
def predict(model: Model, params: Params, x: jax.Array) -> jax.Array:
  """Predicted classes of images (count, 8, 8) under plain parameters."""
  return model.apply({"params": params}, x).argmax(axis=-1)


def accuracy(model: Model, params: Params, split: Split) -> float:
  """The share of images whose predicted class is right."""
  return float((np.asarray(predict(model, params, split.x)) == split.y).mean())


def batches(split: Split, batch_size: int, steps: int, seed: int) -> Iterator[Split]:
  """Shuffled batches, epoch after epoch; they depend on the seed alone, so that all methods see the same ones."""
  rng = np.random.default_rng(seed)
  epochs = -(-steps * batch_size // len(split.y))
  order = np.concatenate([rng.permutation(len(split.y)) for _ in range(epochs)])
  for index in order[: steps * batch_size].reshape(steps, batch_size):
    yield Split(split.x[index], split.y[index])


def adam(lr: float, steps: int) -> optax.GradientTransformation:
  """Adam with a linear warm-up over a tenth of the steps and a cosine decay to zero."""
  return optax.adam(optax.warmup_cosine_decay_schedule(0.0, lr, steps // 10, steps))


def make_step(logits: Callable[[Any, Any, Any], jax.Array], tx: optax.GradientTransformation) -> Callable[..., Any]:
  """A jitted training step, for pretraining and for every method: they differ only in what `logits` is trained by."""

  def loss(trainable, frozen, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits(frozen, trainable, batch.x), batch.y).mean()

  @jax.jit
  def step(trainable, opt_state, frozen, batch):
    value, grads = jax.value_and_grad(loss)(trainable, frozen, batch)
    updates, opt_state = tx.update(grads, opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state, value

  return step


def pretrain(
  model: Model, split: Split, steps: int, batch_size: int, cache: Path | None, tick: Callable[[int], Any]
) -> tuple[Params, str]:
  """Pretrained parameters and their digest.

  Args:
    model: to pretrain.
    split: the training data.
    steps: of training.
    batch_size: images per step.
    cache: the folder where parameters are kept, as orbax checkpoints named by their digest; None keeps nothing. Orbax
      renames a checkpoint into place when it is complete, so an interrupted save is never read.
    tick: called with the number of steps done.
  """
  settings = {"model": model.settings(), "steps": steps, "batch_size": batch_size, "lr": PRETRAIN_LR}
  name = digest(settings, split)
  params = init(model, seed=0)
  path = cache.resolve() / f"pretrained-{name}" if cache else None
  with ocp.StandardCheckpointer() as checkpointer:
    if path and path.exists():
      tick(steps)
      return checkpointer.restore(path, params), name
    tx = adam(PRETRAIN_LR, steps)
    step, opt_state = make_step(lambda frozen, params, x: model.apply({"params": params}, x), tx), tx.init(params)
    for batch in batches(split, batch_size, steps, seed=0):
      params, opt_state, _ = step(params, opt_state, {}, batch)
      tick(1)
    if path and not path.exists():  # another process may have saved it meanwhile
      checkpointer.save(path, params)
  return params, name
