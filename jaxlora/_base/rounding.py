"""What becomes of a small update that is rounded into its weight's dtype."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

NOTABLE = 0.1  # of an update's norm: what is lost beyond it is told


class RoundingWarning(UserWarning):
  """A merge that rounds away a notable share of an update."""


def lost_share(base: np.ndarray, exact: np.ndarray, stored: np.ndarray) -> float:
  """The share of an update's norm that storing its sum loses: `||stored - exact|| / ||exact - base||`."""
  wide = np.result_type(np.float32, exact.dtype)
  exact = exact.astype(wide, copy=False)
  update = np.linalg.norm((exact - base.astype(wide)).ravel())
  lost = np.linalg.norm((stored.astype(wide) - exact).ravel())
  return float(lost / update) if update else 0.0


def notable(shares: Mapping[str, float]) -> str | None:
  """The names whose updates lose a notable share, with the shares, the worst first; `None` if there are none."""
  worst = sorted(((share, name) for name, share in shares.items() if share > NOTABLE), reverse=True)
  if not worst:
    return None
  shown = ", ".join(f"{name} ({share:.0%})" for share, name in worst[:5])
  return shown + (f" and {len(worst) - 5} more" if len(worst) > 5 else "")


def same_but_for_rounding(copy: np.ndarray, value: np.ndarray) -> bool:
  """Whether `copy` holds the numbers of `value`, in its own dtype: as either is rounded to the other's.

  Two 16-bit dtypes keep other digits of one original: there the last of them may differ.
  """
  if copy.shape != value.shape:
    return False
  with np.errstate(over="ignore"):
    here, there = copy.astype(value.dtype), value.astype(copy.dtype)
  if np.array_equal(here, value) or np.array_equal(there, copy):
    return True
  if copy.dtype == value.dtype or max(copy.dtype.itemsize, value.dtype.itemsize) > 2:
    return False
  infos = [jnp.finfo(dtype) for dtype in (copy.dtype, value.dtype)]
  step, least = (sum(float(getattr(info, name)) for info in infos) for name in ("eps", "smallest_subnormal"))
  wide = value.astype(np.float32)
  return bool((np.abs(copy.astype(np.float32) - wide) <= step / 2 * np.abs(wide) + least).all())
