"""The record of a quantised format: how its weights are found among a file's tensors, and what their values are."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Protocol

import numpy as np

from jaxlora._files.codes import Codes


class Stored(Protocol):
  """What a file's header says of a tensor: its dtype as safetensors writes it, and its shape."""

  @property
  def code(self) -> str: ...
  @property
  def shape(self) -> tuple[int, ...]: ...


Headers = Mapping[str, Stored]  # the tensors of a model, by name
Config = Mapping[str, Any]  # the `quantization_config` of config.json; empty where there is none
Arrays = Mapping[str, np.ndarray]  # the parts of one weight
Read = Callable[[str], np.ndarray]  # the values of a tensor, by name


class FormatError(ValueError):
  """Tensors that are those of a known format, but do not fit together."""


@dataclasses.dataclass(frozen=True)
class Format:
  """A way to store a weight in several tensors.

  Attributes:
    name: as it is called in the field.
    find: the weights of this format among a model's tensors. It may read small tensors that describe others.
    codes: the parts of a weight, and what `find` learnt of it -> its codes and scales.
    requantise: values, the old parts, what `find` learnt -> the parts that hold the values, in the shapes and dtypes of
      the old ones; those that stay as they are may be left out. `None` where there is no way back.
  """

  name: str
  find: Callable[[Headers, Config, Read], list["Quantised"]]
  codes: Callable[[Arrays, Mapping[str, Any]], Codes]
  requantise: Callable[[np.ndarray, Arrays, Mapping[str, Any]], dict[str, np.ndarray]] | None = None

  def dequantise(self, parts: Arrays, about: Mapping[str, Any]) -> np.ndarray:
    """The values of a weight, float32."""
    return self.codes(parts, about).values()


@dataclasses.dataclass(frozen=True)
class Quantised:
  """A weight that several tensors hold.

  Attributes:
    name: as the model calls the weight, such as `model.layers.0.self_attn.q_proj.weight`.
    format: its format.
    shape: of its values.
    parts: the tensors that hold it, by the format's names for them.
    about: what else the format needs to know, such as the sizes of its blocks.
  """

  name: str
  format: Format
  shape: tuple[int, ...]
  parts: Mapping[str, str]
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def parts_by(self, read: Read) -> dict[str, np.ndarray]:
    """The parts' values."""
    return {part: read(name) for part, name in self.parts.items()}
