"""Adapts a pretrained model of the digits 0-4 to 5-9 by one method from one seed: `finetune.py`, `variants.py`."""

from collections.abc import Callable
import os
from pathlib import Path
from typing import Any, NamedTuple

import digits
from digits import Model, Params, Split
from flax import serialization
import jax
import jax.numpy as jnp
import methods
from methods import Method, Program
import numpy as np

import jaxlora


class Setup(NamedTuple):
  """What all methods share: the pretrained model, the data, the length of training, and the folder for adapters."""

  model: Model
  pretrained: Params
  train: Split
  new: Split
  old: Split
  steps: int
  batch_size: int
  out: Path


def start(method: Method, pretrained: Params, seed: int) -> tuple[Any, Any]:
  """The frozen and the trainable half before the first step; the head for the new digits is drawn from `seed`."""
  head_key, adapter_key = jax.random.split(jax.random.key(seed))
  old = pretrained["head"]
  kernel = jax.nn.initializers.lecun_normal()(head_key, old["kernel"].shape, old["kernel"].dtype)
  head = {"kernel": kernel, "bias": jnp.zeros_like(old["bias"])}
  return method.split({**pretrained, "head": head}, adapter_key)


def compile_step(method: Method, setup: Setup, make_tx: Callable[[float, int], Any] = digits.adam) -> Program:
  """Compiles a method's step ahead of time: XLA counts its FLOPs, and all seeds run the same program."""
  apply = jaxlora.wrap(setup.model.apply, on_materialize="error")  # without adapters it is `apply` itself
  tx = make_tx(method.lr, setup.steps)
  frozen, trainable = start(method, setup.pretrained, seed=0)
  step = digits.make_step(lambda frozen, trainable, x: apply({"params": method.join(frozen, trainable)}, x), tx)
  batch = next(digits.batches(setup.train, setup.batch_size, setup.steps, seed=0))
  return methods.compile_program(method, tx, step, frozen, trainable, batch)


def save(trainable: Any, path: Path) -> int:
  """Writes the trained arrays as a flat dict, and returns the size of the file."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(trainable)
  named = {jax.tree_util.keystr(place, simple=True, separator="/"): np.asarray(leaf) for place, leaf in leaves}
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(serialization.msgpack_serialize(named))
  return os.path.getsize(path)


def run(program: Program, setup: Setup, seed: int, tick: Callable[[int], Any]) -> dict[str, Any]:
  """Trains one method from one seed, saves the trained arrays and returns accuracies, the last loss and file size."""
  method = program.method
  frozen, trainable = start(method, setup.pretrained, seed)
  opt_state = program.tx.init(trainable)
  for batch in digits.batches(setup.train, setup.batch_size, setup.steps, seed):
    trainable, opt_state, loss = program.step(trainable, opt_state, frozen, batch)
    tick(1)
  tree = method.join(frozen, trainable)
  tuned = jaxlora.merge(tree)  # plain parameters; a tree without adapters is returned as it is
  old_head = {"head": setup.pretrained["head"]}
  removed = digits.accuracy(setup.model, {**jaxlora.strip(tree), **old_head}, setup.old)
  return {
    "seed": seed,
    "new": digits.accuracy(setup.model, tuned, setup.new),
    "old": digits.accuracy(setup.model, {**tuned, **old_head}, setup.old),
    "old_removed": removed if frozen else None,  # full fine-tuning has overwritten the base
    "last_loss": float(loss),
    "adapter_file_bytes": save(
      trainable, setup.out / "adapters" / f"{method.name.replace(' ', '-')}-seed{seed}.msgpack"
    ),
  }
