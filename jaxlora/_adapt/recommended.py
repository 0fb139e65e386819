"""What `LoraConfig.recommended` and `recommended_rate` compute."""

from collections.abc import Mapping
import math
from typing import Any

from jaxlora._base.checks import positive

TIMES, TIMES_SHORT, SHORT = 10, 15, 100  # of full fine-tuning's rate; below so many steps


def with_experts(rank: int, experts: Mapping[str, int] | None, fields: Mapping[str, Any]) -> dict[str, Any] | None:
  """The overrides of a config: the user's own, then the experts' share of the rank."""
  if not experts:
    return fields.get("overrides")
  shares = {}
  for pattern, top_k in experts.items():
    top_k = positive(top_k, f"LoraConfig.recommended: experts[{pattern!r}]")
    if rank % top_k:
      raise ValueError(
        f"LoraConfig.recommended: experts[{pattern!r}]: rank {rank} is no multiple of {top_k}, the experts that a token"
        f" meets; expected one, so that each has a share: rank={-(-rank // top_k) * top_k}."
      )
    shares[pattern] = {"rank": rank // top_k}
  return {**(fields.get("overrides") or {}), **shares}


def rate_for(full: float, steps: int | None) -> float:
  """LoRA's learning rate, from full fine-tuning's."""
  if isinstance(full, bool) or not isinstance(full, (int, float)) or not 0 < full < math.inf:
    raise ValueError(f"LoraConfig.recommended_rate: full is {full!r}, expected a finite number above 0, such as 1e-4.")
  short = steps is not None and positive(steps, "LoraConfig.recommended_rate: steps") < SHORT
  return (TIMES_SHORT if short else TIMES) * full
