"""Quantised formats that are known by the names of their tensors alone: refused, and never taken for floats."""

from collections.abc import Iterator
import re

from jaxlora._files.format import Headers

# By what stands behind the module's name; of several the first that fits.
_MARKS = (
  ("GPTQ", (".qweight", ".g_idx")),
  ("AWQ", (".qweight", ".qzeros", ".scales")),
  ("MXFP4", ("_blocks", "_scales")),
  ("bitsandbytes (4 bits)", (".weight.absmax",)),
  ("bitsandbytes (8 bits)", (".SCB",)),
  ("compressed-tensors", (".weight_packed",)),
  ("EXL2", (".q_weight",)),
  ("EXL3", (".trellis",)),
  ("HQQ", (".W_q",)),
  ("quanto", (".weight._data",)),
  ("AQLM", (".codebooks",)),
  ("VPTQ", (".centroids.weight",)),
  ("QuIP", (".Qidxs",)),
  ("EETQ", (".weight_scales",)),
)

# Beside a weight these scale activations or caches, and leave its values as they are.
_ACTIVATIONS = re.compile(r"input_.*|output_.*|[kqv]_scale|.*act(?:ivation)?(?:_scale)?|scale_input|scale_output")
_QUANTISED = re.compile(
  r".*(?:scale|absmax|quant|zero|packed|g_idx|SCB|codebook|qweight|weight_shape|_data|blocks).*", re.IGNORECASE
)


def format_by_names(name: str, tensors: Headers) -> str | None:
  """The format of a weight that other tensors than its own make, by their names; `None` for a plain weight.

  Args:
    name: of the weight, such as `model.layers.0.q_proj.weight`; its tensor may be missing.
    tensors: of the model, by name.
  """
  module = name.removesuffix(".weight")
  for known, marks in _MARKS:
    if all(f"{stem}{mark}" in tensors for stem in [module] for mark in marks):
      return known
  beside = sorted(_beside(name, module, tensors))
  return f"an unknown format with {', '.join(beside)} beside it" if beside else None


def _beside(name: str, module: str, tensors: Headers) -> Iterator[str]:
  """The tensors beside a weight that say that it is quantised."""
  for other in tensors:
    if other == name or not other.startswith(module):
      continue
    rest = other[len(module) :]
    if name.endswith(".weight"):
      inside = rest[:1] == "." and ("." not in rest[1:] or rest.startswith(".weight."))
    else:
      inside = rest[:1] == "_"
    if inside and _QUANTISED.fullmatch(rest[1:]) and not _ACTIVATIONS.fullmatch(rest[1:]):
      yield other
