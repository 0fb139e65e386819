"""`jaxlora convert`: each file is read once, and what comes of it is written once."""

import re
from typing import Any

import jax

from jaxlora._base.text import listed
from jaxlora._cli.bases import open_base
from jaxlora._cli.result import BadFile, Result
from jaxlora._cli.sources import existing, is_checkpoint, is_peft, names_of, shapes_of_base, shapes_of_files
from jaxlora.checkpoint._adapter import contents, save_part
from jaxlora.peft._folder import save
from jaxlora.peft._from_modules import from_modules
from jaxlora.peft._read import read
from jaxlora.peft._records import Adapter
from jaxlora.peft._tied import HEADLESS, uses_of

_METADATA = ("base_model_name_or_path", "task_type")  # what a checkpoint's metadata keeps of adapter_config.json


def run_convert(options: Any) -> Result:
  """Converts FROM, whose format decides, to TO."""
  formats = ("peft", "jaxlora") if is_peft(options.source) else ("jaxlora", "peft")
  if options.serve and formats[0] == "peft":
    raise BadFile(
      f"--serve: {options.source} is a PEFT folder; jaxlora check FOLDER --serve READER --write OUT does it."
    )
  (_to_checkpoint if formats[0] == "peft" else _to_peft)(options)
  report = {"from": options.source, "to": options.target, "formats": list(formats)}
  return report, [f"{options.source} ({formats[0]}) -> {options.target} ({formats[1]})"]


def _to_checkpoint(options: Any) -> None:
  """A PEFT folder -> a checkpoint of jaxlora's."""
  adapter = read(options.source, adapter_name=options.adapter_name)
  params, axes = (_shapes_of(options.base), None) if options.base else _flax_shapes(adapter, options.source)
  tree = from_modules(adapter, params, names=names_of(options), axes=axes)
  metadata = {"peft": {name: adapter.config.get(name) for name in _METADATA}}
  save_part(options.target, tree, metadata=metadata, whole_base=bool(options.base))


def _to_peft(options: Any) -> None:
  """A checkpoint of jaxlora's -> a PEFT folder."""
  found = contents(existing(options.source))
  kept = found.metadata.get("peft")
  about: dict[str, Any] = {name: kept.get(name) if isinstance(kept, dict) else None for name in _METADATA}
  about |= {
    name: given for name, given in zip(_METADATA, (options.base_model, options.task_type), strict=True) if given
  }
  about["serve"] = options.serve or "peft"
  save(options.target, shapes_of_base(found) | found.leaves, names=names_of(options), **about)


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
