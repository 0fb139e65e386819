"""`jaxlora convert`: each file is read once, and what comes of it is written once."""

import dataclasses
from pathlib import Path
import re
from typing import Any

import jax

from jaxlora._base.text import listed
from jaxlora._cli.bases import open_base
from jaxlora._cli.lora_leaves import lora_leaves
from jaxlora._cli.result import BadFile, Result
from jaxlora._cli.sources import (
  axes_of,
  check_names,
  existing,
  is_checkpoint,
  is_peft,
  names_of,
  shapes_of_base,
  shapes_of_files,
)
from jaxlora.checkpoint._adapter import contents, save_part
from jaxlora.hub._gguf_lora import read_gguf_adapter, save_gguf_adapter, write_gguf_adapter
from jaxlora.peft._folder import save, save_mlx
from jaxlora.peft._from_modules import from_modules
from jaxlora.peft._lora_leaves import from_lora_leaves
from jaxlora.peft._read import read
from jaxlora.peft._records import Adapter, fail
from jaxlora.peft._tied import HEADLESS, uses_of
from jaxlora.peft._write import write, write_mlx

_METADATA = ("base_model_name_or_path", "task_type")  # what a checkpoint's metadata keeps of adapter_config.json


def run_convert(options: Any) -> Result:
  """Converts FROM to TO, whose format is the other one where nothing else is asked for."""
  if (leaves := lora_leaves(options.source)) is not None:
    return _of_lora_leaves(options, leaves, options.to or "peft")
  if options.gguf or ".gguf" in (Path(options.source).suffix, Path(options.target).suffix):
    return _with_gguf(options)
  files = is_peft(options.source)
  formats = ("peft", options.to or "jaxlora") if files else ("jaxlora", options.to or "peft")
  if formats == ("jaxlora", "jaxlora"):
    raise BadFile(f"--to jaxlora: {options.source} is a checkpoint of jaxlora's.")
  if options.serve and formats[1] == "mlx-lm":
    raise BadFile("--serve: READER loads PEFT's folders, and --to mlx-lm writes none.")
  if options.serve and formats[0] == "peft":
    raise BadFile(
      f"--serve: {options.source} is a PEFT folder; jaxlora check FOLDER --serve READER --write OUT does it."
    )
  if files:
    _of_files(options, formats[1])
  else:
    _of_checkpoint(options, formats[1])
  report = {"from": options.source, "to": options.target, "formats": list(formats)}
  return report, [f"{options.source} ({formats[0]}) -> {options.target} ({formats[1]})"]


def _with_gguf(options: Any) -> Result:
  """llama.cpp's adapter -> any other format, or the other way round."""
  source, target = Path(options.source), Path(options.target)
  if not options.gguf:
    raise BadFile("a GGUF adapter's names and rows are those of a model's GGUF file. Pass it: --gguf MODEL.gguf.")
  if (source.suffix == ".gguf") == (target.suffix == ".gguf"):
    raise BadFile(f"--gguf: expected a name that ends in .gguf for one of FROM and TO, found {source} and {target}.")
  if options.serve or (target.suffix == ".gguf" and options.to):
    raise BadFile(f"--{'serve' if options.serve else 'to'}: says something of other formats. Leave it out with --gguf.")
  if source.suffix == ".gguf":
    forms = "gguf", options.to or "peft"
    _of_adapter(options, read_gguf_adapter(source, Path(options.gguf)), forms[1])
  elif is_peft(options.source):
    forms = "peft", "gguf"
    adapter = read(options.source, adapter_name=options.adapter_name)
    if adapter.unsupported:
      raise fail(options.source, adapter.unsupported)
    check_names(adapter, options.source)
    write_gguf_adapter(target, adapter, Path(options.gguf))
  else:
    forms, found = ("jaxlora", "gguf"), contents(existing(options.source))
    tree = shapes_of_base(found) | found.leaves
    save_gguf_adapter(target, tree, base=options.gguf, names=names_of(options), axes=axes_of(options))
  report = {"from": options.source, "to": options.target, "formats": list(forms)}
  return report, [f"{options.source} ({forms[0]}) -> {options.target} ({forms[1]})"]


def _of_files(options: Any, form: str) -> None:
  """An adapter in files of PEFT's or of another library -> a checkpoint of jaxlora's, or files of another library."""
  _of_adapter(options, read(options.source, adapter_name=options.adapter_name), form)


def _of_adapter(options: Any, adapter: Adapter, form: str) -> None:
  """An adapter in torch's modules -> a checkpoint of jaxlora's, or files of another library."""
  if form != "jaxlora":
    if adapter.unsupported:
      raise fail(options.source, adapter.unsupported)
    check_names(adapter, options.source)
    if options.base_model or options.task_type:
      about = {_METADATA[0]: options.base_model, _METADATA[1]: options.task_type}
      config = adapter.config | {name: given for name, given in about.items() if given}
      adapter = dataclasses.replace(adapter, config=config)
    write(options.target, adapter) if form == "peft" else write_mlx(options.target, adapter, options.source)
    return
  if options.axes and not options.base:
    raise BadFile("--axes: says how a base stores its weights. Pass it with --base FILE.")
  params, axes = (_shapes_of(options.base), axes_of(options)) if options.base else _flax_shapes(adapter, options.source)
  tree = from_modules(adapter, params, names=names_of(options), axes=axes, strict=False)
  metadata = {"peft": {name: adapter.config.get(name) for name in _METADATA}}
  save_part(options.target, tree, metadata=metadata, whole_base=bool(options.base))


def _of_lora_leaves(options: Any, leaves: dict[str, Any], form: str) -> Result:
  """Factors of qwix, Tunix or `flax.nnx.LoRA` beside their weights -> any other format."""
  tree, about = (
    from_lora_leaves(leaves, alpha=options.alpha, axes=axes_of(options)),
    dict(zip(_METADATA, (options.base_model, options.task_type), strict=True)),
  )
  if form == "peft":
    save(options.target, tree, names=names_of(options), serve=options.serve or "peft", **about)
  elif form == "mlx-lm":
    save_mlx(options.target, tree, names=names_of(options))
  else:
    save_part(options.target, tree, metadata={"peft": about}, whole_base=False)
  report = {"from": options.source, "to": options.target, "formats": ["flax", form]}
  return report, [f"{options.source} (factors beside weights) -> {options.target} ({form})"]


def _of_checkpoint(options: Any, form: str) -> None:
  """A checkpoint of jaxlora's -> a folder of PEFT's or mlx-lm's."""
  found = contents(existing(options.source))
  if form == "mlx-lm":
    save_mlx(options.target, shapes_of_base(found) | found.leaves, names=names_of(options), axes=axes_of(options))
    return
  kept = found.metadata.get("peft")
  about: dict[str, Any] = {name: kept.get(name) if isinstance(kept, dict) else None for name in _METADATA}
  about |= {
    name: given for name, given in zip(_METADATA, (options.base_model, options.task_type), strict=True) if given
  }
  about["serve"] = options.serve or "peft"
  save(options.target, shapes_of_base(found) | found.leaves, names=names_of(options), axes=axes_of(options), **about)


def _shapes_of(base: str) -> dict[str, jax.ShapeDtypeStruct]:
  """The leaves of a Flax base, without their values: those of its files, or those that a checkpoint knows."""
  if is_checkpoint(base):
    return shapes_of_base(contents(existing(base)))
  return shapes_of_files(open_base(base))


def _flax_shapes(adapter: Adapter, source: str) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, str]]:
  """The leaves that Flax would have for the adapted modules, under their torch names, and the roles of their axes."""
  if adapter.whole or adapter.tokens:
    raise BadFile(
      f"{source}: holds parameters trained whole ({listed(sorted({**adapter.whole, **adapter.tokens}))}), whose layout"
      " in Flax only the base tells. Pass --base FILE."
    )
  params, axes = {}, {}
  uses = uses_of(adapter)
  headless = adapter.config.get("task_type") in HEADLESS
  if uses is not None and uses.head is None and not uses.alike and not headless:
    raise BadFile(
      f"{source}: adapts the look-ups of {uses.embedding} alone; only the base tells whether the model's head is a"
      " weight of its own. Pass --base FILE."
    )
  for name, module in adapter.modules.items():
    if uses is not None and uses.alike and name == uses.head:
      continue  # the embedding's own weight
    kind = "embedding" if module.kind == "embedding" else "kernel"
    leaf = f"{name.replace('.', '/')}/{kind}"
    out, inputs, *kernel = module.shape
    shape = (out, inputs) if kind == "embedding" else (*kernel, inputs, out)
    params[leaf] = jax.ShapeDtypeStruct(shape, module.a.dtype)
    axes[re.escape(leaf)] = "i" * (len(shape) - 1) + "o"
  return params, axes
