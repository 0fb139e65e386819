"""`save` and `load`: folders of PEFT's around `to_modules` and `from_modules`."""

from collections.abc import Callable
import dataclasses
from typing import Any

from jaxlora.peft._from_modules import check_base, tree_of_adapter
from jaxlora.peft._names import Names
from jaxlora.peft._read import read
from jaxlora.peft._roles import Axes
from jaxlora.peft._to_modules import adapter_of_tree
from jaxlora.peft._write import write


def save(
  folder: Any,
  tree: Any,
  *,
  names: Names = None,
  base_model_name_or_path: str | None = None,
  task_type: str | None = None,
  axes: Axes = None,
) -> None:
  r"""Writes the adapter of a tree as a folder that `peft.PeftModel.from_pretrained` loads.

      lora_A.weight = a as (rank, in),    lora_B.weight = bᵀ as (out, rank),    scale as alpha says

  Kernels split into heads become matrices, convolutions (rank, in, *kernel) and (out, rank, 1, ...), embeddings
  `lora_embedding_A` and `_B`; scanned layers are written one by one. Ranks and alphas that differ are in `rank_pattern`
  and `alpha_pattern`, which vLLM does not read: it takes `lora_alpha / r` for all. Leaves trained whole become
  `modules_to_save`, or, biases alone, `bias="lora_only"` or `"all"`. A token embedding
  of a tree without a head is written as the head, too (`lm_head`, `ensure_weight_tying`), which PEFT adapts as a module
  of its own; with DoRA it cannot be: there PEFT changes the look-ups alone. PEFT has one dropout for
  all modules: the most common one is written.

  Args:
    folder: made if it is not there; an adapter that it holds is replaced.
    tree: what `adapt` returned, or its trainable half. Bases may be `jax.ShapeDtypeStruct`s.
    names: regex over paths, or over those of the leaves' modules -> the torch module's name, with `\1` for a group of
      the regex and `{}` for the index of a stacked layer. The first that matches counts; leaves that none matches, and
      all of them with `None`, are named by the habits of the Hugging Face Hub: `h/0/attn/c_attn/kernel` is
      `transformer.h.0.attn.c_attn`; `layers_0`, `layers/0` and scanned `layers` are `model.layers.0`. Where a leaf
      and a torch module do not hold the same, a value is a `Split` or a `Joined`.
    base_model_name_or_path: written to the configuration.
    task_type: written to the configuration, such as `"CAUSAL_LM"`; tasks such as `"SEQ_CLS"` have no head to tie.
    axes: regex -> roles, for kernels trained whole whose axes nothing tells.

  Raises:
    PeftError: listing the leaves that PEFT's format has no place for, or that hold NaN; nothing is written.
    ValueError: if the tree has no adapted leaf.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora, jaxlora.peft, tempfile
    >>> params = {"layers_0": {"q_proj": {"kernel": jnp.ones((16, 8))}}}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   jaxlora.peft.save(folder, tree)
    ...   loaded = jaxlora.peft.load(folder, params)
    >>> bool((loaded["layers_0"]["q_proj"]["kernel"].a == tree["layers_0"]["q_proj"]["kernel"].a).all())
    True

  Source: the format is that of `peft` 0.21, `peft/utils/save_and_load.py` and `peft/tuners/lora/`.
  """
  adapter = adapter_of_tree(tree, names, axes, "save", task_type)
  about = {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
  write(folder, dataclasses.replace(adapter, config=adapter.config | about))


def load(
  folder: Any,
  params: Any,
  *,
  names: Names = None,
  axes: Axes = None,
  probe: Callable[[Any], Any] | None = None,
  adapter_name: str | None = None,
) -> Any:
  """Reads a folder that PEFT wrote, and puts its adapter on `params`.

      a = lora_A.weight as (rank, *in),    b = lora_B.weightᵀ as (rank, *out)

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`.
    params: the base, as `adapt` takes it; arrays or `jax.ShapeDtypeStruct`s.
    names: as in `save`.
    axes: regex -> roles, one letter per axis, for leaves where shapes do not tell: a square matrix is taken for (in,
      out), as Flax stores it, unless this or the probe says otherwise.
    probe: a function of `params` alone, as in `adapt`: traced, never run, to learn the roles.
    adapter_name: of several adapters in a folder, or in the keys of its tensors, the one to read.

  Returns:
    A tree of the same nesting with `LoraWeight`s, and `FullWeight`s for `modules_to_save` and trained biases. Factors
    keep the file's dtype. In a stack of layers of which only some are adapted the others have zero factors.

  Raises:
    PeftError: listing everything that does not fit: tensors without a leaf or with several, halves, shapes, ranks, NaN,
      options that make it another method than LoRA. The content of the files raises no other error.
    ValueError: if a leaf of `params` is adapted already.

  Example: see `save`.

  Source: the format is that of `peft` 0.21, `peft/utils/save_and_load.py` and `peft/tuners/lora/`.
  """
  check_base(params, names, "load")
  return tree_of_adapter(read(folder, adapter_name=adapter_name), params, names, axes, probe, f"load: {folder}")
