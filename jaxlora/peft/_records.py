"""A PEFT adapter as records: modules in torch's layouts, parameters trained whole, the configuration."""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any
import warnings

import numpy as np

from jaxlora._base.dtypes import wider_dtype
from jaxlora._base.rounding import RoundingWarning, lost_share, notable
from jaxlora._weight.weight import SCALINGS

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")  # GPT-2's modules with weights of shape (in, out)


SEVERAL = "PEFT, in several files"  # which PEFT itself does not write or read


class PeftError(ValueError):
  """A PEFT folder that cannot be read, or a tree that no PEFT folder can hold; the message lists every reason."""


class PeftWarning(UserWarning):
  """Something of a PEFT folder that is read, and that its reader should know."""


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
    """The factor in front of `B A`."""
    return SCALINGS[self.scaling](self.alpha, self.rank)

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the module's weight: (out, in, *kernel), or (vocabulary, features)."""
    inputs, out = self.a.shape[1:], self.b.shape[0]
    return (*inputs, out) if self.kind == "embedding" else (out, *inputs)

  @property
  def b_matrix(self) -> np.ndarray:
    """B as (out, rank), whatever the kind."""
    return self.b.reshape(self.b.shape[:2])

  def delta(self) -> np.ndarray:
    """`scale * B A` as an array of the weight's shape, in float32 or wider."""
    wide = np.result_type(np.float32, *(x.dtype for x in (self.a, self.b) if x.dtype.itemsize > 2))
    a, b = self.a.astype(wide), self.b_matrix.astype(wide) * wide.type(self.scale)
    return (b @ a).T if self.kind == "embedding" else np.tensordot(b, a, 1)


@dataclasses.dataclass(frozen=True)
class Packed:
  """A parameter that holds several experts, (experts, ., .), which PEFT adapts as one: `target_parameters`.

  Attributes:
    modules: the names of the experts' modules, in order.
    oriented: whether their A is known to be that of the inputs. In a file with one parameter of some experts alone it
      may be that of the outputs: PEFT's versions differ, and sizes tell.
  """

  modules: tuple[str, ...]
  oriented: bool = True


@dataclasses.dataclass(frozen=True)
class TokenRows:
  """Rows of an embedding's or a head's weight that replace the base's.

  Attributes:
    indices: of the rows: tokens.
    rows: (tokens, features).
  """

  indices: tuple[int, ...]
  rows: np.ndarray

  def check(self, name: str, shape: Sequence[int]) -> None:
    """Raises `PeftError` unless a weight of this shape, (vocabulary, features), has these rows."""
    if len(shape) != 2 or shape[1] != self.rows.shape[1]:
      raise PeftError(f"{name}: shape {tuple(shape)}, and the rows of its tokens have {self.rows.shape[1]} features.")
    if max(self.indices, default=0) >= shape[0]:
      raise PeftError(f"{name}: {shape[0]} tokens, and the adapter has rows for token {max(self.indices)}. {RESIZE}")

  def put_into(self, name: str, table: np.ndarray) -> np.ndarray:
    """The weight, (vocabulary, features), with these rows; raises as `check` does."""
    self.check(name, table.shape)
    changed = np.array(table)
    changed[list(self.indices)] = self.rows.astype(table.dtype)
    return changed


RESIZE = (
  "Tokens were added: resize the base to the adapter's vocabulary: params = jaxlora.peft.resized(params, folder), or"
  " in torch model.resize_token_embeddings"
)


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A PEFT adapter: what a folder of PEFT's holds, in memory.

  Attributes:
    modules: the adapted modules by name.
    whole: tensors that replace a parameter, by its name: `modules_to_save`, trained biases, resized embeddings.
    bases: base weights of adapted modules that PEFT saved beside their factors, by parameter name.
    config: the content of `adapter_config.json`.
    unsupported: reasons not to use the adapter: options that make the tensors parts of another method than LoRA.
    packed: the adapted parameters that hold several experts, by name: which of the modules are those of one.
    tokens: rows that replace some of a parameter's, by its name: `trainable_token_indices`.
    form: whose files it was read from: `"PEFT"`, also `"PEFT, in several files"`, `"mlx-lm"`, `"diffusers"` or
      `"kohya"`, in whose names `_` stands for the dots of torch's.
  """

  modules: dict[str, Module]
  whole: dict[str, np.ndarray]
  bases: dict[str, np.ndarray]
  config: dict[str, Any]
  unsupported: tuple[str, ...] = ()
  packed: dict[str, Packed] = dataclasses.field(default_factory=dict)
  tokens: dict[str, TokenRows] = dataclasses.field(default_factory=dict)
  form: str = "PEFT"

  @property
  def dropout(self) -> float:
    return float(self.config.get("lora_dropout") or 0.0)

  def is_asked(self, name: str) -> bool:
    """Whether the configuration asks for a parameter in `whole`: PEFT writes embeddings of its own accord, too."""
    module, _, parameter = name.rpartition(".")
    if parameter == "bias" and self.config.get("bias", "none") != "none":
      return True
    saved = self.config.get("modules_to_save") or []
    return any(module.endswith(other) or f".{other}." in f".{module}." for other in saved)

  def stores_inputs_first(self, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a base stores the weights of GPT-2's Conv1D as (in, out), which those that are not square show.

    Args:
      shapes: the shapes of the base's parameters by name.
    """
    for name, shape in shapes.items():
      bias = shapes.get(f"{name.removesuffix('.weight')}.bias", ())
      if name.endswith(tuple(f"{module}.weight" for module in CONV1D)) and len(set(shape)) == 2:
        return tuple(bias) == tuple(shape[1:])
    return False

  def stores_experts_inputs_first(self, name: str, shapes: Mapping[str, Sequence[int]]) -> bool | None:
    """Whether a base stores the experts of a parameter as (in, out), by it or by another of theirs; `None` if unknown.

    Args:
      name: of the parameter, one of `packed`.
      shapes: the shapes of the base's parameters by name.
    """
    root = name.rpartition(".")[0]
    for other, entry in sorted(self.packed.items(), key=lambda item: item[0] != name):
      shape, found = self.modules[entry.modules[0]].shape, tuple(shapes.get(other, ()))[-2:]
      if other.rpartition(".")[0] == root and entry.oriented and shape[0] != shape[1]:
        return found == shape[::-1]
    return None

  def merged(self, name: str, tensor: np.ndarray, *, inputs_first: bool | None = None, dtype: Any = None) -> np.ndarray:
    """One parameter of the torch model with this adapter folded in; the same array where it is not adapted.

    Args:
      name: of the parameter, such as `model.layers.0.self_attn.q_proj.weight`.
      tensor: its value in the base model.
      inputs_first: how the base stores square weights of GPT-2's Conv1D, as `stores_inputs_first` returns it; with
        `None` the adapter's `fan_in_fan_out` decides. Of a parameter that holds square experts, how it stores these, as
        `stores_experts_inputs_first` returns it.
      dtype: of the result; `None` for the tensor's.

    Returns:
      An array of the tensor's shape.

    Raises:
      PeftError: if the shapes differ, or the adapter is `unsupported`.

    Warns:
      RoundingWarning: where rounding to the dtype takes more than a tenth of the update's norm.
    """
    exact = self._merged(name, tensor, inputs_first)
    dtype = tensor.dtype if dtype is None else np.dtype(dtype)
    if exact is tensor or wider_dtype(exact.dtype, dtype) == dtype:
      return exact.astype(dtype, copy=False)
    rounded = exact.astype(dtype)
    if found := notable({name: lost_share(tensor, exact, rounded)}):
      warnings.warn(
        f"merged: rounding to {dtype} loses more than a tenth of the update in {found}. Pass dtype=np.float32.",
        RoundingWarning,
        stacklevel=2,
      )
    return rounded

  def _merged(self, name: str, tensor: np.ndarray, inputs_first: bool | None) -> np.ndarray:
    """`merged`, in the widest dtype of what is added."""
    if self.unsupported:
      raise fail(f"{name}", self.unsupported)
    if name in self.whole:
      if self.whole[name].shape != tensor.shape:
        raise PeftError(
          f"{name}: shape {tensor.shape} in the base, {self.whole[name].shape} in the adapter."
          f" {RESIZE if is_resized(name, tensor.shape, self.whole[name].shape) else ''}".rstrip()
        )
      return self.whole[name]
    if name in self.packed:
      return self._merged_experts(name, tensor, inputs_first)
    if name in self.tokens:
      rows = self.tokens[name]
      return rows.put_into(name, tensor.astype(wider_dtype(tensor.dtype, rows.rows.dtype)))
    module = self.modules.get(name.removesuffix(".weight"))
    if module is None or not name.endswith(".weight"):
      return tensor
    transposed = module.kind == "linear" and self._is_transposed(module, tensor.shape, inputs_first)
    shape = module.shape[::-1] if transposed else module.shape
    if shape != tensor.shape:
      raise PeftError(f"{name}: shape {tensor.shape} in the base, {shape} by the adapter. It is another model's.")
    delta = module.delta().T if transposed else module.delta()
    wide = np.result_type(delta.dtype, np.float32 if tensor.dtype.itemsize < 4 else tensor.dtype)
    weight = tensor.astype(wide) + delta
    if module.magnitude is not None:
      weight = _with_norms(weight, module.magnitude, output=1 if transposed or module.kind == "embedding" else 0)
    return weight

  def _merged_experts(self, name: str, tensor: np.ndarray, inputs_first: bool | None) -> np.ndarray:
    """A parameter that holds several experts, each of them (in, out) or (out, in) as the sizes show."""
    held = [self.modules[own] for own in self.packed[name].modules]
    shape = held[0].shape
    if tensor.shape not in ((len(held), *shape), (len(held), *shape[::-1])) and (len(held), tensor.shape) != (1, shape):
      raise PeftError(
        f"{name}: shape {tensor.shape} in the base, {(len(held), *shape)} by the adapter. It is another model's."
      )
    if tensor.ndim == 3 and shape[0] == shape[1] and (inputs_first is None or not self.packed[name].oriented):
      raise PeftError(
        f"{name}: shape {tensor.shape} does not tell whether its experts are (in, out). Merge the adapter in PEFT"
        " (merge_and_unload), or say inputs_first="
      )
    transposed = inputs_first if shape[0] == shape[1] else tensor.shape[-2:] == shape[::-1]
    delta = np.stack([module.delta().T if tensor.ndim == 3 and transposed else module.delta() for module in held])
    wide = np.result_type(delta.dtype, np.float32 if tensor.dtype.itemsize < 4 else tensor.dtype)
    return tensor.astype(wide) + delta.reshape(tensor.shape)

  def _is_transposed(self, module: Module, shape: Sequence[int], inputs_first: bool | None) -> bool:
    """Whether a base stores a linear module's weight as (in, out)."""
    if module.shape[0] != module.shape[1]:
      return module.shape[::-1] == tuple(shape)
    if inputs_first is None:
      inputs_first = bool(self.config.get("fan_in_fan_out"))
    return inputs_first and module.name.rpartition(".")[2] in CONV1D


_OF_TOKENS = re.compile(r"embed|wte|shared|lm_head|output")


def is_resized(name: str, base: Sequence[int], adapter: Sequence[int]) -> bool:
  """Whether an embedding or a head has more tokens in an adapter, by its name, in either order of its axes."""
  if not _OF_TOKENS.search(name):
    return False
  for shape in (tuple(adapter), tuple(adapter)[::-1]):
    longer = [d for d in range(len(shape)) if len(base) == len(shape) and shape[d] > base[d]]
    if len(longer) == 1 and all(shape[d] == base[d] for d in range(len(shape)) if d != longer[0]):
      return True
  return False


def _with_norms(weight: np.ndarray, norms: np.ndarray, output: int) -> np.ndarray:
  """The weight with other norms along the axis of its outputs; outputs of norm zero stay zero."""
  others = tuple(d for d in range(weight.ndim) if d != output)
  found = np.sqrt(np.sum(weight * weight, axis=others, keepdims=True))
  gain = norms.astype(weight.dtype).reshape(found.shape) / np.where(found == 0, 1, found)
  return weight * gain


def fail(subject: str, problems: Sequence[str], remedy: str = "") -> PeftError:
  """One error that lists all problems."""
  shown = [f"\n  - {problem if len(problem) < 1000 else problem[:1000] + ' ...'}" for problem in problems[:200]]
  more = f"\n  - and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
  return PeftError(f"{subject}: {len(problems)} problem(s):{''.join(shown)}{more}{remedy and chr(10) + remedy}")


def raise_problems(subject: str, problems: Sequence[str]) -> None:
  """Raises one `PeftError` if there are problems."""
  if problems:
    raise fail(subject, problems)
