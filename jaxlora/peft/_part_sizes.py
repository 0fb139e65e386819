"""How many outputs each part has of a weight that holds several."""

from collections.abc import Sequence
import math

from jaxlora.peft._names import Target
from jaxlora.peft._parts import Joined, Split, sizes_of


def part_sizes(record: Split | Joined, count: int, lengths: Sequence[int | None], shown: list[int] | None) -> list[int]:
  """The outputs of each part of a whole of `count`: by `sizes`, by the parts that are known, or by an axis.

  Raises:
    ValueError: if they contradict each other, or if nothing tells.
  """
  known = list(lengths)
  told = sizes_of(record, count) or shown
  if told is None and known.count(None) == 1:
    told = [count - sum(size or 0 for size in known) if size is None else size for size in known]
  if told is None and None not in known:
    told = [size for size in known if size is not None]
  if told is None:
    raise ValueError(f"nothing tells how many of its {count} outputs each part has; say sizes= in names")
  if sum(told) != count or min(told) < 1 or any(size not in (None, own) for size, own in zip(known, told, strict=True)):
    parts = ", ".join("unknown" if size is None else str(size) for size in known)
    raise ValueError(f"{count} outputs in all, parts of {', '.join(map(str, told))} expected, {parts} found")
  return told


def shown_sizes(record: Split | Joined, shape: Sequence[int], target: Target, roles: str | None) -> list[int] | None:
  """The equal sizes of a leaf's modules where an axis shows them: (..., modules, ...) among its outputs."""
  number = len(target.modules)
  if roles is not None:
    outs = [size for size, role in zip(shape, roles, strict=True) if role == "o"]
  elif target.parameter == "bias":
    outs = list(shape[target.stacked :])
  else:
    return None
  along = outs[:1] if record.groups == 1 else outs[1:2] if outs[:1] == [record.groups] else []
  return [math.prod(outs) // number] * number if along == [number] and len(outs) > 1 else None
