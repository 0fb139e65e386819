"""Quantised formats that are known by the names of their tensors alone: refused, and never taken for floats."""

from collections.abc import Collection, Iterator
import re

from jaxlora._files.format import Headers

# By what stands behind the module's name; of several the first that fits.
_MARKS = (
  ("GPTQ", (".qweight", ".g_idx")),
  ("AWQ", (".qweight", ".qzeros", ".scales")),
  ("an unknown format with qweight", (".qweight",)),
  ("MXFP4", ("_blocks", "_scales")),
  ("bitsandbytes (4 bits)", (".weight.absmax",)),
  ("bitsandbytes (8 bits)", (".SCB",)),
  ("compressed-tensors", (".weight_packed",)),
  ("compressed-tensors (sparse)", (".compressed",)),
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


class Neighbours:
  """The tensors of a model by the modules that hold them."""

  def __init__(self, tensors: Headers):
    self.tensors = tensors
    self.by_module: dict[str, list[str]] = {}
    for name in tensors:
      self.by_module.setdefault(name.rpartition(".")[0], []).append(name)

  def format_of(self, name: str) -> str | None:
    """The format of a weight that other tensors than its own make, by their names; `None` for a plain weight.

    Args:
      name: of the weight, such as `model.layers.0.q_proj.weight`; its tensor may be missing.
    """
    stem = name.removesuffix(".weight")
    for known, marks in _MARKS:
      if all(f"{stem}{mark}" in self.tensors for mark in marks):
        return known
    beside = sorted(self._beside(name))
    return f"an unknown format with {', '.join(beside)} beside it" if beside else None

  def _beside(self, name: str) -> Iterator[str]:
    """The tensors beside a weight that say that it is quantised; beside 8 bits, all that are called after it."""
    module, _, own = name.rpartition(".")
    near = [(other, other[len(module) + 1 :]) for other in self.by_module.get(module, ())]
    if own != "weight":
      near = [(other, rest[len(own) + 1 :]) for other, rest in near if rest.startswith(f"{own}_")]
    near += [(other, other[len(name) + 1 :]) for other in self.by_module.get(name, ())]
    codes = name in self.tensors and self.tensors[name].code.startswith("F8_")
    for other, rest in near:
      known = _QUANTISED.fullmatch(rest) or (codes and other.startswith((f"{name}_", f"{name}.")))
      if other != name and known and not _ACTIVATIONS.fullmatch(rest):
        yield other

  def unread(self, claimed: Collection[str]) -> Iterator[tuple[str, str]]:
    """The quantised weights that no format has claimed, each with what is known of its format."""
    for name, tensor in self.tensors.items():
      if name in claimed:
        continue
      for known, (mark, *_) in _MARKS:
        if name.endswith(mark):
          yield name.removesuffix(mark), known
      if name.endswith(".weight") and tensor.code in ("I8", "U8", "I32"):
        yield name, f"{tensor.code} without known scales"
