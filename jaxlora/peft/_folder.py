"""`save`, `load` and `check`: folders of PEFT's around `to_modules` and `from_modules`."""

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import Any

from jaxlora._base.paths import opened
from jaxlora.peft._from_modules import check_base, tree_of_adapter
from jaxlora.peft._names import Names
from jaxlora.peft._read import read, read_with_keys
from jaxlora.peft._roles import Axes
from jaxlora.peft._serve import READERS
from jaxlora.peft._served import Finding, Serve, findings, readers_of, served
from jaxlora.peft._to_modules import adapter_of_tree, module_sizes
from jaxlora.peft._write import write, write_mlx


def save(
  folder: Any,
  tree: Any,
  *,
  names: Names = None,
  base_model_name_or_path: str | None = None,
  task_type: str | None = None,
  axes: Axes = None,
  serve: Serve = "peft",
) -> None:
  r"""Writes the adapter of a tree as a folder that `peft.PeftModel.from_pretrained` loads.

      lora_A.weight = a as (rank, in),    lora_B.weight = bᵀ as (out, rank),    scale as alpha says

  Kernels split into heads become matrices, convolutions (rank, in, *kernel) and (out, rank, 1, ...), embeddings
  `lora_embedding_A` and `_B`; scanned layers are written one by one. Ranks and alphas that differ are in `rank_pattern`
  and `alpha_pattern`, which other readers than PEFT do not read: for those, `serve` writes one rank and one scale, with
  zeros for the ranks that a module lacks and the rest of its scale in B. Leaves trained whole become
  `modules_to_save`, or, biases alone, `bias="lora_only"` or `"all"`. A token embedding of a tree without a head
  of its own is the head, too: both modules are written, with `ensure_weight_tying`. With DoRA they cannot be, as PEFT
  changes the look-ups alone: that is a warning. PEFT has one dropout for all modules: the most common one is written.

  Args:
    folder: made if it is not there; an adapter that it holds is replaced.
    tree: what `adapt` returned, or its trainable half. Bases may be `jax.ShapeDtypeStruct`s.
    names: regex over paths, or over those of the leaves' modules -> the torch module's name, with `\1` for a group of
      the regex and `{}` for the index of a stacked layer. The first that matches counts; leaves that none matches, and
      all of them with `None`, are named by the habits of the Hugging Face Hub: `h/0/attn/c_attn/kernel` is
      `transformer.h.0.attn.c_attn`; `layers_0`, `layers/0` and scanned `layers` are `model.layers.0`. Where a leaf
      and a torch module do not hold the same, a value is a `Split`, a `Joined` or `Experts`.
    base_model_name_or_path: written to the configuration.
    task_type: written to the configuration, such as `"CAUSAL_LM"`. For some PEFT takes the head from the file, and it
      is written, trained or not: `classifier` or `score` for `"SEQ_CLS"` and `"TOKEN_CLS"`, `qa_outputs` for
      `"QUESTION_ANS"`. Such tasks have no language model's head to tie.
    axes: regex -> roles, where nothing in the tree tells those of a leaf, adapted or trained whole: `"s"` for the axis
      of stacked layers, as in `"os"` for a norm's (features, layers).
    serve: who is to read the folder, beside PEFT: `"vllm"`, `"sglang"`, `"llama.cpp"`, or several. What they would not
      read is an error that says what to do; `check` and `jaxlora check` tell the same of any folder.

  Raises:
    PeftError: listing the leaves that PEFT's format has no place for, or that hold NaN, or the rules of readers that
      cannot be met; nothing is written.
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
  readers = tuple(dict.fromkeys(("peft", *readers_of(serve))))
  tree = opened(tree)
  adapter = adapter_of_tree(tree, names, axes, "save", task_type)
  about = {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
  adapter = dataclasses.replace(adapter, config=adapter.config | about)
  write(folder, served(adapter, None, readers, "save", module_sizes(tree, names, axes)))


def save_mlx(folder: Any, tree: Any, *, names: Names = None, axes: Axes = None) -> None:
  r"""Writes the adapter of a tree as a folder that mlx-lm loads: `mlx_lm.load(model, adapter_path=folder)`.

      lora_a = a as (in, rank),    lora_b = b as (rank, out),    y = W x + scale * (x lora_a) lora_b

  mlx-lm has one rank and one scale for all modules: smaller ranks are filled up with zeros, and what differs of the
  scales goes into `lora_b`. DoRA is mlx-lm's, too.

  Args:
    folder: made if it is not there; an adapter that it holds is replaced.
    tree: what `adapt` returned, or its trainable half.
    names: regex over paths -> the module's name, as for `save`; mlx-lm's models are called as the Hub's.
    axes: regex -> roles, as for `save`.

  Raises:
    PeftError: listing the leaves that mlx-lm's adapters cannot hold, such as parameters trained whole; nothing is
      written.
    ValueError: if the tree has no adapted leaf.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora, jaxlora.peft, tempfile
    >>> params = {"layers_0": {"q_proj": {"kernel": jnp.ones((16, 8))}}}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   jaxlora.peft.save_mlx(folder, tree)
    ...   loaded = jaxlora.peft.load(folder, params)
    >>> bool((loaded["layers_0"]["q_proj"]["kernel"].a == tree["layers_0"]["q_proj"]["kernel"].a).all())
    True

  Source: `mlx_lm/tuner/lora.py` and `load_adapters` in `mlx_lm/tuner/utils.py`, of mlx-lm 0.32.
  """
  write_mlx(folder, adapter_of_tree(tree, names, axes, "save_mlx"), "save_mlx")


def load(
  folder: Any,
  params: Any,
  *,
  names: Names = None,
  axes: Axes = None,
  probe: Callable[[Any], Any] | None = None,
  adapter_name: str | None = None,
  strict: bool = True,
) -> Any:
  """Reads a folder that PEFT wrote, and puts its adapter on `params`.

      a = lora_A.weight as (rank, *in),    b = lora_B.weightᵀ as (rank, *out)

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`; or mlx-lm's, with `adapters.safetensors`; or a
      LoRA file of diffusers or of kohya's scripts, or a folder with one.
    params: the base, as `adapt` takes it; arrays or `jax.ShapeDtypeStruct`s.
    names: as in `save`.
    axes: regex -> roles, one letter per axis, where the tree does not tell: `"s"` for the axis of stacked layers, as in
      `"os"` for a norm's (features, layers).
    probe: a function of `params` alone, as in `adapt`: traced, never run, to learn the roles.
    adapter_name: of several adapters in a folder, or in the keys of its tensors, the one to read; of a pipeline's LoRAs
      the component, such as `"unet"`.
    strict: whether weights that `target_modules` names and the file has no factors for are an error where other layers
      have theirs. Such weights stay the base's; a module that the file has nowhere is a warning in any case.

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
  return tree_of_adapter(
    read(folder, adapter_name=adapter_name), params, names, axes, probe, f"load: {folder}", strict=strict
  )


def check(folder: Any, serve: Serve = READERS, *, adapter_name: str | None = None) -> list[Finding]:
  """What readers will make of a PEFT folder: the rules of theirs that it breaks. Reads headers, and no values.

  Args:
    folder: as for `load`.
    serve: whose rules: `"peft"`, `"vllm"`, `"sglang"`, `"llama.cpp"`, or several.
    adapter_name: as for `load`.

  Returns:
    A `Finding` for each rule that does not hold, which prints what is required, what was found, what happens otherwise,
    the remedy, and the reader's function that asks for it. Rules of which `rule.note` is true may be met elsewhere.

  Raises:
    PeftError: if it is no folder that `load` reads.
    ValueError: for another reader.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora, jaxlora.peft, tempfile
    >>> params = {"layers_0": {"q_proj": {"kernel": jnp.ones((16, 8))}}}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, scaling="rslora"), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   jaxlora.peft.save(folder, tree)
    ...   [finding.rule.name for finding in jaxlora.peft.check(folder, "vllm")]
    ...   [finding.rule.name for finding in jaxlora.peft.check(folder, "sglang")]
    []
    ['scale', 'fused']

  Source: each rule's own, `finding.rule.source`.
  """
  adapter, keys = read_with_keys(Path(folder), adapter_name=adapter_name, mapped=True)
  return findings(adapter, keys, readers_of(serve))
