"""Writes a folder that PEFT or mlx-lm loads."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora._base.files import replacing
from jaxlora._base.text import listed
from jaxlora.peft._mlx import MLX_WEIGHTS, mlx_of
from jaxlora.peft._records import CONFIG, WEIGHTS, Adapter, PeftError
from jaxlora.peft._state import state_of


def write(folder: Any, adapter: Adapter) -> None:
  """Writes an adapter, just as it is, as a folder that `PeftModel.from_pretrained` loads.

  Args:
    folder: made if it does not exist; earlier files of the two names are replaced.
    adapter: with the configuration that belongs to its tensors.

  Raises:
    PeftError: if some of its modules are DoRA's, and others are not; nothing is written.
  """
  plain = [name for name, module in adapter.modules.items() if module.magnitude is None]
  if 0 < len(plain) < len(adapter.modules):
    raise PeftError(
      f"{folder}: {listed(plain)}: no DoRA, while other modules are; PEFT has one variant for a whole adapter. Merge"
      " it, or write the two kinds apart."
    )
  _write(Path(folder), WEIGHTS, state_of(adapter), adapter.config, "pt")


def write_mlx(folder: Any, adapter: Adapter, subject: str) -> None:
  """Writes an adapter as a folder that `mlx_lm.load(model, adapter_path=folder)` loads.

  Args:
    folder: made if it does not exist; earlier files of the two names are replaced.
    adapter: with modules alone.
    subject: what an error begins with.

  Raises:
    PeftError: listing what mlx-lm's adapters cannot hold; nothing is written.
  """
  tensors, config = mlx_of(adapter, subject)
  _write(Path(folder), MLX_WEIGHTS, tensors, config, "mlx")


def _write(folder: Path, name: str, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], form: str) -> None:
  import safetensors.numpy  # an extra: jaxlora[peft]

  contiguous = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
  with replacing(folder / name) as path:
    safetensors.numpy.save_file(contiguous, path, metadata={"format": form})
  with replacing(folder / CONFIG) as path:
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
