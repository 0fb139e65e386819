"""Writes a folder that PEFT loads."""

from collections.abc import Collection, Iterator, Mapping, Sequence
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.peft._patterns import patterns, target_modules
from jaxlora.peft._records import CONFIG, CONV1D, PREFIX, WEIGHTS, Module, fail


def write(
  folder: Any,
  modules: Sequence[Module],
  whole: Mapping[str, np.ndarray],
  *,
  bias: str = "none",
  known: Collection[str] | None = None,
  dropout: float = 0.0,
  base_model_name_or_path: str | None = None,
  task_type: str | None = None,
) -> None:
  """Writes a folder that `PeftModel.from_pretrained` loads.

  Args:
    folder: made if it does not exist; earlier files of these two names are replaced.
    modules: the adapted modules; all of them have a magnitude, or none.
    whole: tensors that replace a parameter, by parameter name: biases of adapted modules, and every parameter of each
      module to save.
    bias: PEFT's option of that name, which says which biases are saved.
    known: the names of all modules that the torch model is known to have, so that short names can be told to be
      unique; `None` if that is not known.
    dropout, base_model_name_or_path, task_type: for the configuration.

  Raises:
    PeftError: if PEFT's patterns cannot tell the adapted modules from others.
  """
  import safetensors.numpy  # an extra: jaxlora[peft]

  adapted = {module.name: module for module in modules}
  saved = _modules_to_save(whole, adapted, bias)
  config = config_of(adapted, saved, known, bias)
  config |= {"lora_dropout": dropout, "base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
  tensors = {}
  for module in modules:
    a, b = (
      ("lora_embedding_A", "lora_embedding_B") if module.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    )
    tensors[f"{PREFIX}{module.name}.{a}"], tensors[f"{PREFIX}{module.name}.{b}"] = module.a, module.b
    if module.magnitude is not None:
      tensors[f"{PREFIX}{module.name}.lora_magnitude_vector"] = module.magnitude
  for name, tensor in whole.items():
    module_name, _, parameter = name.rpartition(".")
    inner = "base_layer." if module_name in adapted else ""
    tensors[f"{PREFIX}{module_name}.{inner}{parameter}"] = tensor
  tensors = {name: _writable(tensor) for name, tensor in tensors.items()}
  if broken := [f"{name}: holds NaN or infinite values" for name, x in tensors.items() if not np.isfinite(x).all()]:
    raise fail("save", broken, "Training has diverged: go back to an earlier checkpoint; nothing was written.")

  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with _replacing(folder / WEIGHTS) as path:
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  with _replacing(folder / CONFIG) as path:
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
  """A path to write to, that takes the place of `path` once it is whole."""
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    yield part
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def _writable(tensor: np.ndarray) -> np.ndarray:
  """Contiguous, and of a dtype that torch computes in."""
  tensor = np.ascontiguousarray(tensor)
  return tensor if tensor.dtype.name in ("float64", "float32", "float16", "bfloat16") else tensor.astype(np.float32)


def _modules_to_save(whole: Mapping[str, np.ndarray], adapted: Collection[str], bias: str) -> list[str]:
  """The modules whose parameters are in `whole` and are no biases that the `bias` option covers."""
  names = {name.rpartition(".")[::2] for name in whole}
  weights = {module for module, parameter in names if parameter != "bias"}
  loose = {module for module, parameter in names if parameter == "bias"} - weights - set(adapted)
  return sorted(weights | (loose if bias != "all" else set()))


def config_of(
  adapted: Mapping[str, Module], saved: Sequence[str], known: Collection[str] | None, bias: str
) -> dict[str, Any]:
  scalings = {module.scaling for module in adapted.values()}
  rslora = scalings == {"rslora"}
  # One option says how alpha becomes a scale; where the modules differ, alpha is told as the standard one takes it.
  alphas = {
    name: module.alpha if len(scalings) == 1 else module.scale * module.rank for name, module in adapted.items()
  }
  settings = {name: (module.rank, alphas[name]) for name, module in adapted.items()}
  rank, alpha = max(settings.values(), key=list(settings.values()).count, default=(8, 8))
  others = set(adapted if known is None else known) | set(adapted)
  return {
    "peft_type": "LORA",
    "auto_mapping": None,
    "revision": None,
    "inference_mode": True,
    "r": rank,
    "lora_alpha": _whole(alpha),
    "target_modules": target_modules(sorted(adapted), others, saved, complete=known is not None),
    "modules_to_save": list(saved) or None,
    "bias": bias,
    "use_rslora": rslora,
    "use_dora": any(module.magnitude is not None for module in adapted.values()),
    "fan_in_fan_out": bool(adapted) and all(name.rpartition(".")[2] in CONV1D for name in adapted),
    "init_lora_weights": True,  # readers such as vLLM's refuse any other; what the file holds starts from the base
    "rank_pattern": patterns({name: setting[0] for name, setting in settings.items()}, rank),
    "alpha_pattern": patterns({name: _whole(setting[1]) for name, setting in settings.items()}, _whole(alpha)),
    "layers_to_transform": None,
    "layers_pattern": None,
  }


def _whole(alpha: float) -> float:
  return int(alpha) if float(alpha).is_integer() else float(alpha)
