"""Checkpoints on orbax: adapters that last, and training that resumes bit for bit.

    from jaxlora import checkpoint

    checkpoint.save("adapter", tree)                     # the adapter alone, never the base
    tree = checkpoint.restore("adapter", params)         # on the base; no config needs restating

    with checkpoint.Manager("run", max_to_keep=3) as manager:
      manager.save(step, tree, opt_state, data={"index": index}, key=key)   # returns while the files are being written
      state = manager.restore(params, opt_state)         # state.step, .tree, .opt_state, .data, .key

What is on disk (version 1). A checkpoint is a folder with one folder per step, named by its number; it comes to be by
one rename, complete. `save` keeps one step and numbers them itself, `Manager` keeps several. In a step:

  `record/metadata`  JSON, UTF-8:
      format, version    "jaxlora-checkpoint", 1; a reader refuses a version above its own
      jaxlora, jax       the versions that wrote it
      leaves             of every adapted leaf: path, kind ("LoraWeight": roles, rank, alpha, scaling, dropout;
                         "FullWeight": nothing), shape of the base, and its arrays by name (a, b, value): key, shape,
                         dtype, sha256 (of the elements in C order, little-endian)
      base               of every leaf of the base: path, shape, dtype, digest (`fingerprint` has the formula; empty
                         where the base had no values)
      whole_base         false where only a part of the base was known (an adapter converted from PEFT)
      metadata           the user's dict
      training           null, or step, data (JSON), keys and optimizer (path and array of each leaf)
      sha256             of the rest: json.dumps(rest, sort_keys=True, separators=(",", ":"))
  `adapter/`         the arrays by key: an orbax PyTree checkpoint of a flat dict (zarr arrays in tensorstore's OCDBT)
  `training/`        the same with the optimizer state and the keys, in training checkpoints alone

Dtypes that NumPy does not have are stored as their bytes (uint8), bfloat16 aside. The delta of a leaf is
`scale * sum_r a[..., r, in] b[..., r, out]`, as `jaxlora.LoraWeight` says. Every array is checked against its digest
when it is read, and so is the record. What cannot be read, written or made to fit raises `CheckpointError`, and nothing
else does; what was complete before stays complete, whenever the process dies.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import os
from typing import Any, NamedTuple
import warnings

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxlora import _paths
from jaxlora._axes import RANK, factor_axes
from jaxlora._fingerprint import Print, dtype_name, fingerprint, prints, shape_of
from jaxlora._record import (
  Arrays,
  CheckpointError,
  check_json,
  entry_of,
  keys_of,
  keys_record,
  node_of,
  opened,
  record_of,
  sealed,
  value_of,
  wrapped,
)
from jaxlora._serialization import register_with_flax
from jaxlora._targets import listed
from jaxlora._weight import LoraWeight, is_adapted, parts, with_parts

__all__ = [
  "CheckpointError",
  "CheckpointWarning",
  "Contents",
  "Manager",
  "State",
  "contents",
  "fingerprint",
  "restore",
  "save",
]

_ADAPTER, _RECORD, _TRAINING = "adapter", "record", "training"


class CheckpointWarning(UserWarning):
  """What `restore(..., strict=False)` left out or took with doubts.

  Attributes:
    problems: one line per leaf.
  """

  def __init__(self, message: str, problems: tuple[str, ...] = ()):
    super().__init__(message)
    self.problems = problems


# ----------------------------------------------------------------------------------------------------------------------
# One adapter in one folder.


def save(path: str | os.PathLike[str], tree: Any, *, metadata: dict[str, Any] | None = None) -> None:
  """Saves the adapter of a tree: factors, leaves trained whole, what each leaf is, and a fingerprint of the base.

  The base itself is never written. A checkpoint that is at `path` already is replaced once the new one is complete: a
  process that dies at any moment leaves the one or the other. Arrays that are sharded or on devices are brought to the
  host; the base is not, see `fingerprint` for what its digest costs.

  Args:
    path: the folder; missing parents are made.
    tree: what `adapt` returned, trained or not; the whole tree, not a half.
    metadata: anything JSON gives back as it is, for you to find again in `contents(path).metadata`.

  Raises:
    CheckpointError: if the tree has no adapter or is a half, if `metadata` is not JSON, if `path` holds other files or
      the checkpoints of a training run, or if it cannot be written (no space, no permission); an earlier checkpoint
      stands.

  Example:
    >>> import tempfile, jax, jax.numpy as jnp, jaxlora
    >>> params = {"dense": {"kernel": jnp.ones((16, 8))}}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save(folder + "/adapter", tree, metadata={"task": "summaries"})
    ...   back = restore(folder + "/adapter", params)
    >>> back["dense"]["kernel"].rank, bool((back["dense"]["kernel"].a == tree["dense"]["kernel"].a).all())
    (2, True)
  """
  save_part(path, tree, metadata=metadata, whole_base=True)


def save_part(path: Any, tree: Any, *, metadata: dict[str, Any] | None, whole_base: bool) -> None:
  """`save` of a tree that may hold a part of its base alone: what else a base holds is no difference then."""
  folder = _folder(path)
  arrays: Arrays = {}
  record = record_of(tree, metadata or {}, arrays) | {"training": None, "whole_base": whole_base}
  with _one_error(
    f"save: {folder}: cannot be written; what was there before stands", lambda: _clear_unfinished(folder)
  ):
    steps = _own_steps(folder)
    with contextlib.closing(_orbax_manager(folder, max_to_keep=1, asynchronous=False)) as manager:
      manager.save(max(steps, default=-1) + 1, args=_items(record, arrays), force=True)


def restore(path: str | os.PathLike[str], params: Any, *, step: int | None = None, strict: bool = True) -> Any:
  """Rebuilds an adapted tree from a checkpoint and its base.

  The base's leaves are those of `params`, untouched. Factors are sharded as their base is: an axis of a factor goes
  where the base's axis goes, the rank on every device; leaves trained whole go where their base is.

  Args:
    path: the folder that `save` or `Manager` wrote, or one step in it.
    params: the base: the parameters that the adapter was trained on, in any containers. Leaves that are
      `jax.ShapeDtypeStruct`s are checked by shape and dtype alone.
    step: which step of a training run; `None` means the latest.
    strict: whether a base that differs is an error. If not, whatever fits its place is loaded, and a
      `CheckpointWarning` lists the rest: adapted leaves that are missing or have another shape are left out, bases of
      another dtype or with other values are taken all the same.

  Returns:
    A tree of `params`' nesting, as `adapt` returns it.

  Raises:
    CheckpointError: if there is no checkpoint, if it is damaged, or if the base is another one, naming the leaves; if
      no adapted leaf fits, even where not strict.
  """
  record, arrays, _ = _read(path, step)
  return _rebuilt(record, arrays, params, strict, f"restore: {os.fspath(path)}")


class Contents(NamedTuple):
  """What a checkpoint holds, read without its base.

  Attributes:
    leaves: path -> `LoraWeight` or `FullWeight` with NumPy arrays, and a `jax.ShapeDtypeStruct` as the base.
    base: path -> `"dtype[shape]:digest"` of every leaf of the base, as `fingerprint` writes it.
    metadata: the user's dict.
    step: the number of the step.
    training: whether it holds the state of a training run, too.
    versions: of the format, jaxlora and jax, by name.
  """

  leaves: dict[str, Any]
  base: dict[str, str]
  metadata: dict[str, Any]
  step: int
  training: bool
  versions: dict[str, Any]


def contents(path: str | os.PathLike[str], *, step: int | None = None) -> Contents:
  """Reads a checkpoint without its base.

  Args:
    path, step: as for `restore`.

  Raises:
    CheckpointError: if there is no checkpoint, or it is damaged.
  """
  record, arrays, number = _read(path, step)
  known = {leaf["path"]: leaf for leaf in record["base"]}
  leaves = {
    leaf["path"]: node_of(leaf, arrays, _abstract(leaf["shape"], known.get(leaf["path"], {}).get("dtype", "float32")))
    for leaf in record["leaves"]
  }
  base = {name: str(_print(leaf)) for name, leaf in known.items()}
  versions = {name: record[name] for name in ("version", "jaxlora", "jax")}
  return Contents(leaves, base, record["metadata"], number, record["training"] is not None, versions)


def _abstract(shape: Any, dtype: str) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Training state.


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

  Saving returns as soon as the values are copied to the host; the files are written behind your back, one step at a
  time, and a step comes to be by one rename. The last error of a write is raised by the next call, `wait` or `close`.

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
    self._folder = _folder(path)
    with _one_error(f"Manager: {self._folder}: cannot be opened"):
      self.orbax = _orbax_manager(
        self._folder, max_to_keep=max_to_keep, asynchronous=asynchronous, save_interval_steps=save_interval_steps
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
      data: where the data stand: anything JSON gives back as it is, such as `{"epoch": 1, "index": 640}`, a grain
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
    with _one_error(f"Manager.save: {self._folder}: step {step} cannot be written; earlier steps stand", self._reload):
      latest = self.orbax.latest_step()
      if latest is not None and step <= latest:
        raise CheckpointError(
          f"Manager.save: {self._folder}: found step {step}, expected one above the latest, {latest}. To go on from an"
          " earlier step, delete the later ones first (manager.orbax.delete(step)), or use another folder."
        )
      if not (force or self.orbax.should_save(step)):
        return False
      record = record_of(tree, metadata or {}, arrays) | {"whole_base": True}
      check_json(data, "data")
      state: Arrays = {"step": np.asarray(step)}
      record["training"] = {
        "step": step,
        "data": data,
        "keys": None if key is None else keys_record(key, "key", state),
        "optimizer": [
          {"path": path, "array": _state_entry(path, leaf, f"optimizer_{k}", state)}
          for k, (path, leaf) in enumerate(_paths.flatten(opt_state)[0])
        ],
      }
      return bool(self.orbax.save(step, args=_items(record, arrays, state), force=True))

  def restore(self, params: Any, opt_state: Any = None, *, step: int | None = None, strict: bool = True) -> State:
    """Restores a step, bit for bit.

    Args:
      params: the base, as for `restore`.
      opt_state: a template of the optimizer state: one of the same structure, or a function that makes one of the
        restored tree, such as `lambda tree: tx.init(jaxlora.split(tree)[1])`. Leaves get the template's shardings.
        `None` leaves the optimizer state out.
      step: `None` means the latest.
      strict: as for `restore`.

    Raises:
      CheckpointError: as `restore`; if the template is of another structure, naming the leaves.
    """
    self.wait()
    record, arrays, number = _read(self._folder, step, training=True)
    what = f"Manager.restore: {self._folder}: step {number}"
    training = record["training"]
    tree = _rebuilt(record, arrays, params, strict, what)
    with _one_error(f"{what}: cannot be read"):
      template = opt_state(tree) if callable(opt_state) else opt_state
      state = None if template is None else _filled(template, training["optimizer"], arrays, what)
      key = None if training["keys"] is None else keys_of(training["keys"], arrays)
    return State(number, tree, state, training["data"], key, record["metadata"])

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
    with _one_error(f"Manager: {self._folder}: a step could not be written; earlier steps stand", self._reload):
      self.orbax.wait_until_finished()
      self.orbax.check_for_errors()

  def close(self) -> None:
    """Waits, and ends the threads."""
    try:
      self.wait()
    finally:
      with _one_error(f"Manager: {self._folder}: cannot be closed"):
        self.orbax.close()

  def __enter__(self) -> "Manager":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def _reload(self) -> None:
    """After a failure orbax still lists the step that failed, and its files still take room."""
    self.orbax.reload()
    _clear_unfinished(self._folder)


def _step_number(step: Any) -> int:
  """Counters of training loops are arrays, often."""
  try:
    number = int(np.asarray(step).item() if np.asarray(step).dtype.kind in "iu" else -1)
  except (TypeError, ValueError):
    number = -1
  if number < 0:
    raise CheckpointError(f"Manager.save: step is {step!r}, expected a whole number of at least 0.")
  return number


def _state_entry(path: str, leaf: Any, key: str, arrays: Arrays) -> dict[str, Any]:
  try:
    return entry_of(leaf, key, arrays)
  except CheckpointError as error:
    raise CheckpointError(f"Manager.save: opt_state: {path}: {error}") from error


def _filled(template: Any, saved: list[Any], arrays: Mapping[str, Any], what: str) -> Any:
  """The saved optimizer state in the structure of a template."""
  leaves, treedef = _paths.flatten(template)
  entries = {item["path"]: item["array"] for item in saved}
  found = {path: (tuple(entry["shape"]), entry["dtype"], entry.get("impl")) for path, entry in entries.items()}
  expected = {path: _signature(leaf) for path, leaf in leaves}
  if found != expected:
    differing = [path for path in {**found, **expected} if found.get(path) != expected.get(path)]
    raise CheckpointError(
      f"{what}: the optimizer state is of another structure than opt_state. Differing: "
      + listed([f"{p} (saved {_said(found.get(p))}, expected {_said(expected.get(p))})" for p in differing])
      + ". Make the template with the optimizer that was saved, for the same tree."
    )
  return jax.tree_util.tree_unflatten(
    treedef, [_like(leaf, entries[path], value_of(entries[path], arrays, path)) for path, leaf in leaves]
  )


def _signature(leaf: Any) -> tuple[tuple[int, ...], str, str | None]:
  if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    data = jax.eval_shape(jax.random.key_data, leaf)
    return tuple(data.shape), str(data.dtype), str(jax.random.key_impl(leaf))
  return shape_of(leaf), dtype_name(leaf), None


def _said(signature: Any) -> str:
  return "nothing" if signature is None else f"{signature[1]}{list(signature[0])}"


def _like(leaf: Any, entry: Mapping[str, Any], value: np.ndarray) -> Any:
  if isinstance(leaf, bool | int | float | complex):
    return type(leaf)(value.item())
  if isinstance(leaf, np.ndarray | np.generic):
    return value
  array = wrapped(entry, value)
  return _placed(array, leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None)


# ----------------------------------------------------------------------------------------------------------------------
# The tree on its base.


def _rebuilt(record: Mapping[str, Any], arrays: Mapping[str, Any], params: Any, strict: bool, what: str) -> Any:
  register_with_flax()
  nodes, treedef = _paths.flatten(params, is_leaf=is_adapted)
  if adapted := [path for path, node in nodes if is_adapted(node)]:
    raise CheckpointError(
      f"{what}: {adapted[0]} is adapted; expected the base alone. Pass jaxlora.strip(tree), or the original parameters."
    )
  leaves = dict(nodes)
  problems = list(_differences(record, params))
  new = dict(leaves)
  with _one_error(f"{what}: cannot be read"):
    for leaf in record["leaves"]:
      base = leaves.get(leaf["path"])
      if leaf["path"] in leaves and list(shape_of(base)) == leaf["shape"]:
        new[leaf["path"]] = _on_base(node_of(leaf, arrays, base))
  if problems and strict:
    raise CheckpointError(
      f"{what}: this is not the base that the adapter was trained on. {_lines(problems)} Pass that base; strict=False"
      " loads what fits and warns of the rest."
    )
  if not any(is_adapted(node) for node in new.values()):
    raise CheckpointError(f"{what}: no adapted leaf of the checkpoint fits the base. {_lines(problems)}")
  if problems:
    warnings.warn(
      CheckpointWarning(f"{what}: loaded what fits a base that differs. {_lines(problems)}", tuple(problems)),
      stacklevel=3,
    )
  return jax.tree_util.tree_unflatten(treedef, list(new.values()))


def _lines(problems: list[str]) -> str:
  shown = problems[:20]
  return "; ".join(shown) + (f"; and {len(problems) - len(shown)} more." if len(problems) > len(shown) else ".")


def _differences(record: Mapping[str, Any], params: Any) -> Iterator[str]:
  """How a base differs from the recorded one, a line per leaf."""
  adapted = {leaf["path"] for leaf in record["leaves"]}
  expected = {leaf["path"]: _print(leaf) for leaf in record["base"]}
  found = prints(params)
  for path, old in expected.items():
    role = "adapted" if path in adapted else "frozen"
    new = found.get(path)
    if new is None:
      yield f"{path} ({role}): missing in the base"
    elif new.shape != old.shape:
      yield f"{path} ({role}): shape {new.shape}, expected {old.shape}"
    elif new.dtype != old.dtype:
      yield f"{path} ({role}): dtype {new.dtype}, expected {old.dtype}"
    elif new.digest and old.digest and new.digest != old.digest:
      yield f"{path} ({role}): other values (fingerprint {new.digest}, expected {old.digest})"
  for path in found:
    if record["whole_base"] and path not in expected:
      yield f"{path}: only in the base given, not in the one of the checkpoint"


def _print(leaf: Mapping[str, Any]) -> Print:
  return Print(leaf["dtype"], tuple(leaf["shape"]), leaf["digest"])


def _on_base(node: Any) -> Any:
  """The node with its NumPy arrays on the base's devices."""
  held = {name: part for name, part in parts(node).items() if name != "base" and part is not None}
  placed = {
    name: _placed(wrapped({"key": name}, part), _sharding(node, name, np.ndim(part))) for name, part in held.items()
  }
  return with_parts(node, placed)


def _axes_of(node: Any, part: str) -> tuple[Any, ...]:
  """Which axes of the weight a part holds, as its shape tells; none where it is laid out in another way."""
  if not isinstance(node, LoraWeight):
    return ()
  for own in "io":
    axes = factor_axes(node.roles, own)
    found = np.shape(parts(node)[part])
    if len(axes) == len(found) and all(d == RANK or node.shape[d] == n for d, n in zip(axes, found, strict=True)):
      return axes
  return ()


def _placed(array: jax.Array, sharding: Any) -> jax.Array:
  return array if sharding is None else jax.device_put(array, sharding)


def _sharding(node: Any, part: str, ndim: int) -> Any:
  """Where a part goes: its axes where the base's go, whatever the base does not have on every device of the base."""
  base = node.base
  if isinstance(base, jax.Array) and not base.committed:
    return None
  sharding = getattr(base, "sharding", None)
  if isinstance(sharding, jax.sharding.SingleDeviceSharding) or (part == "value" and sharding is not None):
    return sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    spec = (*sharding.spec, *[None] * (len(node.shape) - len(sharding.spec)))
    own = [spec[d] if isinstance(d, int) else None for d in _axes_of(node, part)] or [None] * ndim
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*own), memory_kind=sharding.memory_kind)
  if sharding is None:
    return None
  mesh = jax.sharding.Mesh(np.array(sorted(sharding.device_set, key=lambda device: device.id)), "devices")
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


# ----------------------------------------------------------------------------------------------------------------------
# Files.


@contextlib.contextmanager
def _one_error(doing: str, after: Callable[[], None] | None = None) -> Iterator[None]:
  """Turns whatever goes wrong on disk, in orbax or in tensorstore into a `CheckpointError` that says what was tried."""
  try:
    yield
  except CheckpointError:
    raise
  except Exception as error:
    if after is not None:
      with contextlib.suppress(Exception):
        after()
    reason = " ".join(str(error).split())[:300]
    raise CheckpointError(f"{doing}: {type(error).__name__}: {reason}") from error


def _folder(path: str | os.PathLike[str]) -> epath.Path:
  text = os.fspath(path)
  return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def _orbax_manager(folder: epath.Path, *, max_to_keep: int | None, asynchronous: bool, **options: Any) -> Any:
  # What a process that died left behind goes first: orbax's own cleaning runs beside the first save, and the two meet
  # where that save has the very step that was not finished.
  if jax.process_index() == 0:
    _clear_unfinished(folder)
  return ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(
      max_to_keep=max_to_keep,
      enable_async_checkpointing=asynchronous,
      **options,
    ),
  )


def _items(record: Mapping[str, Any], arrays: Arrays, state: Arrays | None = None) -> Any:
  items = {_ADAPTER: ocp.args.PyTreeSave(arrays), _RECORD: ocp.args.JsonSave(sealed(record))}
  return ocp.args.Composite(**items | ({} if state is None else {_TRAINING: ocp.args.PyTreeSave(state)}))


def _steps(folder: epath.Path) -> list[int]:
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def _clear_unfinished(folder: epath.Path) -> None:
  """Removes what a save that failed has written; what is left all the same goes when the folder is next opened."""
  for entry in folder.iterdir() if folder.is_dir() else ():
    if ocp.utils.is_tmp_checkpoint(entry):
      entry.rmtree(missing_ok=True)


def _own_steps(folder: epath.Path) -> list[int]:
  """The steps in a folder that `save` may replace."""
  if not folder.exists():
    return []
  if not folder.is_dir():
    raise CheckpointError(f"save: {folder} is a file; expected a folder of its own.")
  steps = _steps(folder)
  foreign = [entry.name for entry in folder.iterdir() if not _is_step(entry)]
  if steps and not (folder / str(steps[-1]) / _RECORD).exists():  # of earlier ones some files may be deleted already
    foreign.append(str(steps[-1]))
  if foreign:
    raise CheckpointError(
      f"save: {folder} holds other files ({listed(sorted(foreign))}); expected a folder of its own, new or saved to"
      " before."
    )
  if any((folder / str(step) / _TRAINING).exists() for step in steps):
    raise CheckpointError(f"save: {folder} holds the checkpoints of a training run; save to another folder.")
  return steps


def _is_step(entry: epath.Path) -> bool:
  return entry.name.isdigit() or ocp.utils.is_tmp_checkpoint(entry)


def _read(
  path: str | os.PathLike[str], step: int | None, training: bool = False
) -> tuple[dict[str, Any], dict[str, Any], int]:
  """The record and the arrays of a step; the latest one again where a writer replaced it in between."""
  folder = _folder(path)
  if (folder / _RECORD).is_dir() and folder.name.isdigit():
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
  with _one_error(f"{folder}: cannot be read"):
    try:
      record = opened(ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / _RECORD))
    except CheckpointError as error:
      raise CheckpointError(f"{folder}: {error}") from error
    if training and record["training"] is None:
      raise CheckpointError(f"{folder}: holds an adapter alone; expected the state of a training run.")
    arrays = _read_arrays(folder / _ADAPTER, _keys(record["leaves"]))
    if training:
      arrays |= _read_arrays(folder / _TRAINING, _keys(record["training"]))
  return record, arrays


def _keys(record: Any) -> set[str]:
  """The keys of the arrays that a piece of a record names."""
  if isinstance(record, dict):
    own = {record["key"]} if "sha256" in record and 0 not in record["shape"] else set()
    return own.union(*map(_keys, record.values()))
  return set().union(*map(_keys, record)) if isinstance(record, list) else set()


def _read_arrays(folder: epath.Path, keys: set[str]) -> dict[str, Any]:
  if not keys:
    return {}
  how = {key: ocp.RestoreArgs(restore_type=np.ndarray) for key in keys}
  args = ocp.args.PyTreeRestore(item=dict.fromkeys(keys, 0), restore_args=how, partial_restore=True)
  return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(folder, args=args)
