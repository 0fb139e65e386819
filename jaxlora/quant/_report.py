"""The report on a quantisation: what each leaf takes now, and what it lost."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.checks import is_abstract, is_known
from jaxlora._base.coded import decoded
from jaxlora._base.dtypes import precise
from jaxlora._base.memory import on_device
from jaxlora._base.sizes import bytes_of
from jaxlora._base.text import size, table
from jaxlora._transform.wrap import wrap


@dataclasses.dataclass(frozen=True)
class LeafQuantization:
  """One quantised leaf.

  Attributes:
    path: its path.
    shape: of the weight.
    format: of its codes.
    block: how many elements along each axis share a scale.
    bits: for each element, scales included.
    error: `||W - W'|| / ||W||`, by Frobenius' norm; `None` where the values are not known.
    update_error: `||W - W'|| / ||W - Q||` where W is the sum of a base Q of codes and an update; `None` elsewhere.
  """

  path: str
  shape: tuple[int, ...]
  format: str
  block: tuple[int, ...]
  bits: float
  error: float | None
  update_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Quantization:
  """What `quantize_with_report` and `merge_and_requantize` found; prints as a table.

  Attributes:
    leaves: the quantised leaves.
    bytes_before, bytes_after: of the whole tree.
    output_error: `||f(W) - f(W')|| / ||f(W)||` of what the probe returns; `None` without a probe.
  """

  leaves: tuple[LeafQuantization, ...]
  bytes_before: int
  bytes_after: int
  output_error: float | None

  def __str__(self) -> str:
    head = ("leaf", "shape", "format", "blocks", "bits", "error")
    merged = any(leaf.update_error is not None for leaf in self.leaves)
    rows: list[tuple[str, ...]] = [(*head, "of the update") if merged else head]
    for leaf in self.leaves:
      sizes, blocks = (" x ".join(map(str, sizes)) for sizes in (leaf.shape, leaf.block))
      errors = (leaf.error, leaf.update_error) if merged else (leaf.error,)
      found = ("-" if error is None else f"{error:.4f}" for error in errors)
      rows.append((leaf.path, sizes, leaf.format, blocks, f"{leaf.bits:.3f}", *found))
    outputs = "" if self.output_error is None else f"; the probe's results differ by {self.output_error:.4f}"
    return f"{table(rows)}\n{size(self.bytes_before)} before, {size(self.bytes_after)} after{outputs}"


def leaf_report(path: str, before: Any, after: Any, base: Any = None) -> LeafQuantization:
  """The report on one leaf; of a shape and a dtype alone, and of a traced array, no error is known.

  Args:
    path: its path.
    before: the floats.
    after: the codes.
    base: of an update that was added to it, the codes before.
  """
  known = is_known(*jax.tree.leaves((before, after))) and not is_abstract(before)
  error = float(relative_error(before, on_device(after))) if known else None
  update = float(update_error(before, on_device(after), on_device(base))) if known and base is not None else None
  bits = 8 * bytes_of(after) / math.prod(after.shape)
  return LeafQuantization(path, after.shape, after.format, after.block, bits, error, update)


def output_error(probe: Callable[[Any], Any], before: Any, after: Any) -> float:
  """`||f(W) - f(W')|| / ||f(W)||` over all floats that a function returns."""

  def both(before: Any, after: Any) -> list[tuple[Any, Any]]:
    results = (probe(before), wrap(probe, on_materialize="ignore")(after))
    pairs = zip(*map(jax.tree.leaves, results), strict=True)
    return [pair for pair in pairs if jnp.issubdtype(jnp.result_type(pair[0]), jnp.inexact)]

  pairs = jax.jit(both)(before, after)
  lost, whole = (
    math.sqrt(sum(float(jnp.sum(jnp.square(jnp.abs(precise(x))))) for x in side))
    for side in ([precise(x) - precise(y) for x, y in pairs], [x for x, _ in pairs])
  )
  return lost / whole if whole else 0.0


@jax.jit
def relative_error(before: jax.Array, after: Any) -> jax.Array:
  """`||W - W'|| / ||W||`; 0 where both are 0."""
  return _ratio(_off(before, after), precise(before))


@jax.jit
def update_error(before: jax.Array, after: Any, base: Any) -> jax.Array:
  """`||W - W'|| / ||W - Q||`; 0 where all are the same."""
  return _ratio(_off(before, after), _off(before, base))


def _off(before: jax.Array, after: Any) -> jax.Array:
  return precise(before) - precise(decoded(after)).astype(precise(before).dtype)


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
  part, whole = (jnp.sum(jnp.square(x)) for x in (part, whole))
  none = jnp.where(part > 0, jnp.inf, 0)
  return jnp.where(whole > 0, jnp.sqrt(part / jnp.where(whole > 0, whole, 1)), none)
