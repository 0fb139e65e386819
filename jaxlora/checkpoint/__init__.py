"""Checkpoints on orbax: adapters that last, and training that resumes bit for bit.

    from jaxlora import checkpoint

    checkpoint.save("adapter", tree)                     # the adapter alone, never the base
    tree = checkpoint.load("adapter", params)            # on the base; no config needs restating

    with checkpoint.Manager("run", max_to_keep=3) as manager:
      manager.save(step, tree, opt_state, data={"index": index}, key=key)   # returns while the files are being written
      state = manager.restore(params, opt_state)         # state.step, .tree, .opt_state, .data, .key

A run of several processes (`jax.distributed`) saves together, into a folder that all of them see: every process calls
`save`, `Manager` and `Manager.save`, each writes the shards that it holds, and one that is alone is told so after two
minutes. Any number of processes, on any mesh, restores. One process alone may read (`contents`).

What is on disk (version 1). A checkpoint is a folder with one folder per step, named by its number, which appears by
one rename, complete. `save` keeps one step and numbers them itself, `Manager` keeps several. In a step:

  `record/metadata`  the manifest, JSON in UTF-8:
      format, version    "jaxlora-checkpoint", 1; a reader refuses a version above its own
      jaxlora, jax       the versions that wrote it
      leaves             of every adapted leaf: path, kind ("LoraWeight": roles, rank, alpha, scaling, dropout;
                         "FullWeight": nothing), shape of the base, and its arrays by name (a, b, value): key, shape,
                         dtype, sha256 (of the elements in C order, little-endian) or, of an array that was split over
                         processes, fingerprint (a manifest that has one is of version 2)
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
when it is read, and so is the manifest. All that cannot be read, written or made to fit is a `CheckpointError`, and no
other error is raised; what was complete before stays complete, whenever the process dies.
"""

from jaxlora._weight.fingerprint import fingerprint
from jaxlora.checkpoint._adapter import Contents, contents, load, restore, save
from jaxlora.checkpoint._errors import CheckpointError, CheckpointWarning
from jaxlora.checkpoint._manager import Manager, State

__all__ = [
  "CheckpointError",
  "CheckpointWarning",
  "Contents",
  "Manager",
  "State",
  "contents",
  "fingerprint",
  "load",
  "restore",
  "save",
]
