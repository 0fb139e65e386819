"""Modules of some rows of another, and of the rows of several: exact, as no product is formed."""

from collections.abc import Sequence
import dataclasses
import itertools

import numpy as np

from jaxlora._weight.weight import UNIT_SCALE
from jaxlora.peft._records import Module


def take(module: Module, rows: np.ndarray, name: str) -> Module:
  """The module of some rows of another: the same A, and those rows of B.

  Components of the rank that serve other rows alone (zero here, and not there) are left out: they came from joining.

  Raises:
    ValueError: if there are no such rows.
  """
  others = np.ones(len(module.b), bool)
  others[rows] = False
  b = module.b[rows]
  nonzero, elsewhere = (np.any(x.reshape(len(x), module.rank) != 0, axis=0) for x in (b, module.b[others]))
  kept = nonzero | ~elsewhere
  if not kept.any():
    kept[:] = True
  rank = int(kept.sum())
  return Module(
    name,
    module.kind,
    module.a if rank == module.rank else module.a[kept],
    b if rank == module.rank else b[:, kept],
    module.alpha if rank == module.rank else module.scale * UNIT_SCALE[module.scaling](rank),
    module.scaling,
    None if module.magnitude is None else _shaped_norms(module.magnitude.reshape(-1)[rows], module.magnitude),
  )


def join(parts: Sequence[tuple[Module | None, np.ndarray]], count: int, name: str) -> Module:
  """One module of `count` rows made of modules for some of them: every A below the other, and B in blocks.

  Modules with one A and one scale share it. Rows without a module have zeros in B.

  Raises:
    ValueError: if the modules are not of one kind.
  """
  held = [(module, rows) for module, rows in parts if module is not None]
  first = held[0][0]
  _check_alike([module for module, _ in held], whole=len(held) == len(parts))
  own: list[Module] = []  # the first module with each A
  for module, _ in held:
    if _sharing(module, own) is None:
      own.append(module)
  starts = [0, *itertools.accumulate(module.rank for module in own)]
  rank, scale = starts[-1], first.scale
  b = np.zeros((count, rank, *first.b.shape[2:]), np.result_type(*(module.b.dtype for module, _ in held)))
  for module, rows in held:
    k = _sharing(module, own)
    assert k is not None
    ratio = module.scale / scale
    b[rows, starts[k] : starts[k + 1]] = module.b if ratio == 1 else module.b * b.dtype.type(ratio)
  magnitude = None
  if first.magnitude is not None:
    norms = np.zeros(count, first.magnitude.dtype)
    for module, rows in held:
      assert module.magnitude is not None
      norms[rows] = module.magnitude.reshape(-1)
    magnitude = _shaped_norms(norms, first.magnitude)
  alpha = first.alpha if rank == first.rank else scale * UNIT_SCALE[first.scaling](rank)
  a = first.a if len(own) == 1 else np.concatenate([module.a for module in own])
  return Module(name, first.kind, a, b, alpha, first.scaling, magnitude)


def times(module: Module, factor: float | None) -> Module:
  """The module of a weight that is so many times another's."""
  if factor is None:
    return module
  magnitude = None if module.magnitude is None else tensor_times(module.magnitude, abs(factor))
  return dataclasses.replace(module, b=tensor_times(module.b, factor), magnitude=magnitude)


def tensor_times(tensor: np.ndarray, factor: float | None) -> np.ndarray:
  """A tensor times a number, rounded to its own dtype; integers stand in for tensors, and stay what they are."""
  if factor is None or tensor.dtype.kind in "iub":
    return tensor
  return (tensor.astype(np.result_type(np.float32, tensor.dtype)) * factor).astype(tensor.dtype)


def _sharing(module: Module, own: Sequence[Module]) -> int | None:
  """Which of some modules has this one's A and scale."""
  return next(
    (k for k, other in enumerate(own) if module.scale == other.scale and np.array_equal(module.a, other.a)), None
  )


def _check_alike(modules: Sequence[Module], whole: bool) -> None:
  first = modules[0]
  for module in modules:
    if module.kind != first.kind or module.a.shape[1:] != first.a.shape[1:] or module.kind == "embedding":
      raise ValueError(
        f"{first.name} ({first.kind}, lora_A {first.a.shape}) and {module.name} ({module.kind}, {module.a.shape}) have"
        " other inputs, and no weight holds both"
      )
  doras = [module.magnitude is not None for module in modules]
  if any(doras) and not (all(doras) and whole):
    raise ValueError("some of its parts have a magnitude (DoRA), and others have none")


def _shaped_norms(norms: np.ndarray, like: np.ndarray) -> np.ndarray:
  return norms.reshape([-1 if size == like.size else 1 for size in like.shape]) if like.ndim > 1 else norms
