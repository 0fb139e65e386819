"""`jaxlora inspect`."""

from collections.abc import Iterable, Mapping, Sequence
import json
import math
from typing import Any

import numpy as np

from jaxlora._base.text import listed, size, table
from jaxlora._cli.main import Result
from jaxlora._cli.sources import contents_of, is_peft, read_peft
from jaxlora._weight.weight import LoraWeight, parts


def run_inspect(options: Any) -> Result:
  if is_peft(options.path):
    adapter = read_peft(options.path)
    leaves = [_module_row(name, module) for name, module in adapter.modules.items()]
    leaves += [_row(name, "whole", value.shape, value) for name, value in adapter.whole.items()]
    about = {"format": "peft", "config": adapter.config, "unsupported": list(adapter.unsupported)}
    lines = [f"a PEFT folder, base model {adapter.config.get('base_model_name_or_path')}"]
    lines += [f"not supported here: {reason}" for reason in adapter.unsupported]
  else:
    found = contents_of(options.path)
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
