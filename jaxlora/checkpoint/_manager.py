"""`Manager`: the checkpoints of a training run."""

import os
import time
from typing import Any, NamedTuple

import numpy as np

from jaxlora.checkpoint._arrays import Arrays
from jaxlora.checkpoint._errors import CheckpointError, one_error
from jaxlora.checkpoint._manifest import manifest_of
from jaxlora.checkpoint._processes import together
from jaxlora.checkpoint._rebuild import rebuilt
from jaxlora.checkpoint._store import clear_unfinished, folder_of, items, orbax_manager, read_step
from jaxlora.checkpoint._training import key_of, optimizer_state, training_entry


class State(NamedTuple):
  """What `Manager.restore` returns.

  Attributes:
    step: the number of the step.
    tree: the adapted tree.
    opt_state: the optimizer state, or `None` where no template was given.
    data: the data position, as it was saved.
    key: the random key, or the dict of them; `None` where none was saved.
    metadata: the user's dict.
  """

  step: int
  tree: Any
  opt_state: Any
  data: Any
  key: Any
  metadata: dict[str, Any]


class Manager:
  """An orbax `CheckpointManager` set up for adapters: adapter, optimizer state, step, data position and random keys.

  Saving returns as soon as the values are copied to the host; the files are written in the background, one step at a
  time, and a step appears by one rename, complete. An error of a write is raised by the next call, `wait` or `close`.

  Its verbs are orbax's, `save` and `restore`: it restores a run to where it stood, step number, optimizer, data and
  keys included, where `checkpoint.load` loads an adapter alone.

  Args:
    path: the folder of the run; missing parents are made.
    max_to_keep: how many of the latest steps stay; `None` keeps all.
    save_interval_steps: `save` skips steps that are no multiple of it.
    asynchronous: whether `save` returns before the files are written.

  Attributes:
    orbax: the `orbax.checkpoint.CheckpointManager` itself.

  Raises:
    CheckpointError: if the folder cannot be made; from the methods, see there.

  Example:
    >>> import tempfile, jax, jax.numpy as jnp, jaxlora, optax
    >>> params = {"dense": {"kernel": jnp.ones((16, 8))}}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> opt_state = optax.adam(1e-3).init(jaxlora.split(tree)[1])
    >>> with tempfile.TemporaryDirectory() as folder, Manager(folder + "/run") as manager:
    ...   saved = manager.save(10, tree, opt_state, data={"index": 320}, key=jax.random.key(1))
    ...   state = manager.restore(params, opt_state)
    >>> saved, state.step, state.data
    (True, 10, {'index': 320})
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    max_to_keep: int | None = 3,
    save_interval_steps: int = 1,
    asynchronous: bool = True,
  ):
    self._folder = folder_of(path)
    together(f"Manager: {self._folder}")
    with one_error(f"Manager: {self._folder}: cannot be opened"):
      self.orbax = orbax_manager(
        self._folder,
        "Manager",
        max_to_keep=max_to_keep,
        asynchronous=asynchronous,
        save_interval_steps=save_interval_steps,
      )

  def save(
    self,
    step: int,
    tree: Any,
    opt_state: Any = None,
    *,
    data: Any = None,
    key: Any = None,
    metadata: dict[str, Any] | None = None,
    force: bool = False,
  ) -> bool:
    """Saves a step.

    Args:
      step: its number; larger than the latest one.
      tree: what `adapt` returned, in training; the whole tree.
      opt_state: any pytree of arrays: the optimizer's state, or a tuple of it and others (batch statistics, averages).
      data: the position in the data: anything JSON gives back as it is, such as `{"epoch": 1, "index": 640}`, a grain
        iterator's state, or `rng.bit_generator.state` of a NumPy generator.
      key: the random key, or a dict of them.
      metadata: as for `save`.
      force: saves though `save_interval_steps` would skip the step.

    Returns:
      Whether the step is being saved, or was skipped.

    Raises:
      CheckpointError: as `save`; if the step is not above the latest; if the write before this one failed, which lost
        that step and no other.
    """
    if type(step) is not int or step < 0:
      step = _step_number(step)
    arrays: Arrays = {}
    with one_error(f"Manager.save: {self._folder}: step {step} cannot be written; earlier steps stand", self._reload):
      latest = self.orbax.latest_step()
      if latest is not None and step <= latest:
        raise CheckpointError(
          f"Manager.save: {self._folder}: found step {step}, expected one above the latest, {latest}. To go on from an"
          " earlier step, delete the later ones first (manager.orbax.delete(step)), or use another folder."
        )
      if not (force or self.orbax.should_save(step)):
        return False
      together(f"Manager.save: {self._folder}: step {step}")
      manifest = manifest_of(tree, metadata or {}, arrays) | {"whole_base": True}
      state: Arrays = {}
      manifest["training"] = training_entry(step, opt_state, data, key, state)
      return bool(self.orbax.save(step, args=items(manifest, arrays, state), force=True))

  def restore(self, params: Any, opt_state: Any = None, *, step: int | None = None, strict: bool = True) -> State:
    """Restores a step, bit for bit.

    Args:
      params: the base, as for `load`.
      opt_state: a template of the optimizer state: one of the same structure, or a function that makes one of the
        restored tree, such as `lambda tree: tx.init(jaxlora.split(tree)[1])`. Leaves get the template's shardings.
        `None` leaves the optimizer state out.
      step: `None` means the latest.
      strict: as for `load`.

    Raises:
      CheckpointError: as `load`; if the template is of another structure, naming the leaves.
    """
    self.wait()
    manifest, arrays, number = read_step(self._folder, step, training=True)
    what = f"Manager.restore: {self._folder}: step {number}"
    training = manifest["training"]
    tree = rebuilt(manifest, arrays, params, strict, what)
    with one_error(f"{what}: cannot be read"):
      template = opt_state(tree) if callable(opt_state) else opt_state
      state = None if template is None else optimizer_state(template, training["optimizer"], arrays, what)
      key = key_of(training, arrays)
    return State(number, tree, state, training["data"], key, manifest["metadata"])

  def latest_step(self) -> int | None:
    """The latest complete step, or `None`."""
    self.wait()
    return self.orbax.latest_step()

  def all_steps(self) -> list[int]:
    """The complete steps, in order."""
    self.wait()
    return sorted(self.orbax.all_steps())

  def wait(self) -> None:
    """Waits until what is being saved is on disk, or raises the `CheckpointError` that says why it is not."""
    with one_error(f"Manager: {self._folder}: a step could not be written; earlier steps stand", self._reload):
      self.orbax.wait_until_finished()
      self.orbax.check_for_errors()

  def close(self) -> None:
    """Waits, and ends the threads."""
    try:
      self.wait()
    finally:
      with one_error(f"Manager: {self._folder}: cannot be closed"):
        self.orbax.close()

  def __enter__(self) -> "Manager":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def _reload(self) -> None:
    """Forgets a step whose write failed: orbax still lists it, and its files still take room."""
    self.orbax.reload()
    clear_unfinished(self._folder)
    time.sleep(0.05)  # a thread of that write may make its folder once more
    clear_unfinished(self._folder)


def _step_number(step: Any) -> int:
  """A step that is an array, as counters of training loops often are, as a number."""
  try:
    number = int(np.asarray(step).item() if np.asarray(step).dtype.kind in "iu" else -1)
  except (TypeError, ValueError):
    number = -1
  if number < 0:
    raise CheckpointError(f"Manager.save: step is {step!r}, expected a whole number of at least 0.")
  return number
