"""Training and timing one method on one task."""

import argparse
from collections.abc import Callable, Iterator, Sequence
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from safetensors.numpy import save_file

import jaxlora
from studies import harness, learning_rates, methods

from .bert import Params
from .tasks import Batch, Task

HEAD, FULL = "head alone", "full fine-tuning"


class Setup(NamedTuple):
  """What all methods of a task share: the pretrained encoder, the length of training, the folder for adapters."""

  task: Task
  encoder: Params
  steps: int
  batch_size: int
  out: Path


def make_methods(task: str, args: argparse.Namespace) -> list[methods.Method]:
  """Every method of a task's comparison, from the fewest trained parameters to the most."""
  rates = {name: getattr(args, f"lr_{name}") or rate for name, rate in learning_rates.SENTENCES[task].items()}
  train = "head/.*" if task == "classification" else None
  loras = [
    methods.lora(jaxlora.LoraConfig(rank=rank, alpha=2 * rank, targets=args.targets, train=train), rates["lora"])
    for rank in args.rank
  ]
  head = methods.whole(HEAD, rates["head"], lambda module: module == "head")
  full = methods.whole(FULL, rates["full"], lambda module: True)
  new_head = [(head, "head"), *((one, "lora_head") for one in loras), (full, "full_head")]
  return [one._replace(settings={**one.settings, "lr_head": rates.get(name, one.lr)}) for one, name in new_head]


def check_adapts(method: methods.Method, setup: Setup) -> None:
  """Adapts abstractly.

  Raises:
    ValueError: if the model cannot be adapted by these options.
  """
  jax.eval_shape(lambda encoder: start(method, setup._replace(encoder=encoder), seed=0), setup.encoder)


def start(method: methods.Method, setup: Setup, seed: int) -> tuple[Any, Any]:
  """The frozen and the trainable half ahead of the first step; a head, where there is one, is drawn from `seed`."""
  head_key, adapter_key = jax.random.split(jax.random.key(seed))
  has_head = setup.task.head_for_all or method.name == HEAD
  params = {"encoder": setup.encoder, **({"head": setup.task.head(head_key)} if has_head else {})}
  return method.split(params, adapter_key)


def batches(data: Batch, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
  """Shuffled batches, epoch after epoch; they depend on the seed alone, so that all methods see the same ones."""
  count = len(next(iter(data.values())))
  random = np.random.default_rng(seed)
  epochs = -(-steps * batch_size // count)
  order = np.concatenate([random.permutation(count) for _ in range(epochs)])
  for index in order[: steps * batch_size].reshape(steps, batch_size):
    yield {name: array[index] for name, array in data.items()}


def make_optimizer(lr: float, lr_head: float, steps: int) -> optax.GradientTransformation:
  """Adam with a linear warm-up over a tenth of the steps and a cosine decay to zero; the head has its own peak rate."""

  def adam(lr: float) -> optax.GradientTransformation:
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, lr, steps // 10, steps))

  def labels(trainable: Params) -> Params:
    return {module: jax.tree.map(lambda _: module, leaves) for module, leaves in trainable.items()}

  return optax.partition({"encoder": adam(lr), "head": adam(lr_head)}, labels)


def compile_step(method: methods.Method, setup: Setup) -> methods.Program:
  """Compiles a method's step ahead of time, for all seeds."""
  loss = jaxlora.wrap(setup.task.loss, on_materialize="error")  # without adapters it is `loss` itself
  tx = make_optimizer(method.lr, method.settings["lr_head"], setup.steps)
  frozen, trainable = start(method, setup, seed=0)
  batch = next(batches(setup.task.train, setup.batch_size, setup.steps, seed=0))
  return methods.compile_program(method, tx, methods.make_step(loss, method, tx), frozen, trainable, batch)


def save(trainable: Any, path: Path) -> int:
  """Writes the trained arrays as safetensors, and returns the size of the file."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(trainable)
  named = {jax.tree_util.keystr(place, simple=True, separator="/"): np.asarray(leaf) for place, leaf in leaves}
  path.parent.mkdir(parents=True, exist_ok=True)
  save_file(named, str(path))
  return os.path.getsize(path)


def run(program: methods.Program, setup: Setup, seed: int, tick: Callable[[int], Any]) -> dict[str, Any]:
  """Trains one method from one seed, saves the trained arrays, and returns scores, the last loss and file size."""
  method = program.method
  frozen, trainable = start(method, setup, seed)
  opt_state = program.tx.init(trainable)
  for batch in batches(setup.task.train, setup.batch_size, setup.steps, seed):
    trainable, opt_state, loss = program.step(trainable, opt_state, frozen, batch)
    tick(1)
  file = setup.out / "adapters" / f"{setup.task.name}-{method.name.replace(' ', '-')}-seed{seed}.safetensors"
  size = save(trainable, file)
  if method.name == FULL:
    file.unlink()  # a copy of the whole model for every seed is too large to keep
  scores = setup.task.score(jaxlora.merge(method.join(frozen, trainable)))
  return {"seed": seed, **scores, "last_loss": float(loss), "file_bytes": size}


def time_steps(
  programs: Sequence[methods.Program], setup: Setup, rounds: int, tick: Callable[[int], Any]
) -> dict[str, dict[str, Any]]:
  """Step times over full fine-tuning's of the same round; full fine-tuning taken twice is the A/A control."""
  batch = next(batches(setup.task.train, setup.batch_size, setup.steps, seed=0))
  runs: dict[str, Callable[[], Any]] = {}
  for program in programs:
    frozen, trainable = start(program.method, setup, seed=0)
    runs[program.method.name] = functools.partial(program.step, trainable, program.tx.init(trainable), frozen, batch)
  runs = harness.with_control(runs, FULL, runs[FULL])
  return harness.ratios(harness.interleave(runs, rounds, 1, tick), over=FULL)
