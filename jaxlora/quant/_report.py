"""The report on a quantisation: what each leaf takes now, and what it lost."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.checks import is_abstract, is_known
from jaxlora._base.dtypes import precise
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
  """

  path: str
  shape: tuple[int, ...]
  format: str
  block: tuple[int, ...]
  bits: float
  error: float | None


@dataclasses.dataclass(frozen=True)
class Quantization:
  """What `quantize_with_report` found; prints as a table.

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
    rows = [("leaf", "shape", "format", "blocks", "bits", "error")]
    for leaf in self.leaves:
      sizes, blocks = (" x ".join(map(str, sizes)) for sizes in (leaf.shape, leaf.block))
      error = "-" if leaf.error is None else f"{leaf.error:.4f}"
      rows.append((leaf.path, sizes, leaf.format, blocks, f"{leaf.bits:.3f}", error))
    outputs = "" if self.output_error is None else f"; the probe's results differ by {self.output_error:.4f}"
    return f"{table(rows)}\n{size(self.bytes_before)} before, {size(self.bytes_after)} after{outputs}"


def leaf_report(path: str, before: Any, after: Any) -> LeafQuantization:
  """The report on one leaf; of a shape and a dtype alone, and of a traced array, no error is known."""
  error = float(relative_error(before, after)) if is_known(before) and not is_abstract(before) else None
  bits = 8 * bytes_of(after) / math.prod(after.shape)
  return LeafQuantization(path, after.shape, after.format, after.block, bits, error)


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
  """`||W - W'|| / ||W||`; 0 where W is 0."""
  values = after.dequantize() if hasattr(after, "dequantize") else after
  lost, whole = (jnp.sum(jnp.square(precise(x))) for x in (precise(before) - precise(values), before))
  return jnp.where(whole > 0, jnp.sqrt(lost / jnp.where(whole > 0, whole, 1)), 0)
