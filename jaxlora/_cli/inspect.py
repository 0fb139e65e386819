"""`jaxlora inspect`: a table of what an adapter holds. Tensors are looked at one by one, and no delta is formed."""

from collections.abc import Sequence
import json
from typing import Any

import numpy as np

from jaxlora._base.text import listed, size
from jaxlora._cli.lora_leaves import lora_leaves
from jaxlora._cli.norms import Measured, delta_norm, measured, measured_flat, tensor_norm
from jaxlora._cli.plot import plot
from jaxlora._cli.result import BadFile, Result
from jaxlora._cli.show import Line, Table
from jaxlora._cli.sources import existing, is_peft
from jaxlora._weight.matrices import thin
from jaxlora._weight.weight import LoraWeight
from jaxlora.checkpoint._adapter import contents
from jaxlora.peft._read import read
from jaxlora.peft._records import Module
from jaxlora.peft._tied import uses_of, without_head


def run_inspect(options: Any) -> Result:
  """Reports on PATH: where it comes from, a row per leaf, totals."""
  if lora_leaves(options.path) is not None:
    raise BadFile(
      f"{options.path}: a tree with factors beside its weights, as qwix and flax.nnx.LoRA leave them. Convert it first:"
      " jaxlora convert PATH FOLDER"
    )
  about, rows, told = (_peft_report if is_peft(options.path) else _checkpoint_report)(options)
  total = {name: sum(row[name] for row in rows) for name in ("parameters", "bytes", "nan")}
  broken = [row["path"] for row in rows if row["nan"]]
  lines: list[Line] = [*told, _table(rows), f"{total['parameters']:,} parameters, {size(total['bytes'])}"]
  lines += [f"NaN or infinite values in {listed(broken)}"] if broken else []
  if options.plot is not None:
    plot(rows, options.plot)
    about, lines = about | {"plot": options.plot}, [*lines, f"{options.plot}: written"]
  return about | {"leaves": rows} | total, lines


Row = dict[str, Any]


def _peft_report(options: Any) -> tuple[dict[str, Any], list[Row], list[str]]:
  """The fields of the report on an adapter of PEFT's or another library's, its rows, and the lines above the table."""
  adapter = read(options.path, adapter_name=options.adapter_name, mapped=True)
  uses = uses_of(adapter)
  tied = uses.head if uses is not None and uses.alike else None
  adapter = adapter if tied is None else without_head(adapter, tied)  # its factors are those of the embedding
  rows = [_module_row(name, module) for name, module in adapter.modules.items()]
  rows += [_whole_row(name, value.shape, value) for name, value in adapter.whole.items()]
  rows += [
    _whole_row(name, tokens.rows.shape, tokens.rows) | {"kind": "tokens"} for name, tokens in adapter.tokens.items()
  ]
  about = {"format": adapter.form.lower(), "config": adapter.config, "unsupported": list(adapter.unsupported)}
  model = adapter.config.get("base_model_name_or_path")
  lines = [f"an adapter, {adapter.form}; base model {model}"]
  lines += [] if tied is None else [f"{tied} is tied to its embedding: both are adapted alike"]
  return about, rows, lines + [f"not supported here: {reason}" for reason in adapter.unsupported]


def _checkpoint_report(options: Any) -> tuple[dict[str, Any], list[Row], list[str]]:
  """The fields, rows and lines of a checkpoint's report."""
  found = contents(existing(options.path))
  rows = [_node_row(leaf, node) for leaf, node in found.leaves.items()]
  about = {"format": "jaxlora", "step": found.step, "training": found.training, "metadata": found.metadata}
  about |= {"versions": found.versions, "base": found.base}
  state = " with its optimizer state" if found.training else ""
  lines = [
    f"a checkpoint of jaxlora {found.versions['jaxlora']} (format {found.versions['version']}), step {found.step}"
    f"{state}; a base of {len(found.base)} leaves"
  ]
  return about, rows, lines + ([f"metadata: {json.dumps(found.metadata)}"] if found.metadata else [])


def _module_row(name: str, module: Module) -> Row:
  a, b = measured(module.a.reshape(1, module.rank, -1)), measured(module.b_matrix.T[None])
  parts = [part for part in (module.a, module.b, module.magnitude) if part is not None]
  nan = a.nan + b.nan + sum(measured_flat(part).nan for part in parts[2:])
  return _common(name, module.kind, module.shape, parts, nan) | _lora_fields(module, a, b, module.scale)


def _node_row(path: str, node: Any) -> Row:
  if not isinstance(node, LoraWeight):
    return _whole_row(path, node.base.shape, node.value)
  a, b = (measured(np.asarray(thin(factor, node.roles))) for factor in (node.a, node.b))
  parts = [node.a, node.b, *node.extra.values()]
  nan = a.nan + b.nan + sum(measured_flat(part).nan for part in parts[2:])
  scale = node.scale
  if not node.kind.plain or "a0" in node.extra:  # the effective factors, which hold the scale
    a, b = (measured(np.asarray(thin(factor, node.roles))) for factor in node.factors())
    scale = 1.0
  row = _common(path, node.roles, node.base.shape, parts, nan) | _lora_fields(node, a, b, scale)
  return row | {"dropout": node.dropout, "variant": node.variant}


def _lora_fields(adapted: Any, a: Measured, b: Measured, scale: float) -> Row:
  """The fields of a module or node whose delta is `scale` times the product of two measured factors."""
  return {
    "rank": adapted.rank,
    "alpha": adapted.alpha,
    "scale": adapted.scale,
    "a_norm": tensor_norm(a),
    "b_norm": tensor_norm(b),
    "norm": delta_norm(a, b, scale),
  }


def _whole_row(path: str, shape: Sequence[int], value: np.ndarray) -> Row:
  found = measured_flat(value)
  return _common(path, "whole", shape, [value], found.nan) | {"norm": tensor_norm(found)}


def _common(path: str, kind: str, shape: Sequence[int], parts: Sequence[np.ndarray], nan: int) -> Row:
  """The fields that every row has; `parts` are the tensors of the leaf without its base."""
  return {
    "path": path,
    "kind": kind,
    "shape": list(shape),
    "dtype": str(parts[0].dtype),
    "parameters": sum(part.size for part in parts),
    "bytes": sum(part.nbytes for part in parts),
    "nan": nan,
  }


def _table(rows: Sequence[Row]) -> Table:
  number = lambda value: "-" if value is None else f"{value:.4g}"
  cells: list[tuple[str, ...]] = [
    ("leaf", "shape", "kind", "rank", "alpha", "scale", "dtype", "size", "|A|", "|B|", "|delta|", "NaN")
  ]
  for row in rows:
    shape = " x ".join(map(str, row["shape"])) or "-"
    numbers = [number(row.get(name)) for name in ("rank", "alpha", "scale")]
    norms = [number(row.get(name)) for name in ("a_norm", "b_norm", "norm")]
    cells.append((row["path"], shape, row["kind"], *numbers, row["dtype"], size(row["bytes"]), *norms, str(row["nan"])))
  return Table(cells)
