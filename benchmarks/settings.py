"""The sizes of a comparison, and the model, parameters and batch that all its contestants share."""

import argparse
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import models
from models import LanguageModel, Params
from models_llama import Llama
import optax


class Settings(NamedTuple):
  """The sizes of one comparison."""

  width: int = 512
  layers: int = 6
  batch: int = 8
  seq: int = 128
  rank: int = 8
  alpha: float = 16.0
  vocabulary: int = 4096
  scan: bool = False
  remat: bool = False
  bf16: bool = False
  mixed: bool = False
  llama: bool = False

  @classmethod
  def parse(cls, parser: argparse.ArgumentParser, args: argparse.Namespace, **changes: Any) -> "Settings":
    """The settings by the options of `add_sizes`; ends the program with a message if there is no such model."""
    given = {field: getattr(args, field) for field in cls._fields if hasattr(args, field)}
    self = cls(**{**given, "width": args.d, **changes})
    if self.width % models.HEAD_WIDTH:
      parser.error(f"--d {self.width}: heads are {models.HEAD_WIDTH} wide, d must be a multiple of that")
    if self.bf16 and self.mixed:
      parser.error("--bf16 and --mixed: parameters are in bfloat16 or in float32; leave one of them out")
    if self.rank > self.width:
      parser.error(f"--rank {self.rank} is larger than the smallest side of a kernel, {self.width}")
    return self

  def model(self) -> LanguageModel | Llama:
    """The model of these sizes."""
    dtype = jnp.bfloat16 if self.bf16 or self.mixed else jnp.float32
    if self.llama:
      heads = self.width // models.HEAD_WIDTH
      hidden = 128 * -(-8 * self.width // (3 * 128))  # 8/3 of the width, in whole tiles as published models have it
      return Llama(self.vocabulary, self.width, self.layers, heads, hidden, True, dtype, self.scan, self.remat)
    held = jnp.float32 if self.mixed else None
    sizes = (self.vocabulary, self.width, self.layers, self.seq)
    return LanguageModel(*sizes, dtype, self.scan, self.remat, param_dtype=held)

  def title(self, batch: int | str | None = None) -> str:
    """Its description in tables; `batch` stands for the number of sequences."""
    named = {"scanned": self.scan, "remat": self.remat, "bf16": self.bf16, "bf16 on float32 parameters": self.mixed}
    marks = ["Llama's shape"] * self.llama + [mark for mark, on in named.items() if on]
    sizes = f"d={self.width}, {self.layers} layers, {batch or self.batch} x {self.seq} tokens, rank {self.rank}"
    return ", ".join([sizes, *marks])


def add_sizes(parser: argparse.ArgumentParser) -> None:
  """Adds the options that decide the sizes, without the number of layers."""
  harness.add_sizes(parser)
  parser.add_argument("--scan", action="store_true", help="one block, scanned over stacked parameters")
  parser.add_argument("--remat", action="store_true", help="blocks are recomputed in the backward pass")


class Batch(NamedTuple):
  """Tokens (batch, time), and the next token of each."""

  x: jax.Array
  y: jax.Array


class Base(NamedTuple):
  """The model, its parameters and one batch: all contestants start from them."""

  settings: Settings
  model: LanguageModel | Llama
  params: Params
  batch: Batch


def make_base(settings: Settings) -> Base:
  """The base of these settings, drawn from fixed seeds."""
  model = settings.model()
  tokens = jax.random.randint(jax.random.key(1), (settings.batch, settings.seq + 1), 0, settings.vocabulary)
  return Base(settings, model, models.init(model), Batch(tokens[:, :-1], tokens[:, 1:]))


def base_shapes(settings: Settings) -> Base:
  """The base of these settings with shapes in the place of arrays, however large: nothing is computed."""
  return Base(settings, settings.model(), *jax.eval_shape(lambda: make_base(settings)[2:]))


def loss_of(logits: jax.Array, y: jax.Array) -> jax.Array:
  """The mean cross entropy, in float32 at least."""
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y).mean()
