"""A base whose embedding is the head, too: one tensor of its files, or two that are made one when they are loaded."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from jaxlora._cli.edits import Change, Weights
from jaxlora._cli.result import BadFile
from jaxlora.peft._records import Adapter
from jaxlora.peft._tied import (
  HEADLESS,
  head_name,
  is_embedding,
  is_head,
  is_of_encoder,
  is_shared,
  shared_by_several,
  uses_of,
)

# What the names of transformers' classes with a head over the vocabulary have in them.
_WITH_HEAD = ("LMHead", "CausalLM", "ConditionalGeneration", "MaskedLM", "PreTraining", "Seq2Seq")


@dataclasses.dataclass(frozen=True)
class Tie:
  """The tensors of a tied embedding: one for its look-ups, and the head's where the files hold one, too."""

  table: str
  head: str | None


def tie_of_base(weights: Weights, table: str | None, config: Mapping[str, Any]) -> Tie | None:
  """The tied embedding of a torch model; `None` where the head is a weight of its own, or there is none.

  config.json says it (`tie_word_embeddings`); where it does not, a model with a head has none in its files, or one that
  equals the embedding.

  Args:
    weights: the model's.
    table: the embedding's tensor, where it is known.
    config: the model's config.json.
  """
  shapes = {name: weight.shape for name, weight in weights.by_name.items() if name.endswith(".weight")}
  tables = [name for name in shapes if is_embedding(_module(name))] if table is None else [table]
  if len(tables) != 1:
    return None
  (table,) = tables
  heads = [name for name in shapes if is_head(_module(name))]
  heads += [name for name in shapes if name not in tables and shapes[name] == shapes[table] and _is_outside(name)]
  flag = _flag(config)
  if heads:
    equal = flag if flag is not None else np.array_equal(weights.value(table), weights.value(heads[0]))
    return Tie(table, heads[0]) if equal else None
  headless = [name for name in config.get("architectures") or [] if not any(part in name for part in _WITH_HEAD)]
  no_head = head_name(_module(table), map(_module_of, weights.by_name)) is None
  return None if flag is False or headless or no_head else Tie(table, None)


def _module(name: str) -> str:
  return name.removesuffix(".weight")


def _module_of(parameter: str) -> str:
  return parameter.rpartition(".")[0]


def _is_outside(name: str) -> bool:
  """Whether a weight is in no layer, and no embedding."""
  parts = name.split(".")
  return not any(part.isdecimal() for part in parts) and not any("emb" in part or part == "wpe" for part in parts)


def _flag(config: Mapping[str, Any]) -> bool | None:
  """The `tie_word_embeddings` of a config.json; `None` where it says nothing."""
  for inner in (config, config.get("text_config")):
    if isinstance(inner, Mapping) and isinstance(inner.get("tie_word_embeddings"), bool):
      return bool(inner["tie_word_embeddings"])
  return None


def settle_ties(
  adapter: Adapter,
  tensor_of: Mapping[str, str],
  changes: dict[str, Change | None],
  weights: Weights,
  untie: bool,
) -> set[str]:
  """Makes the changes of a tied embedding and its head fit the tensors that hold them.

  Args:
    adapter: PEFT's, which adapts the two uses as two modules.
    tensor_of: the base's tensor for each parameter of the adapter, whether the base has it or not.
    changes: by tensor; those of the embedding and the head are replaced.
    weights: of the base; a head that is to be written is added.
    untie: whether the head becomes a tensor of its own.

  Returns:
    The parameters of the adapter that have found a tensor thereby.

  Raises:
    BadFile: where one tensor cannot hold what becomes of both, or there is nothing to untie.
  """
  if (problem := shared_by_several(adapter)) is not None:
    raise BadFile(f"{problem}.")
  uses = uses_of(adapter)
  if uses is None:
    _check_unknown_tables(adapter, tensor_of, weights)
  table = tensor_of.get(f"{uses.embedding}.weight") if uses else None
  config = {**weights.files.config}
  if adapter.config.get("task_type") in HEADLESS:
    config.setdefault("tie_word_embeddings", False)
  tie = tie_of_base(weights, table if table in weights.by_name else None, config) if uses or untie else None
  if tie is None or uses is None:
    _check_head_of_shared(uses.head if uses else None, tensor_of, weights)
    if untie:
      raise BadFile("--untie: the adapter changes no embedding that is the head of BASE, too. Leave it out.")
    return set()
  own = None if uses.head is None else f"{uses.head}.weight"
  head = tie.head or (tensor_of[own] if own else _head_of(tie.table, weights))
  found = changes.get(tie.table)
  if uses.alike and not untie:
    changes.pop(head, None)
    if tie.head is not None:
      changes[tie.head] = found
  elif not untie:
    raise BadFile(_why(uses.embedding, uses.head, tie))
  else:
    weights.added[head] = tie.table
    changes[head] = found if uses.alike else changes.get(head) or _change_of(own, adapter)
  return {own} if own else set()


def _check_unknown_tables(adapter: Adapter, tensor_of: Mapping[str, str], weights: Weights) -> None:
  """Raises for an adapted embedding of a name that is not known, where config.json says that the model may tie it."""
  config = weights.files.config
  for name, module in adapter.modules.items():
    tensor = tensor_of.get(f"{name}.weight")
    if module.kind != "embedding" or tensor not in weights.by_name or is_shared(name):
      continue
    tie = tie_of_base(weights, tensor, config) if config.get("architectures") else None
    if tie is not None and module.shape[0] == config.get("vocab_size") and not is_of_encoder(name):
      raise BadFile(
        f"{tensor}: may be the head's weight, too, and what such a model calls its head is not known here. Merge the"
        ' adapter in PEFT (merge_and_unload); or, if the head is a weight of its own, say "tie_word_embeddings": false'
        " in config.json."
      )


def _head_of(table: str, weights: Weights) -> str:
  """The tensor that torch has for the head that an embedding is tied to."""
  return f"{head_name(_module(table), map(_module_of, weights.by_name))}.weight"


def _check_head_of_shared(head: str | None, tensor_of: Mapping[str, str], weights: Weights) -> None:
  """Raises for a head that has no tensor, as it is tied to an embedding that an encoder and a decoder share."""
  shared = [name for name in weights.by_name if name.endswith(".weight") and is_shared(_module(name))]
  if head is not None and shared and tensor_of[f"{head}.weight"] not in weights.by_name:
    raise BadFile(
      f"{head}: is tied to {shared[0]}, of an encoder and a decoder, and cannot be a tensor of its own: they scale"
      " what a tied head returns. This adapter cannot be merged; keep it beside its base."
    )


def _change_of(parameter: str | None, adapter: Adapter) -> Change | None:
  """The change of a parameter that the base has no tensor for."""
  if parameter is None:
    return None
  return lambda value, dtype: adapter.merged(parameter, value, dtype=dtype)


def _why(embedding: str | None, head: str | None, tie: Tie) -> str:
  changed = f"{embedding} alone" if head is None else f"{head} alone" if embedding is None else "both, differently"
  told = f"{tie.table} is the head's weight, too" + (f" ({tie.head} is tied to it)" if tie.head else "")
  return (
    f"{told}, and the adapter changes {changed}: one tensor cannot hold that. Pass --untie, which writes the head as a"
    ' tensor of its own and sets "tie_word_embeddings" to false in config.json. (A model without a head needs no'
    ' --untie: its config.json says so by "architectures", or by "tie_word_embeddings": false.)'
  )
