"""Adapters to and from PEFT: `save` writes what Hugging Face's `peft` loads, `load` reads what it writes.

    jaxlora.peft.save("adapter", tree)
    tree = jaxlora.peft.load("adapter", params)
    jaxlora.peft.check("adapter", "vllm")  # what a reader will make of it

Both are files around a pair of functions that touch none: `to_modules(tree)` makes an `Adapter` of torch's modules, and
`from_modules(adapter, params)` puts one on a tree. Files need the extra `jaxlora[peft]` (safetensors), and never torch.
Nothing is unpickled.
"""

from jaxlora.peft._folder import check, load, save, save_mlx
from jaxlora.peft._from_modules import from_modules
from jaxlora.peft._lora_leaves import from_lora_leaves
from jaxlora.peft._parts import Experts, Joined, Split
from jaxlora.peft._records import Adapter, Module, Packed, PeftError, PeftWarning, TokenRows
from jaxlora.peft._resized import resized
from jaxlora.peft._rows import halves_to_pairs, pairs_to_halves
from jaxlora.peft._serve import Rule
from jaxlora.peft._served import Finding
from jaxlora.peft._to_modules import to_modules

__all__ = [
  "Adapter",
  "Experts",
  "Finding",
  "Joined",
  "Module",
  "Packed",
  "PeftError",
  "PeftWarning",
  "Rule",
  "Split",
  "TokenRows",
  "check",
  "from_lora_leaves",
  "from_modules",
  "halves_to_pairs",
  "load",
  "pairs_to_halves",
  "resized",
  "save",
  "save_mlx",
  "to_modules",
]
