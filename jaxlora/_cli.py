"""The command line: `jaxlora inspect`, `convert` and `merge`."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import json
import logging
import math
from pathlib import Path
import re
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlora
from jaxlora import _streaming
from jaxlora._fingerprint import prints
from jaxlora._record import CheckpointError
from jaxlora._report import size, table
from jaxlora._streaming import Change, TensorFileError, TensorFiles
from jaxlora._targets import listed
from jaxlora._weight import LoraWeight, is_adapted, parts

_EXIT = """
exit codes: 0 done; 1 the file is bad, or does not fit; 2 usage, or an extra that is missing
"""


class BadFile(ValueError):
  """What a command says of a file before it gives up."""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit code."""
  options = _parser().parse_args(arguments)
  logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it raises
  try:
    report, lines = options.run(options)
  except ImportError as error:
    print(f"jaxlora: {error}. Install the extra: pip install 'jaxlora[peft]'", file=sys.stderr)
    return 2
  except (BadFile, CheckpointError, TensorFileError, ValueError, OSError) as error:
    if options.json:
      print(json.dumps({"error": str(error)}))
    print(f"jaxlora: {error}", file=sys.stderr)
    return 1
  print(json.dumps(report, indent=2) if options.json else "\n".join(lines))
  return int(bool(report.get("nan")))


Result = tuple[dict[str, Any], list[str]]  # for --json, and for people


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="jaxlora", description="Adapters in files: jaxlora's checkpoints and PEFT folders.", epilog=_EXIT
  )
  parser.add_argument("--version", action="version", version=jaxlora.__version__)
  commands = parser.add_subparsers(required=True, metavar="COMMAND")

  def command(name: str, run: Callable[[Any], Result], about: str, detail: str, example: str) -> Any:
    added = commands.add_parser(
      name,
      help=about,
      description=f"{about[0].upper()}{about[1:]}.\n{detail}",
      epilog=f"example:\n  {example}\n{_EXIT}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(run=run)
    added.add_argument("--json", action="store_true", help="print one JSON object")
    return added

  inspect = command(
    "inspect",
    _inspect,
    "show what an adapter adapts: ranks, alphas, sizes, norms, NaNs",
    "PATH is a checkpoint of jaxlora or a PEFT folder. NaNs make the exit code 1.",
    "jaxlora inspect runs/summaries/1200",
  )
  inspect.add_argument("path", metavar="PATH")

  convert = command(
    "convert",
    _convert,
    "turn a checkpoint into a PEFT folder, or the other way round",
    "The format of FROM decides. A checkpoint knows the names and shapes of its base. A PEFT folder does not, nor the\n"
    "names of a Flax model: those are read from --base, whose values are not looked at; without it the leaves are\n"
    "called by torch's names (h.0.attn.c_attn becomes h/0/attn/c_attn/kernel, of shape (in, out)), which leaves\n"
    "modules_to_save no shape: they need --base.",
    "jaxlora convert runs/summaries adapter --base-model openai-community/gpt2",
  )
  convert.add_argument("source", metavar="FROM")
  convert.add_argument("target", metavar="TO")
  convert.add_argument(
    "--base", metavar="FILE", help="names and shapes of the Flax base: safetensors, or a jaxlora checkpoint on it"
  )
  convert.add_argument("--names", metavar="FILE", help="JSON: the `names` of jaxlora.peft, regex -> torch module")
  convert.add_argument("--base-model", metavar="NAME", help="base_model_name_or_path in adapter_config.json")
  convert.add_argument("--task-type", metavar="TYPE", help="task_type in adapter_config.json, such as CAUSAL_LM")

  merge = command(
    "merge",
    _merge,
    "fold an adapter into a model's safetensors",
    "BASE is a safetensors file, an index of several, or a folder with either; its tensors are named as in torch, or\n"
    'by the paths of a Flax tree joined by "/" or ".". ADAPTER is a checkpoint of jaxlora or a PEFT folder. OUT is a\n'
    "file, or a new folder where BASE has an index. One tensor is in memory at a time, at most; the others are copied.",
    "jaxlora merge model.safetensors runs/summaries merged.safetensors",
  )
  merge.add_argument("base", metavar="BASE")
  merge.add_argument("adapter", metavar="ADAPTER")
  merge.add_argument("out", metavar="OUT")
  merge.add_argument("--names", metavar="FILE", help="JSON: the `names` of jaxlora.peft, regex -> torch module")
  merge.add_argument(
    "--any-base", action="store_true", help="merge though the base's fingerprint is not the recorded one"
  )
  return parser


# ----------------------------------------------------------------------------------------------------------------------
# Either format.


def _is_peft(path: str) -> bool:
  """Whether a path is a PEFT folder, and no checkpoint of jaxlora's."""
  return any((Path(path) / name).exists() for name in ("adapter_config.json", "adapter_model.safetensors"))


def _read_peft(path: str) -> Any:
  from jaxlora import _peft_file

  return _peft_file.read(path)


def _contents(path: str) -> Any:
  from jaxlora import checkpoint

  if not Path(path).exists() and "://" not in path:
    raise BadFile(f"{path}: there is no such folder.")
  return checkpoint.contents(path)


def _names(options: Any) -> dict[str, str] | None:
  if options.names is None:
    return None
  try:
    return json.loads(Path(options.names).read_text("utf-8"))
  except ValueError as error:
    raise BadFile(f"{options.names}: cannot be read as JSON: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# inspect.


def _inspect(options: Any) -> Result:
  if _is_peft(options.path):
    adapter = _read_peft(options.path)
    leaves = [_module_row(name, module) for name, module in adapter.modules.items()]
    leaves += [_row(name, "whole", value.shape, value) for name, value in adapter.whole.items()]
    about = {"format": "peft", "config": adapter.config, "unsupported": list(adapter.unsupported)}
    lines = [f"a PEFT folder, base model {adapter.config.get('base_model_name_or_path')}"]
    lines += [f"not supported here: {reason}" for reason in adapter.unsupported]
  else:
    found = _contents(options.path)
    leaves = [_node_row(path, node) for path, node in found.leaves.items()]
    about = {"format": "jaxlora", "step": found.step, "training": found.training, "metadata": found.metadata}
    about |= {"versions": found.versions, "base": found.base}
    state = " with its optimizer state" if found.training else ""
    lines = [
      f"a checkpoint of jaxlora {found.versions['jaxlora']} (format {found.versions['version']}), step {found.step}"
      f"{state}; a base of {len(found.base)} leaves"
    ]
    lines += [f"metadata: {json.dumps(found.metadata)}"] if found.metadata else []
  nan = sum(leaf["nan"] for leaf in leaves)
  total = {"parameters": sum(leaf["parameters"] for leaf in leaves), "bytes": sum(leaf["bytes"] for leaf in leaves)}
  bad = [leaf["path"] for leaf in leaves if leaf["nan"]]
  lines += [_leaf_table(leaves), f"{total['parameters']:,} parameters, {size(total['bytes'])}"]
  lines += [f"NaN or infinite values in {listed(bad)}"] if bad else []
  return about | {"leaves": leaves, **total, "nan": nan}, lines


def _node_row(path: str, node: Any) -> dict[str, Any]:
  if not isinstance(node, LoraWeight):
    return _row(path, "whole", node.base.shape, node.value)
  arrays = [part for name, part in parts(node).items() if name != "base" and part is not None]
  row = _row(path, node.roles, node.base.shape, *arrays)
  fields = {"rank": node.rank, "alpha": node.alpha, "scale": node.scale, "dropout": node.dropout}
  stack = node.roles.count("s")
  a, b = (_stacked(np.asarray(factor), stack) for factor in node.factors())
  return row | fields | {"variant": node.variant} | _norms(a, b, 1.0)


def _stacked(factor: np.ndarray, stack: int) -> np.ndarray:
  """(layers, rank, own), flattened."""
  return factor.reshape(math.prod(factor.shape[:stack]), factor.shape[stack], -1)


def _module_row(name: str, module: Any) -> dict[str, Any]:
  held = [array for array in (module.a, module.b, module.magnitude) if array is not None]
  shape = module.delta().shape
  row = _row(name, module.kind, shape, *held) | {"rank": module.rank, "alpha": module.alpha, "scale": module.scale}
  return row | _norms(module.a.reshape(1, module.rank, -1), module.b_matrix.T[None], module.scale)


def _row(path: str, kind: str, shape: Iterable[int], *arrays: np.ndarray) -> dict[str, Any]:
  return {
    "path": path,
    "kind": kind,
    "shape": list(shape),
    "dtype": str(arrays[0].dtype),
    "parameters": sum(array.size for array in arrays),
    "bytes": sum(array.nbytes for array in arrays),
    "norm": _norm(*arrays) if kind == "whole" else None,
    "nan": sum(int((~np.isfinite(_wide(array))).sum()) for array in arrays),
  }


def _wide(array: np.ndarray) -> np.ndarray:
  return array if array.dtype.kind == "c" else array.astype(np.float64)


def _norm(*arrays: np.ndarray) -> float | None:
  return _number(math.sqrt(sum(float(np.vdot(_wide(array), _wide(array)).real) for array in arrays)))


def _number(value: float) -> float | None:
  return value if math.isfinite(value) else None  # JSON has no NaN


def _norms(a: np.ndarray, b: np.ndarray, scale: float) -> dict[str, float | None]:
  """Frobenius norms of A, B and the delta, for (stack, rank, in) and (stack, rank, out).

  |A B|² = tr((A Aᵀ)(B Bᵀ)): the product itself is as large as the weight, and is not formed.
  """
  a, b = a.astype(np.float64), b.astype(np.float64)
  with np.errstate(invalid="ignore", over="ignore"):
    square = np.sum((a @ a.swapaxes(1, 2)) * (b @ b.swapaxes(1, 2)))
  return {"a_norm": _norm(a), "b_norm": _norm(b), "norm": _number(scale * math.sqrt(max(float(square), 0.0)))}


def _leaf_table(leaves: Sequence[Mapping[str, Any]]) -> str:
  number = lambda value: "-" if value is None else f"{value:.4g}"
  rows: list[tuple[str, ...]] = [
    ("leaf", "shape", "kind", "rank", "alpha", "scale", "dtype", "size", "|A|", "|B|", "|delta|", "NaN")
  ]
  for leaf in leaves:
    shape = " x ".join(map(str, leaf["shape"])) or "-"
    numbers = [number(leaf.get(name)) for name in ("rank", "alpha", "scale")]
    norms = [number(leaf.get(name)) for name in ("a_norm", "b_norm", "norm")]
    rows.append(
      (leaf["path"], shape, leaf["kind"], *numbers, leaf["dtype"], size(leaf["bytes"]), *norms, str(leaf["nan"]))
    )
  return table(rows)


# ----------------------------------------------------------------------------------------------------------------------
# convert.


def _convert(options: Any) -> Result:
  from jaxlora import checkpoint, peft

  names = _names(options)
  if _is_peft(options.source):
    params, axes = (_base_shapes(options.base), None) if options.base else _shapes_by_adapter(options.source)
    tree = peft.load(options.source, params, names=names, axes=axes)
    config = _read_peft(options.source).config
    metadata = {"peft": {name: config.get(name) for name in ("base_model_name_or_path", "task_type")}}
    checkpoint.save_part(options.target, tree, metadata=metadata, whole_base=bool(options.base))
    formats = ("peft", "jaxlora")
  else:
    found = _contents(options.source)
    base = {path: _shape_of_print(text) for path, text in found.base.items()}
    about = found.metadata.get("peft") if isinstance(found.metadata.get("peft"), dict) else {}
    model = options.base_model or about.get("base_model_name_or_path")
    task = options.task_type or about.get("task_type")
    peft.save(options.target, base | found.leaves, names=names, base_model_name_or_path=model, task_type=task)
    formats = ("jaxlora", "peft")
  report = {"from": options.source, "to": options.target, "formats": list(formats)}
  return report, [f"{options.source} ({formats[0]}) -> {options.target} ({formats[1]})"]


def _shape_of_print(text: str) -> jax.ShapeDtypeStruct:
  """`"float32[2,3]:0f3c..."` -> its shape and dtype; random keys and the like are no parameters: bytes."""
  dtype, shape = text.split(":")[0].rstrip("]").rsplit("[", 1)
  try:
    kind = jnp.dtype(dtype)
  except TypeError:
    kind = jnp.dtype(np.uint8)
  return jax.ShapeDtypeStruct(tuple(int(n) for n in shape.split(",") if n), kind)


def _base_shapes(path: str) -> dict[str, Any]:
  """The leaves of a Flax base, without their values."""
  if Path(path).is_dir() and not any(Path(path).glob("*.safetensors*")):
    return {path: _shape_of_print(text) for path, text in _contents(path).base.items()}
  return _flax_shapes(_streaming.open_files(path))


def _flax_shapes(files: TensorFiles) -> dict[str, Any]:
  return {
    path: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype or np.uint8)
    for path, tensor in zip(_flax_paths(files.tensors).values(), files.tensors.values(), strict=True)
  }


def _flax_paths(names: Iterable[str]) -> dict[str, str]:
  """Names of tensors -> paths of leaves, joined by "/" in the file, or by "." where none has a "/"."""
  names = list(names)
  joined = any("/" in name for name in names)
  return {name: name if joined else name.replace(".", "/") for name in names}


def _shapes_by_adapter(path: str) -> tuple[dict[str, Any], dict[str, str]]:
  """Leaves as Flax would hold the adapted modules under their torch names, and the roles of their axes."""
  adapter = _read_peft(path)
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


# ----------------------------------------------------------------------------------------------------------------------
# merge.


def _merge(options: Any) -> Result:
  files = _streaming.open_files(options.base)
  changes = _changes(options, files)
  out = Path(options.out)
  if out.is_dir() and files.index is None:
    out = out / files.files[0].name
  if any(out.exists() and out.samefile(file) for file in files.files):
    raise BadFile(f"{out}: is the base itself; expected another place.")
  from tqdm import tqdm

  total = sum(file.stat().st_size for file in files.files)
  with tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="merging", leave=False) as bar:
    _streaming.rewrite(files, out, changes, bar.update)
  report = {"out": str(out), "tensors": len(files.tensors), "merged": sorted(changes), "bytes": files.size}
  return report, [f"{out}: {len(changes)} of {len(files.tensors)} tensors merged, {size(files.size)}"]


def _changes(options: Any, files: TensorFiles) -> dict[str, Change]:
  """What becomes of which tensor, all of the adapter placed or an error."""
  names = _names(options)
  if _is_peft(options.adapter):
    adapter = _read_peft(options.adapter)
    changes, lost = _torch_changes(adapter, files)
    if lost and _looks_like_flax(files):
      from jaxlora import peft

      leaves = peft.load(options.adapter, _flax_shapes(files), names=names)
      nodes = {path: node for path, node in leaves.items() if is_adapted(node)}
      return _flax_changes(nodes, {}, files, True)[0]
  else:
    found = _contents(options.adapter)
    changes, lost = _flax_changes(found.leaves, found.base, files, options.any_base)
    if lost and not _looks_like_flax(files):
      changes, lost = _torch_changes(_as_peft(found, names), files)
  if lost:
    raise BadFile(
      f"{options.adapter}: adapts {listed(sorted(lost))}, which {options.base} does not hold. Its tensors:"
      f" {listed(list(files.tensors))}. It is another model's adapter, or its names need --names."
    )
  return changes


def _looks_like_flax(files: TensorFiles) -> bool:
  return any(re.search(r"[./](kernel|embedding|scale)$", name) for name in files.tensors)


def _as_peft(found: Any, names: Any) -> Any:
  """A checkpoint's adapter in torch's names and layouts."""
  from jaxlora import peft

  base = {path: _shape_of_print(text) for path, text in found.base.items()}
  with tempfile.TemporaryDirectory() as folder:
    peft.save(folder, base | found.leaves, names=names)
    return _read_peft(folder)


def _torch_changes(adapter: Any, files: TensorFiles) -> tuple[dict[str, Change], list[str]]:
  """By torch's names, and the names that the base does not hold.

  Files of a bare model lack the beginning that the same model has inside one with a head (`transformer.h.0`, `h.0`), or
  have one more: one difference for all names is taken.
  """
  wanted = [*(f"{name}.weight" for name in adapter.modules), *adapter.whole]
  beginnings = sorted({name.split(".", 1)[0] + "." for name in (*wanted, *files.tensors)})
  ways = [("", ""), *((b, "") for b in beginnings), *(("", b) for b in beginnings)]  # what a name loses and gets
  renamed = [{name: new + name.removeprefix(old) for name in wanted} for old, new in ways]
  places = max(renamed, key=lambda places: sum(place in files.tensors for place in places.values()))
  old, new = ways[renamed.index(places)]
  shapes = {old + name.removeprefix(new): tensor.shape for name, tensor in files.tensors.items()}
  first = adapter.stores_inputs_first(shapes)
  changes: dict[str, Change] = {
    place: functools.partial(adapter.merged, name, inputs_first=first)
    for name, place in places.items()
    if place in files.tensors
  }
  _check_floating(changes, files)
  return changes, [name for name, place in places.items() if place not in files.tensors]


def _flax_changes(
  nodes: Mapping[str, Any], base: Mapping[str, str], files: TensorFiles, any_base: bool
) -> tuple[dict[str, Change], list[str]]:
  """By the paths of a Flax tree, under `params` or not, and the paths that the base does not hold."""
  paths = {path.removeprefix("params/"): name for name, path in _flax_paths(files.tensors).items()}
  places = {path: paths.get(path.removeprefix("params/")) for path in nodes}
  changes: dict[str, Change] = {
    place: functools.partial(_merged, path, nodes[path], None if any_base else base.get(path))
    for path, place in places.items()
    if place is not None
  }
  for path, place in places.items():
    if place is not None and files.tensors[place].shape != tuple(nodes[path].base.shape):
      raise BadFile(
        f"{place}: shape {files.tensors[place].shape}, the adapter's base has {tuple(nodes[path].base.shape)}."
      )
  _check_floating(changes, files)
  return changes, [path for path, place in places.items() if place is None]


def _check_floating(changes: Iterable[str], files: TensorFiles) -> None:
  for name in changes:
    dtype = files.tensors[name].dtype
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
      raise BadFile(f"{name}: dtype {dtype or 'unknown'} cannot be merged into; expected a floating one.")


def _merged(path: str, node: Any, expected: str | None, value: np.ndarray) -> np.ndarray:
  found = str(prints({"leaf": value})["leaf"])
  if expected is not None and ":" in expected and found != expected:
    raise BadFile(
      f"{path}: {found} in the base, the adapter was trained on {expected}. Pass that base, or --any-base to merge all"
      " the same."
    )
  whole = jaxlora.merge({path: dataclasses.replace(node, base=value)})[path]
  return np.asarray(whole).astype(value.dtype)
