"""A PEFT adapter as records: modules in torch's layouts, what is trained whole, the configuration."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from jaxlora._weight.weight import SCALINGS

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

PREFIX = "base_model.model."

CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")  # GPT-2's modules with weights of shape (in, out)


class PeftError(ValueError):
  """A PEFT folder that cannot be read, or a tree that no PEFT folder can hold; the message lists every reason."""


@dataclasses.dataclass(frozen=True)
class Module:
  """One adapted torch module, in torch's layouts.

      W' = W + scale * B A,    or, with a magnitude m,    m (W + scale * B A) / ||W + scale * B A||    by output

  Attributes:
    name: its name in the torch model, such as `model.layers.0.self_attn.q_proj`.
    kind: `"linear"`, `"conv"` or `"embedding"`.
    a: (rank, in); (rank, in, *kernel) for a convolution; (rank, vocabulary) for an embedding.
    b: (out, rank); (out, rank, 1, ...) for a convolution; (features, rank) for an embedding.
    alpha: numerator of the scale.
    scaling: `"standard"` or `"rslora"`.
    magnitude: DoRA's, (out,) or (1, out, 1, ...) for a convolution, (features,) for an embedding; or `None`.
  """

  name: str
  kind: str
  a: np.ndarray
  b: np.ndarray
  alpha: float
  scaling: str = "standard"
  magnitude: np.ndarray | None = None

  @property
  def rank(self) -> int:
    return self.a.shape[0]

  @property
  def scale(self) -> float:
    return SCALINGS[self.scaling](self.alpha, self.rank)

  @property
  def b_matrix(self) -> np.ndarray:
    """B as (out, rank), whatever the kind."""
    return self.b.reshape(self.b.shape[:2])

  def delta(self) -> np.ndarray:
    """`scale * B A` as the module's weight: (out, in, *kernel), or (vocabulary, features)."""
    wide = np.result_type(np.float32, *(x.dtype for x in (self.a, self.b) if x.dtype.itemsize > 2))
    a, b = self.a.astype(wide), self.b_matrix.astype(wide) * wide.type(self.scale)
    return (b @ a).T if self.kind == "embedding" else np.tensordot(b, a, 1)


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What a PEFT folder holds.

  Attributes:
    modules: the adapted modules by name.
    whole: tensors that replace a parameter, by its name: `modules_to_save`, trained biases, resized embeddings.
    bases: base weights of adapted modules that PEFT saved with them, by parameter name.
    config: the whole `adapter_config.json`.
    unsupported: options that make another function of these tensors than LoRA's: reasons not to use them.
  """

  modules: dict[str, Module]
  whole: dict[str, np.ndarray]
  bases: dict[str, np.ndarray]
  config: dict[str, Any]
  unsupported: tuple[str, ...] = ()

  @property
  def dropout(self) -> float:
    return float(self.config.get("lora_dropout") or 0.0)

  def stores_inputs_first(self, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether the base holds weights as GPT-2's Conv1D does, (in, out), told by those that are not square.

    Args:
      shapes: the shapes of the base's parameters by name.
    """
    for name, shape in shapes.items():
      bias = shapes.get(f"{name.removesuffix('.weight')}.bias", ())
      if name.endswith(tuple(f"{module}.weight" for module in CONV1D)) and len(set(shape)) == 2:
        return tuple(bias) == tuple(shape[1:])
    return False

  def merged(self, name: str, tensor: np.ndarray, *, inputs_first: bool | None = None) -> np.ndarray:
    """The parameter `name` of the torch model with this adapter folded in; itself where the adapter leaves it alone.

    Args:
      name: such as `model.layers.0.self_attn.q_proj.weight`.
      tensor: its value in the base model.
      inputs_first: what `stores_inputs_first` says of the base, for weights that are square; `None` goes by the
        adapter's `fan_in_fan_out`.

    Raises:
      PeftError: where the adapter does not fit it.
    """
    if self.unsupported:
      raise fail(f"{name}", self.unsupported)
    if name in self.whole:
      if self.whole[name].shape != tensor.shape:
        raise PeftError(f"{name}: shape {tensor.shape} in the base, {self.whole[name].shape} in the adapter.")
      return self.whole[name].astype(tensor.dtype)
    module = self.modules.get(name.removesuffix(".weight"))
    if module is None or not name.endswith(".weight"):
      return tensor
    delta = module.delta()
    if module.kind == "linear":
      if inputs_first is None:
        inputs_first = bool(self.config.get("fan_in_fan_out"))
      square = delta.shape == delta.T.shape
      turned = inputs_first and name.split(".")[-2] in CONV1D if square else delta.T.shape == tensor.shape
      delta = delta.T if turned else delta
    if delta.shape != tensor.shape:
      raise PeftError(f"{name}: shape {tensor.shape} in the base, {delta.shape} by the adapter. It is another model's.")
    wide = np.result_type(delta.dtype, np.float32 if tensor.dtype.itemsize < 4 else tensor.dtype)
    whole = tensor.astype(wide) + delta
    if module.magnitude is not None:
      output = 1 if module.kind == "embedding" or (module.kind == "linear" and turned) else 0
      whole = _with_norms(whole, module.magnitude, output)
    return whole.astype(tensor.dtype)


def _with_norms(weight: np.ndarray, norms: np.ndarray, axis: int) -> np.ndarray:
  """The weight with other norms along the axis of its outputs; outputs of norm zero stay zero."""
  others = tuple(d for d in range(weight.ndim) if d != axis)
  found = np.sqrt(np.sum(weight * weight, axis=others, keepdims=True))
  gain = norms.astype(weight.dtype).reshape(found.shape) / np.where(found == 0, 1, found)
  return weight * gain


def fail(subject: str, problems: Sequence[str], remedy: str = "") -> PeftError:
  """One error for all that is wrong."""
  shown = [f"\n  - {problem if len(problem) < 1000 else problem[:1000] + ' ...'}" for problem in problems[:200]]
  more = f"\n  - and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
  return PeftError(f"{subject}: {len(problems)} problem(s):{''.join(shown)}{more}{remedy and chr(10) + remedy}")
