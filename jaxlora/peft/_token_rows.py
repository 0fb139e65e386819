"""Which rows of which parameters PEFT's `trainable_token_indices` are."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlora._base.text import short
from jaxlora.peft._records import WEIGHTS, TokenRows


def token_rows(
  config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], problems: list[str]
) -> dict[str, TokenRows]:
  """The rows of each parameter, by its name.

  Args:
    config: `adapter_config.json`, whose indices are those of one embedding, or by the ends of modules' names.
    tensors: (tokens, features) by module.
    problems: what is wrong is added to these.
  """
  asked = config.get("trainable_token_indices")
  by_module = asked if isinstance(asked, dict) else {"": asked} if asked else {}
  found = {}
  for module, rows in tensors.items():
    indices = next((value for ending, value in by_module.items() if module.endswith(ending)), None)
    whole = isinstance(indices, list) and all(type(index) is int and 0 <= index < 2**31 for index in indices)
    if not isinstance(indices, list) or not whole or len(set(indices)) != len(indices):
      problems.append(f"trainable_token_indices: found {short(indices)} for {module}, expected a list of tokens")
    elif rows.ndim != 2 or len(rows) != len(indices):
      problems.append(f"{module}: {rows.shape} rows of tokens in {WEIGHTS}, {len(indices)} trainable_token_indices")
    else:
      found[f"{module}.weight"] = TokenRows(tuple(indices), rows)
  for ending in by_module:
    if not any(module.endswith(ending) for module in tensors):
      problems.append(f"trainable_token_indices: names {ending or 'tokens'}, and {WEIGHTS} holds no rows for it")
  return found
