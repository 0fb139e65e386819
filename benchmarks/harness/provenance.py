"""What a result was measured with: options, versions, hardware, and digests of code and data."""

import argparse
from collections.abc import Sequence
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
import platform
from typing import Any

import jax
import numpy as np

import jaxlora

PEERS = ("qwix", "peft", "torch")  # installed by the extra `peers`
# Options that say nothing about a result: what was shown, where it was written, what was reused.
_SILENT = ("quiet", "fresh", "no_cache", "record")


def cpu() -> dict[str, Any]:
  """The processor."""
  cpuinfo = Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return {"cpu": models[0] if models else platform.processor() or platform.machine(), "cores": os.cpu_count()}


def hardware() -> dict[str, Any]:
  """The processor and JAX's device."""
  return {**cpu(), "backend": jax.default_backend(), "device": jax.devices()[0].device_kind}


def installed(package: str) -> bool:
  """Whether a package can be imported; it is not imported for this."""
  return importlib.util.find_spec(package) is not None


def versions(*more: str) -> dict[str, str]:
  """Versions of Python, jaxlora and the packages that every script needs, and of those of `more` that are installed."""
  names = ("jax", "jaxlib", "flax", "optax", *(name for name in more if installed(name)))
  packages = {name: importlib.metadata.version(name) for name in names}
  return {"python": platform.python_version(), **packages, "jaxlora": jaxlora.__version__}


def settings(args: argparse.Namespace) -> dict[str, Any]:
  """The options as JSON, without paths and those that say nothing about the result."""
  return {name: value for name, value in vars(args).items() if not isinstance(value, Path) and name not in _SILENT}


def provenance(args: argparse.Namespace) -> dict[str, Any]:
  """The first fields of every benchmark's result."""
  return {"settings": settings(args), "versions": versions(*PEERS), "hardware": hardware()}


def digest(settings: Any, arrays: Sequence[Any] = ()) -> str:
  """A short hash of settings and arrays; runs with equal digests have equal results."""
  state = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  for array in arrays:
    state.update(np.ascontiguousarray(array).tobytes())
  return state.hexdigest()[:16]


def source_digest(*scripts: Path) -> str:
  """A hash of jaxlora's source and of these scripts, so that runs of older code are not reused."""
  files = [*sorted(Path(jaxlora.__file__).parent.rglob("*.py")), *scripts]
  return digest([file.read_text() for file in files])
