"""Arrays whose axes have labels, and their contraction."""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax import lax

from jaxlora._base.dtypes import wider_dtype


class Run(NamedTuple):
  """The label of several axes flattened to one."""

  labels: tuple[Hashable, ...]
  sizes: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labelled:
  """An array whose axes have labels."""

  array: jax.Array
  labels: tuple[Hashable, ...] = dataclasses.field(metadata={"static": True})

  def flattened(self, run: Sequence[Hashable]) -> "Labelled":
    """The axes of `run` flattened to one; unchanged where they are not adjacent and in this order."""
    run = tuple(run)
    start = self.labels.index(run[0]) if len(run) > 1 else 0
    if len(run) < 2 or self.labels[start : start + len(run)] != run:
      return self
    shape = self.array.shape
    sizes = shape[start : start + len(run)]
    array = lax.reshape(self.array, (*shape[:start], math.prod(sizes), *shape[start + len(run) :]))
    return Labelled(array, (*self.labels[:start], Run(run, sizes), *self.labels[start + len(run) :]))

  def expanded(self) -> "Labelled":
    """Every flattened run as its own axes again."""
    pairs = zip(self.labels, self.array.shape, strict=True)
    runs = [label if isinstance(label, Run) else Run((label,), (size,)) for label, size in pairs]
    labels = tuple(label for run in runs for label in run.labels)
    if labels == self.labels:
      return self
    return Labelled(lax.reshape(self.array, tuple(n for run in runs for n in run.sizes)), labels)

  def ordered(self, wanted: Sequence[Hashable]) -> jax.Array:
    """The array with its axes in the wanted order."""
    permutation = tuple(self.labels.index(label) for label in wanted)
    return self.array if permutation == tuple(range(self.array.ndim)) else lax.transpose(self.array, permutation)


class Result(NamedTuple):
  """How the result of a contraction is wanted.

  Attributes:
    dtype: of the result.
    precision: the user's, as in `jax.lax.dot_general`.
    sharding: from the result's labels to its sharding, where types carry shardings; `None` elsewhere.
    looping: whether the contraction is in the body of a loop.
  """

  dtype: Any
  precision: Any = None
  sharding: Callable[[Sequence[Hashable]], Any] | None = None
  looping: bool = False


def contract(x: Labelled, y: Labelled, summed: Sequence[Hashable], result: Result) -> Labelled:
  """One `dot_general` by labels: shared labels are summed if in `summed`, batched otherwise, and batches lead."""
  shared = [label for label in x.labels if label in y.labels]
  batch = [label for label in shared if label not in summed]

  def places(group: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    return [x.labels.index(label) for label in group], [y.labels.index(label) for label in group]

  dims = places([label for label in shared if label in summed]), places(batch)
  labels = (*batch, *(label for label in (*x.labels, *y.labels) if label not in shared))
  dtype = wider_dtype(x.array.dtype, y.array.dtype)
  product = lax.dot_general(
    x.array.astype(dtype),
    y.array.astype(dtype),
    dims,
    precision=result.precision,
    preferred_element_type=None if result.dtype == dtype else result.dtype,
    out_sharding=result.sharding and result.sharding(labels),
  )
  return Labelled(product, labels)


def own_labels(labels: Sequence[Hashable]) -> list[Hashable]:
  """The labels of axes that only the input has."""
  return [label for label in labels if isinstance(label, tuple)]


def merged_alike(x: Labelled, y: Labelled, axes: Sequence[Hashable]) -> tuple[Labelled, Labelled, list[Hashable]]:
  """Both with the axes that they share flattened to one, if that can be done to both; and those axes' labels then."""
  flat = x.flattened(axes), y.flattened(axes)
  if flat[0].labels == x.labels or flat[1].labels == y.labels:
    return x, y, list(axes)
  return *flat, [label for label in flat[1].labels if isinstance(label, Run)]
