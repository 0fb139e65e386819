"""Folders and steps on disk, by orbax."""

from collections.abc import Mapping
import contextlib
import os
import time
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlora._base.text import listed
from jaxlora.checkpoint._arrays import Arrays, is_entry
from jaxlora.checkpoint._errors import CheckpointError, one_error
from jaxlora.checkpoint._manifest import verified, with_digest
from jaxlora.checkpoint._processes import check_shared

ADAPTER, MANIFEST, TRAINING = "adapter", "record", "training"  # folders of a step


def folder_of(path: str | os.PathLike[str]) -> epath.Path:
  text = os.fspath(path)
  return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def orbax_manager(folder: epath.Path, what: str, *, max_to_keep: int | None, asynchronous: bool, **options: Any) -> Any:
  # Unfinished steps of a process that died are removed first. Orbax's own cleaning runs beside the first save, and
  # would race with it where that save has the number of the unfinished step.
  if jax.process_index() == 0:
    clear_unfinished(folder)
  manager = ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(
      max_to_keep=max_to_keep,
      enable_async_checkpointing=asynchronous,
      **options,
    ),
  )
  check_shared(folder, folder, what)
  return manager


def check_saved(folder: epath.Path, step: int, what: str) -> None:
  """Raises where this process does not see the step that all processes have just saved."""
  check_shared(folder, folder / str(step) / MANIFEST, what)


def items(manifest: Mapping[str, Any], arrays: Arrays, state: Arrays | None = None) -> Any:
  items = {ADAPTER: ocp.args.PyTreeSave(arrays), MANIFEST: ocp.args.JsonSave(with_digest(manifest))}
  return ocp.args.Composite(**items | ({} if state is None else {TRAINING: ocp.args.PyTreeSave(state)}))


def _steps(folder: epath.Path) -> list[int]:
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def clear_unfinished(folder: epath.Path) -> None:
  """Removes the files of saves that failed; those that cannot be removed now go when the folder is next opened.

  Threads of a write that failed may still be writing: a folder that does not empty is tried again for a second.
  """
  for tries in range(_TRIES):
    left = [entry for entry in folder.iterdir() if ocp.utils.is_tmp_checkpoint(entry)] if folder.is_dir() else []
    if not left:
      return
    if tries:
      time.sleep(1 / _TRIES)
    for entry in left:
      with contextlib.suppress(OSError):
        entry.rmtree(missing_ok=True)


_TRIES = 20


def own_steps(folder: epath.Path) -> list[int]:
  """The steps in a folder that `save` may replace."""
  if not folder.exists():
    return []
  if not folder.is_dir():
    raise CheckpointError(f"save: {folder} is a file; expected a folder of its own.")
  steps = _steps(folder)
  foreign = [entry.name for entry in folder.iterdir() if not _is_step(entry)]
  if steps and not (folder / str(steps[-1]) / MANIFEST).exists():  # steps before it may be half deleted
    foreign.append(str(steps[-1]))
  if foreign:
    raise CheckpointError(
      f"save: {folder} holds other files ({listed(sorted(foreign))}); expected a folder of its own, new or saved to"
      " before."
    )
  if any((folder / str(step) / TRAINING).exists() for step in steps):
    raise CheckpointError(f"save: {folder} holds the checkpoints of a training run; save to another folder.")
  return steps


def _is_step(entry: epath.Path) -> bool:
  return entry.name.isdigit() or ocp.utils.is_tmp_checkpoint(entry)


def read_step(
  path: str | os.PathLike[str], step: int | None, training: bool = False
) -> tuple[dict[str, Any], dict[str, Any], int]:
  """The manifest, the arrays and the number of a step. Reads again where a writer replaced the latest one meanwhile."""
  folder = folder_of(path)
  if (folder / MANIFEST).is_dir() and folder.name.isdigit():
    folder, step = folder.parent, int(folder.name)
  while True:
    steps = _steps(folder)
    number = max(steps, default=None) if step is None else step
    if number not in steps or number is None:
      listing = f"steps {listed([str(step) for step in steps])}" if steps else "no complete checkpoint"
      wanted = "a checkpoint of jaxlora" if step is None else f"step {step}"
      raise CheckpointError(f"{folder}: expected {wanted}, found {listing}.")
    try:
      return *_read_step(folder / str(number), training), number
    except CheckpointError:
      if step is not None or max(_steps(folder), default=number) == number:
        raise


def _read_step(folder: epath.Path, training: bool) -> tuple[dict[str, Any], dict[str, Any]]:
  with one_error(f"{folder}: cannot be read"):
    try:
      manifest = verified(_reader(ocp.JsonCheckpointHandler).restore(folder / MANIFEST))
    except CheckpointError as error:
      raise CheckpointError(f"{folder}: {error}") from error
    if training and manifest["training"] is None:
      raise CheckpointError(f"{folder}: holds an adapter alone; expected the state of a training run.")
    arrays = _read_arrays(folder / ADAPTER, _keys(manifest["leaves"]))
    if training:
      arrays |= _read_arrays(folder / TRAINING, _keys(manifest["training"]))
  return manifest, arrays


def _reader(handler: Any) -> Any:
  """Orbax for one process: all may read, and none has to wait for another."""
  this = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
  return ocp.Checkpointer(handler(multiprocessing_options=alone), multiprocessing_options=alone)


def _keys(manifest: Any) -> set[str]:
  """The keys of the arrays that a part of a manifest names."""
  if isinstance(manifest, dict):
    own = {manifest["key"]} if is_entry(manifest) and 0 not in manifest["shape"] else set()
    return own.union(*map(_keys, manifest.values()))
  return set().union(*map(_keys, manifest)) if isinstance(manifest, list) else set()


def _read_arrays(folder: epath.Path, keys: set[str]) -> dict[str, Any]:
  if not keys:
    return {}
  how = {key: ocp.RestoreArgs(restore_type=np.ndarray) for key in keys}
  args = ocp.args.PyTreeRestore(item=dict.fromkeys(keys, 0), restore_args=how, partial_restore=True)
  return _reader(ocp.PyTreeCheckpointHandler).restore(folder, args=args)
