"""Writes a folder that PEFT loads."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora._base.files import replacing
from jaxlora.peft._records import CONFIG, WEIGHTS, Adapter
from jaxlora.peft._state import state_of


def write(folder: Any, adapter: Adapter) -> None:
  """Writes an adapter, just as it is, as a folder that `PeftModel.from_pretrained` loads.

  Args:
    folder: made if it does not exist; earlier files of the two names are replaced.
    adapter: with the configuration that belongs to its tensors.
  """
  import safetensors.numpy  # an extra: jaxlora[peft]

  folder = Path(folder)
  tensors = {key: np.ascontiguousarray(tensor) for key, tensor in state_of(adapter).items()}
  with replacing(folder / WEIGHTS) as path:
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  with replacing(folder / CONFIG) as path:
    path.write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
