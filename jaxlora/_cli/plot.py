"""`jaxlora inspect --plot FILE`: a picture of an adapter, by matplotlib."""

from collections.abc import Sequence
import math
from typing import Any


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
  """Bars of the norms of updates and of the sizes, a line for each leaf; leaves with NaNs are red."""
  try:
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ImportError("--plot needs matplotlib. Install the extra: pip install 'jaxlora[cli]'") from error
  figure = Figure(figsize=(11, 1.6 + 0.24 * len(rows)), layout="constrained")
  norms = figure.add_subplot(1, 2, 1)
  sizes = figure.add_subplot(1, 2, 2, sharey=norms)
  sizes.tick_params(labelleft=False)
  names = [row["path"] + (f"  (rank {row['rank']})" if "rank" in row else "  (whole)") for row in rows]
  places = range(len(rows))
  colours = ["tab:red" if row["nan"] else "tab:blue" if "rank" in row else "tab:gray" for row in rows]
  finite = [row["norm"] if row["norm"] is not None and math.isfinite(row["norm"]) else 0 for row in rows]
  norms.barh(places, finite, color=colours)
  norms.set_xlabel("norm of the update (whole leaves: of the values)")
  norms.set_yticks(places, names, fontsize=8)
  norms.invert_yaxis()
  sizes.barh(places, [row["bytes"] / 1024 for row in rows], color=colours)
  sizes.set_xlabel("KiB")
  figure.savefig(path, dpi=120)
