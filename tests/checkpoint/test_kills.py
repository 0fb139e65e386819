"""Killed while saving: the latest complete checkpoint restores."""

import os
import random
import signal
import time

import numpy as np
import pytest

from jaxlora import checkpoint
from jaxlora.checkpoint import Manager
from tests.helpers.forks import numbered

KILLS = 25  # for each of the two ways to save


@pytest.mark.parametrize("job", ["save_on", "train_on"])
def test_killed_at_any_moment_the_latest_complete_checkpoint_restores(tmp_path, forks, job):
  """A process that saves the numbers 1, 2, 3, ... is killed again and again, and another goes on where it stopped."""
  rng, path = random.Random(job), tmp_path / "a"
  params, _ = numbered(0)
  latest, in_the_middle, length = 0, 0, 0.0
  for kill in range(KILLS + 1):
    lines = forks.run(job, str(path), *([latest] if job == "save_on" else []))
    pid, ready = next(lines), next(lines)
    assert (pid[0], ready) == ("pid", ["ready"])
    started = time.monotonic()
    said = []
    if not kill:  # the first one tells how long a save takes
      said = [next(lines), next(lines), next(lines)]
      length = (time.monotonic() - started) / 3
    time.sleep(rng.uniform(0, 2 * length))
    os.kill(pid[1], signal.SIGKILL)
    said += list(lines)
    assert said[-1] == ["gone", signal.SIGKILL]
    in_the_middle += any("tmp" in name for name in os.listdir(path))
    acknowledged = max([latest, *(line[1] for line in said[:-1])])
    if job == "save_on":
      tree = checkpoint.restore(path, params)
      numbers = [checkpoint.contents(path).metadata["number"]]
    else:
      with Manager(path, max_to_keep=2) as manager:
        state = manager.restore(params, {"moment": np.zeros((2, 8), np.float32)})
      tree = state.tree
      numbers = [state.step, state.data["number"], *np.unique(state.opt_state["moment"])]
      assert np.array_equal(state.key, [0, 7])
    factors = [np.asarray(part) for layer in tree.values() for part in (layer["kernel"].a, layer["kernel"].b)]
    numbers += [number for factor in factors for number in np.unique(factor)]
    assert len(set(numbers)) == 1  # of one save
    assert numbers[0] in (acknowledged, acknowledged + 1, acknowledged + 2)  # no completed save is lost
    latest = int(numbers[0])
  assert in_the_middle >= KILLS // 4
  assert latest >= 3
