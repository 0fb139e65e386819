"""What trains: nothing, LoRA's factors on a base of floats or of codes, or every weight. One tree holds it all."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import jaxlora

from .model import Llama

METHODS = ("base", "lora", "full")
WHOLE = {"full": ".*", "head": "embed_tokens/embedding"}  # what trains whole; the head is tied to the embedding
HEAD = WHOLE["head"]  # as LoRA's targets
FLOAT, CODES = "float", ("nf4", "int8", "int4", "q4_0", "fp8")


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to adapt a model.

  Attributes:
    name: `"base"`, `"lora"`, or one of `WHOLE`: `"full"` or `"head"`.
    rank, alpha, targets, scaling: of LoRA, as in `jaxlora.LoraConfig`. With one alpha for all ranks their best learning
      rates are about the same.
    base: `"float"`, or a format of `jaxlora.quantize` for the weights that LoRA adapts.
  """

  name: str
  rank: int = 8
  alpha: float = 8.0
  targets: str = "all-linear"
  scaling: str = "standard"
  base: str = FLOAT

  @property
  def label(self) -> str:
    """A row's name in a table."""
    if self.name != "lora":
      return {"base": "base, instructed", "full": "full fine-tuning", "head": "tied head alone"}[self.name]
    placed = {"all-linear": "", HEAD: "tied head alone"}
    parts = [f"LoRA r={self.rank}", placed.get(self.targets, self.targets)]
    parts += ["" if self.scaling == "standard" else self.scaling, "" if self.base == FLOAT else f"{self.base} base"]
    return ", ".join(filter(None, parts))


def use(model: Llama) -> Any:
  """A call of the model that shows which axes its weights contract; it is traced, never run."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  return model(tokens, jnp.ones((1, 2), bool))[0]


def base_of(method: Method, model: Llama) -> Any:
  """The frozen weights: the model's own, or codes for those that LoRA adapts."""
  if method.name != "lora" or method.base == FLOAT:
    return model
  return jaxlora.quantize(model, method.base, targets=method.targets, probe=use)


def adapt(method: Method, base: Any, seed: int) -> Any:
  """The tree that trains."""
  if method.name in WHOLE:
    config = jaxlora.LoraConfig(targets=[], train=WHOLE[method.name])
  else:
    config = jaxlora.LoraConfig(method.rank, method.alpha, method.targets, scaling=method.scaling)
  return jaxlora.adapt(base, config, jax.random.key(seed), probe=use)


def plain(tree: Any) -> Any:
  """Floats alone, with the update folded in: the same function, and the fastest to decode with."""
  return jaxlora.merge(jaxlora.dequantize(tree))
