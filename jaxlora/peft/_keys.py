"""Keys of tensors as PEFT's `save_pretrained` writes them, made of those that wrappers and other savers leave."""

from collections.abc import Mapping
import re
from typing import NamedTuple

import numpy as np

from jaxlora._base.text import listed

PREFIX = "base_model.model."

# What torch.compile, FSDP, activation checkpointing and Lightning put between a module and its parent.
_WRAPPER = re.compile(
  r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)(?:\.|$)"
)

_PARALLEL = re.compile(rf"(?:module\.)+(?={re.escape(PREFIX)})")  # DistributedDataParallel and DeepSpeed, outermost

# The name of an adapter in a key of a model's own `state_dict`; `save_pretrained` leaves it out.
_NAMED = re.compile(
  r"(?P<before>.*\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta|modules_to_save))"
  r"\.(?P<name>(?!weight$|bias$)[^.]+)(?P<after>(?:\..+)?)"
)

_DEFAULT = "default"  # PEFT's name for an adapter that nobody named


class Keyed(NamedTuple):
  """A tensor, and the key that a file has for it."""

  key: str
  tensor: np.ndarray


def as_saved(tensors: Mapping[str, np.ndarray], adapter_name: str | None, problems: list[str]) -> dict[str, Keyed]:
  """The tensors of one adapter under the keys that `save_pretrained` writes, less `base_model.model.`.

  Args:
    tensors: by the file's keys. All of them begin with `base_model.model.`, as often as others, or none does.
    adapter_name: of several adapters that the keys name; `None` where they name one at most.
    problems: what is wrong is added to these.
  """
  plain = {key: _PARALLEL.sub("", _WRAPPER.sub("", key), count=1) for key in tensors}
  times = min((_prefixes(key) for key in plain.values() if key.startswith(PREFIX)), default=0)
  parts = {}
  for key, found in plain.items():
    if _prefixes(found) < times:
      problems.append(f"{key}: expected a name that starts with {PREFIX!r}")
    else:
      parts[key] = _without_name(found[times * len(PREFIX) :])
  names = {name for _, name in parts.values() if name is not None}
  chosen = _chosen(names, any(_is_factor(key) for key, name in parts.values() if name is None), adapter_name, problems)
  saved: dict[str, Keyed] = {}
  for key, (found, name) in parts.items():
    if name not in (None, chosen) or (name is None and chosen not in (None, _DEFAULT) and _is_factor(found)):
      continue
    if found in saved:
      problems.append(f"{key}: {saved[found].key} is the same tensor's name, without its wrappers. Keep one of the two")
    saved[found] = Keyed(key, tensors[key])
  return saved


def _prefixes(key: str) -> int:
  """How often a key begins with `base_model.model.`: once more for each PeftModel in a PeftModel."""
  count = 0
  while key.startswith(PREFIX, count * len(PREFIX)):
    count += 1
  return count


def _without_name(key: str) -> tuple[str, str | None]:
  """A key without its adapter's name, and that name."""
  key = key.replace(".token_adapter.base_layer.", ".base_layer.")
  found = _NAMED.fullmatch(key)
  if found is None:
    return key, None
  return found["before"].removesuffix(".modules_to_save") + found["after"], found["name"]


def _is_factor(key: str) -> bool:
  return "lora_" in key


def _chosen(names: set[str], unnamed: bool, adapter_name: str | None, problems: list[str]) -> str | None:
  """The adapter to read, of those that the keys name; factors without a name are those of `default`."""
  there = sorted(names | ({_DEFAULT} if unnamed and names else set()))
  if adapter_name is not None and adapter_name not in (there or [_DEFAULT]):
    problems.append(f"adapter_name: found {adapter_name!r}, the keys name {listed(there or [_DEFAULT])}")
  elif adapter_name is None and len(there) > 1:
    problems.append(f"the keys name several adapters: {listed(there)}. Say which: adapter_name={there[0]!r}")
  return adapter_name if adapter_name is not None else next(iter(there), None)
