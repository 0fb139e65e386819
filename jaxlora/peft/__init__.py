"""Adapters to and from PEFT: `save` writes what Hugging Face's `peft` loads, `load` reads what it writes.

Needs the extra `jaxlora[peft]` (safetensors), and never torch. Nothing is unpickled.
"""

from jaxlora.peft._from_modules import load
from jaxlora.peft._records import PeftError
from jaxlora.peft._to_modules import save

__all__ = ["PeftError", "load", "save"]
