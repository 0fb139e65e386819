"""Pretraining of the base on running text, kept on disk so that an interrupted one goes on."""

from collections.abc import Callable, Iterator
import inspect
import itertools
from pathlib import Path
from typing import Any

from flax import serialization
import numpy as np

from studies import harness

from . import decoder
from .decoder import Decoder, Params
from .steps import init_adam, make_step, schedule, text_loss
from .tokens import WINDOW, Data

KEEP = 100  # steps between two writes of the state


def windows(stream: np.ndarray, batch_size: int, steps: int) -> Iterator[np.ndarray]:
  """Batches of pieces of the stream, at random positions that are always the same."""
  rng = np.random.default_rng(0)
  for _ in range(steps):
    starts = rng.integers(0, len(stream) - WINDOW, batch_size)
    yield stream[starts[:, None] + np.arange(WINDOW + 1)]


def pretrain(
  model: Decoder, data: Data, steps: int, batch_size: int, lr: float, cache: Path | None, tick: Callable[[int], Any]
) -> tuple[Params, str]:
  """Pretrained parameters and their digest.

  Args:
    model: to pretrain.
    data: whose `stream` is trained on.
    steps: of training.
    batch_size: pieces per step.
    lr: the peak learning rate.
    cache: the folder where the state of training is kept every `KEEP` steps; None keeps nothing.
    tick: called with the number of steps done.
  """
  source = [inspect.getsource(part) for part in (decoder.Attention, decoder.Block, Decoder)]
  settings = {"model": model.settings(), "steps": steps, "batch_size": batch_size, "lr": lr, "source": source}
  name = harness.digest(settings, [data.stream])
  path = cache / f"decoder-{name}.msgpack" if cache else None
  params = decoder.init(model, seed=0)
  state = {"params": params, "adam": init_adam(params), "done": 0}
  if path and path.exists():
    state = serialization.from_bytes(state, path.read_bytes())
  done = state["done"]
  tick(done)
  if done == steps:
    return state["params"], name
  step = make_step(lambda params, frozen, pieces: text_loss(model.apply, params, pieces))
  plan = zip(windows(data.stream, batch_size, steps), schedule(lr, steps), strict=True)
  for pieces, rate in itertools.islice(plan, done, None):
    params, adam, _ = step(state["params"], state["adam"], {}, pieces, rate)
    state = {"params": params, "adam": adam, "done": state["done"] + 1}
    tick(1)
    if path and (state["done"] % KEEP == 0 or state["done"] == steps):
      write(path, serialization.to_bytes(state))
  return state["params"], name


def write(path: Path, content: bytes) -> None:
  """Writes a temporary file and renames it: a reader sees the old file or the new one, never a part."""
  partial = path.with_suffix(".partial")
  partial.write_bytes(content)
  partial.replace(path)
