"""`jaxlora convert`."""

from pathlib import Path
import re
from typing import Any

import jax

from jaxlora._base.text import listed
from jaxlora._cli.main import Result
from jaxlora._cli.sources import BadFile, contents_of, flax_shapes, is_peft, names_of, read_peft, shape_of_print
from jaxlora._cli.tensors import open_files


def run_convert(options: Any) -> Result:
  from jaxlora import peft
  from jaxlora.checkpoint import _adapter

  names = names_of(options)
  if is_peft(options.source):
    params, axes = (_base_shapes(options.base), None) if options.base else _shapes_by_adapter(options.source)
    tree = peft.load(options.source, params, names=names, axes=axes)
    config = read_peft(options.source).config
    metadata = {"peft": {name: config.get(name) for name in ("base_model_name_or_path", "task_type")}}
    _adapter.save_part(options.target, tree, metadata=metadata, whole_base=bool(options.base))
    formats = ("peft", "jaxlora")
  else:
    found = contents_of(options.source)
    base = {path: shape_of_print(text) for path, text in found.base.items()}
    about = found.metadata.get("peft") if isinstance(found.metadata.get("peft"), dict) else {}
    model = options.base_model or about.get("base_model_name_or_path")
    task = options.task_type or about.get("task_type")
    peft.save(options.target, base | found.leaves, names=names, base_model_name_or_path=model, task_type=task)
    formats = ("jaxlora", "peft")
  report = {"from": options.source, "to": options.target, "formats": list(formats)}
  return report, [f"{options.source} ({formats[0]}) -> {options.target} ({formats[1]})"]


def _base_shapes(path: str) -> dict[str, Any]:
  """The leaves of a Flax base, without their values."""
  if Path(path).is_dir() and not any(Path(path).glob("*.safetensors*")):
    return {path: shape_of_print(text) for path, text in contents_of(path).base.items()}
  return flax_shapes(open_files(path))


def _shapes_by_adapter(path: str) -> tuple[dict[str, Any], dict[str, str]]:
  """Leaves as Flax would hold the adapted modules under their torch names, and the roles of their axes."""
  adapter = read_peft(path)
  if adapter.whole:
    raise BadFile(
      f"{path}: holds parameters trained whole ({listed(sorted(adapter.whole))}), whose layout in Flax only the base"
      " tells. Pass --base FILE."
    )
  params, axes = {}, {}
  for name, module in adapter.modules.items():
    out, inputs, *kernel = module.delta().shape
    shape = (out, inputs) if module.kind == "embedding" else (*kernel, inputs, out)
    leaf = f"{name.replace('.', '/')}/{'embedding' if module.kind == 'embedding' else 'kernel'}"
    params[leaf] = jax.ShapeDtypeStruct(shape, module.a.dtype)
    axes[re.escape(leaf)] = "i" * (len(shape) - 1) + "o"
  return params, axes
