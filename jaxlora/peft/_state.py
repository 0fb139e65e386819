"""PEFT's tensors by key (`base_model.model.head.lora_A.weight`), and the adapter that they make. No files here."""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from jaxlora.peft._config import malformed_options, unsupported_options
from jaxlora.peft._keys import PREFIX, as_saved
from jaxlora.peft._packed import packed_parts, packed_tensors, unpacked
from jaxlora.peft._patterns import values_by_pattern
from jaxlora.peft._records import CONFIG, WEIGHTS, Adapter, Module
from jaxlora.peft._token_rows import token_rows

_FACTOR_KEYS = {  # of A and B, by kind of module
  "linear": ("lora_A.weight", "lora_B.weight"),
  "conv": ("lora_A.weight", "lora_B.weight"),
  "embedding": ("lora_embedding_A", "lora_embedding_B"),
}


_TOKENS = "token_adapter.trainable_tokens_delta"


def state_of(adapter: Adapter) -> dict[str, np.ndarray]:
  """The tensors of an adapter under PEFT's keys."""
  tensors: dict[str, np.ndarray] = {}
  together = {name for packed in adapter.packed.values() for name in packed.modules}
  for name, module in adapter.modules.items():
    if name in together:
      continue
    held = dict(zip(_FACTOR_KEYS[module.kind], (module.a, module.b), strict=True))
    if module.magnitude is not None:
      held["lora_magnitude_vector"] = module.magnitude
    tensors |= {f"{PREFIX}{name}.{part}": tensor for part, tensor in held.items()}
  tensors |= {f"{PREFIX}{name}": tensor for name, tensor in packed_tensors(adapter.packed, adapter.modules).items()}
  for name, tensor in (adapter.bases | adapter.whole).items():
    module_name, _, parameter = name.rpartition(".")
    inner = "base_layer." if module_name in adapter.modules else ""
    tensors[f"{PREFIX}{module_name}.{inner}{parameter}"] = tensor
  for name, tokens in adapter.tokens.items():
    tensors[f"{PREFIX}{name.removesuffix('.weight')}.{_TOKENS}"] = tokens.rows
  return tensors


def not_finite(tensors: Mapping[str, np.ndarray]) -> list[str]:
  """The tensors that hold NaN or infinite values, as problems."""
  return [f"{key}: holds NaN or infinite values" for key, tensor in tensors.items() if not np.isfinite(tensor).all()]


def adapter_of(
  tensors: Mapping[str, np.ndarray], config: dict[str, Any], problems: list[str], adapter_name: str | None = None
) -> Adapter:
  """The adapter of PEFT's tensors and configuration: the inverse of `state_of`.

  Args:
    tensors: by key. Shapes and dtypes are looked at, values are not.
    config: `adapter_config.json`.
    problems: what is wrong is added to these; modules with problems may be left out.
    adapter_name: of several adapters that the keys name.
  """
  problems += malformed_options(config)
  adapter = Adapter({}, {}, {}, config, tuple(unsupported_options(config)))
  parts_by_module: dict[str, dict[str, np.ndarray]] = {}
  rows: dict[str, np.ndarray] = {}
  for name, (key, tensor) in as_saved(tensors, adapter_name, problems).items():
    if name.endswith(f".{_TOKENS}"):
      rows[name.removesuffix(f".{_TOKENS}")] = tensor
      continue
    if problem := _sort_in(name, tensor, parts_by_module, adapter):
      problems.append(f"{key}: {problem}")
  packed = packed_parts(parts_by_module, config, problems)
  names = [*parts_by_module, *packed]
  ranks, alphas = (values_by_pattern(config, field, names, problems) for field in ("rank_pattern", "alpha_pattern"))
  for name, parts in parts_by_module.items():
    module = _module(name, parts, ranks[name], alphas[name], config, problems)
    if module is not None:
      adapter.modules[name] = module
  experts, together = unpacked(packed, ranks, alphas, config, problems)
  adapter.modules.update(experts)
  adapter.packed.update(together)
  adapter.tokens.update(token_rows(config, rows, problems))
  if not names and not adapter.whole and not rows:
    problems.append(f"{WEIGHTS} holds no adapter")
  return adapter


# A key after the prefix: the module's name and the part of it.
_KEY = re.compile(
  r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
  r"|lora_magnitude_vector(?:\.weight)?|lora_B\.bias|base_layer\.(?:weight|bias)|original_module\.(?:weight|bias))"
)

_PARTS = {
  "lora_A.weight": "a",
  "lora_B.weight": "b",
  "lora_embedding_A": "embedding a",
  "lora_embedding_B": "embedding b",
  "lora_B.bias": "bias",
}

# Parts beside the factors, and the option that announces them.
_EXTRAS = {"magnitude": ("lora_magnitude_vector", "use_dora"), "bias": ("lora_B.bias", "lora_bias")}


def _sort_in(
  name: str, tensor: np.ndarray, parts_by_module: dict[str, dict[str, np.ndarray]], adapter: Adapter
) -> str | None:
  """Puts a tensor among the parts of its module, or into the adapter's `whole` or `bases`. Returns what is wrong."""
  found = _KEY.fullmatch(name)
  if found is None:
    if "lora_" in name or "." not in name:
      return "unknown; expected lora_A.weight, lora_B.weight, lora_embedding_A or lora_embedding_B of a module"
    adapter.whole[name] = tensor
    return None
  module, part = found["module"], found["part"]
  if part == "base_layer.bias":
    adapter.whole[f"{module}.bias"] = tensor
  elif part.startswith(("base_layer", "original_module")):
    adapter.bases[f"{module}.{part.rpartition('.')[2]}"] = tensor
  else:
    parts_by_module.setdefault(module, {})[_PARTS.get(part, "magnitude")] = tensor
  return None


def _module(
  name: str, parts: Mapping[str, np.ndarray], rank: Any, alpha: Any, config: Mapping[str, Any], problems: list[str]
) -> Module | None:
  """One adapted module made of its parts; `None` if they make none."""
  embedding = "embedding a" in parts or "embedding b" in parts
  half = "embedding " if embedding else ""
  a, b = parts.get(f"{half}a"), parts.get(f"{half}b")
  if a is None or b is None or (embedding and ("a" in parts or "b" in parts)):
    found = ", ".join(sorted(parts))
    problems.append(f"{name}: found {found} alone; expected both lora_A and lora_B (lora_embedding_A and _B)")
    return None
  if a.ndim != b.ndim or not (a.ndim == 2 or (not embedding and 3 <= a.ndim <= 5)):
    problems.append(
      f"{name}: lora_A has shape {a.shape}, lora_B {b.shape}; expected both 2-D, or both of one convolution"
    )
    return None
  if a.shape[0] != b.shape[1] or any(size != 1 for size in b.shape[2:]):
    problems.append(
      f"{name}: lora_A has shape {a.shape}, lora_B {b.shape}; expected (rank, in, ...) and (out, rank, 1, ...)."
      " (The lora_B of a grouped convolution has fewer: PEFT's update of those lies across the groups, which no"
      " kernel of the base's shape can hold.)"
    )
    return None
  if isinstance(rank, int) and rank != a.shape[0]:
    problems.append(f"{name}: rank {a.shape[0]} in {WEIGHTS}, {rank} by {CONFIG}")
  problems += [
    f"{name}: has a {extra} beside its factors, but {CONFIG} does not say {option}"
    for part, (extra, option) in _EXTRAS.items()
    if part in parts and not config.get(option)
  ]
  magnitude = parts.get("magnitude")
  if config.get("use_dora") and (magnitude is None or magnitude.size != b.shape[0]):
    found = "none" if magnitude is None else f"shape {magnitude.shape}"
    problems.append(
      f"{name}: lora_magnitude_vector: found {found}, expected one number for each of {b.shape[0]} outputs"
    )
    return None
  return Module(
    name=name,
    kind="embedding" if embedding else "linear" if a.ndim == 2 else "conv",
    a=a,
    b=b,
    alpha=float(alpha) if isinstance(alpha, (int, float)) else 1.0,
    scaling="rslora" if config.get("use_rslora") else "standard",
    magnitude=magnitude,
  )
