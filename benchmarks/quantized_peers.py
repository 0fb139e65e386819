"""Google's qwix on a base of codes: its own LoRA over weights that it quantised, for `quantized.py`."""

from typing import Any

import contestants
from contestants import Program
from flax import traverse_util
import jax
import models
from settings import Base

TILE = 64


def qwix_model(base: Base, qtype: str) -> tuple[Any, Any, Any]:
  """The model as qwix makes it, the parameters in its codes, and its factors."""
  import qwix

  settings = base.settings
  provider = qwix.LoraProvider(
    module_path=models.TARGETS.removesuffix("/kernel"),
    rank=settings.rank,
    alpha=settings.alpha,
    weight_qtype=qtype,
    tile_size=TILE,
  )
  model = qwix.apply_lora_to_model(base.model, provider)
  key, x = jax.random.key(2), base.batch.x[:1]
  params = qwix.quantize_params(base.params, jax.eval_shape(model.init, key, x)["params"])
  # The factors of attention's kernels are made where these are codes already, and not by `init`.
  make = jax.jit(lambda params: model.apply({"params": params}, x, rngs={"params": key}, mutable=["params"])[1])
  flat = traverse_util.flatten_dict(make(params)["params"])
  return model, params, {path: leaf for path, leaf in flat.items() if path[-1].endswith(("_lora_a", "_lora_b"))}


def qwix_step(qtype: str, base: Base) -> Program:
  """The program of a step of qwix' LoRA on its codes."""
  model, params, factors = qwix_model(base, qtype)

  def logits(factors: Any, params: Any, x: jax.Array) -> jax.Array:
    return model.apply({"params": contestants.with_factors(params, factors)}, x)

  return contestants.trainer(logits, factors, params)
