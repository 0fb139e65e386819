"""Control flow as JAX describes it, which changes from version to version."""

from typing import Any


def scan_counts(params: dict[str, Any]) -> tuple[int, int] | None:
  """`(constants, carries)` among a scan's operands; `None` where its parameters have an unknown form."""
  try:
    if "num_consts" in params:  # up to 0.11
      return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # 0.12
    return len(consts), len(carry)
  except (KeyError, AttributeError, TypeError, ValueError):
    return None
