"""PEFT on torch, in a process of its own beside JAX's."""

import json
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any

from settings import Settings


def run_peft(script: str, settings: Settings, rounds: int, *more: str) -> dict[str, Any]:
  """The result of a script for PEFT (`peft_torch`, `peft_serving`) at these settings.

  Raises:
    RuntimeError: if the script fails, with its output.
  """
  sizes = {"d": settings.width, **{name: getattr(settings, name) for name in ("layers", "batch", "seq", "rank")}}
  sizes |= {"alpha": settings.alpha, "vocabulary": settings.vocabulary, "rounds": rounds}
  options = [f"--{name}={value}" for name, value in sizes.items()] + ["--bf16"] * settings.bf16
  with tempfile.TemporaryDirectory() as out:
    command = [sys.executable, Path(__file__).with_name(f"{script}.py"), *options, *more, f"--out={out}", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
      raise RuntimeError(f"{script}.py failed: {done.stderr}")
    return json.loads((Path(out) / f"{script}.json").read_text())
