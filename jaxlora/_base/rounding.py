"""What becomes of a small update that is rounded into its weight's dtype."""

from collections.abc import Mapping

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
