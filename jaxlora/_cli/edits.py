"""From changes of weights to edits of a file's tensors: quantised weights decoded and encoded, what rounding loses."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora._base.files import code_of
from jaxlora._base.rounding import lost_share
from jaxlora._cli.result import BadFile
from jaxlora._cli.rewrite import Edit
from jaxlora._files.carried import quantisation_of
from jaxlora._files.format import Quantised
from jaxlora._files.named import Neighbours
from jaxlora._files.scaled import CODES
from jaxlora._files.tensors import Tensor, TensorFiles

# The value of a weight -> what it becomes, in the second argument's dtype.
Change = Callable[[np.ndarray, np.dtype], np.ndarray]


_UNQUANTISED = "Merge into the model's files before quantisation (the unquantised original), and quantise the result."


@dataclasses.dataclass(frozen=True)
class Weights:
  """A model's weights as they are meant, whatever the tensors that hold them.

  Attributes:
    files: the model.
    quantised: the weights that several tensors hold, by name.
    dtype: of the weights that change, or `None` for the stored one; dequantised weights have it or `plain`.
    dequantize: whether all weights are stored as plain floats.
    plain: the dtype of dequantised weights where `dtype` is `None`.
    lost: is told which share of each update is rounded away, by name.
    added: weights that are written as new tensors, each with the weight that its value begins with.
  """

  files: TensorFiles
  quantised: Mapping[str, Quantised]
  dtype: np.dtype | None
  dequantize: bool
  plain: np.dtype
  lost: dict[str, float] = dataclasses.field(default_factory=dict)
  added: dict[str, str] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def by_name(self) -> dict[str, Tensor | Quantised]:
    """Every weight, and every other tensor, by name."""
    parts = {part for weight in self.quantised.values() for part in weight.parts.values()}
    return {name: tensor for name, tensor in self.files.tensors.items() if name not in parts} | dict(self.quantised)

  @functools.cached_property
  def neighbours(self) -> Neighbours:
    return Neighbours(self.files.tensors)

  def held(self, name: str) -> Tensor | Quantised:
    """What holds a weight, or the value that a new one begins with."""
    return self.by_name[self.added.get(name, name)]

  def edits(self, changes: Mapping[str, Change | None]) -> list[Edit]:
    """The edits that make these changes.

    Raises:
      BadFile: where a weight is of a format that cannot be changed.
    """
    for name in changes if self.dtype is not None and not self.dequantize else ():
      if name in self.quantised:
        raise BadFile(f"{name}: --dtype: stored as {self.quantised[name].format.name}. Pass --dequantize with it.")
    if self.dequantize and not self.quantised:
      raise BadFile(f"{self.files.files[0].parent}: --dequantize: its weights are not quantised. Leave it out.")
    if self.dequantize:
      self._check_all_decoded()
    decoded = [name for name in self.quantised if name not in changes] if self.dequantize else []
    return [self._edit(name, change) for name, change in changes.items()] + [self._edit(n, None) for n in decoded]

  def _check_all_decoded(self) -> None:
    """Raises where a quantised weight is in a format that is not read."""
    claimed = {part for weight in self.quantised.values() for part in weight.parts.values()}
    for name, known in self.neighbours.unread(claimed):
      raise BadFile(f"{name}: --dequantize: quantised, in {known}, which is not read here. {_UNQUANTISED}")

  def value(self, name: str) -> np.ndarray:
    """The value of a weight."""
    weight = self.held(name)
    if isinstance(weight, Quantised):
      return weight.format.dequantise(weight.parts_by(self.files.read), weight.about)
    return weight.read()

  def checked(self, name: str) -> None:
    """Raises unless a weight can be changed."""
    weight = self.by_name.get(self.added.get(name, name))
    if isinstance(weight, Quantised):
      if name in self.added and not self.dequantize:
        raise BadFile(f"{name}: --untie: its values are stored as {weight.format.name}. Pass --dequantize with it.")
      if weight.format.requantise is None and not self.dequantize:
        raise BadFile(
          f"{name}: stored as {weight.format.name}; an update cannot be folded into its codes. Pass --dequantize, which"
          " writes all weights as plain floats, or merge into the model's files before quantisation."
        )
      return
    if found := self.neighbours.format_of(name):
      raise BadFile(f"{name}: quantised, in {found}, which is not read here. {_UNQUANTISED}")
    if weight is not None and weight.code in CODES and quantisation_of(self.files.config):
      raise BadFile(f"{name}: {weight.code}, quantised by config.json, and no scales are beside it. {_UNQUANTISED}")
    if weight is not None and (weight.dtype is None or not jnp.issubdtype(weight.dtype, jnp.inexact)):
      raise BadFile(f"{name}: dtype {weight.dtype or weight.code} cannot be merged into; expected a floating one.")

  def _edit(self, name: str, change: Change | None) -> Edit:
    weight = self.held(name)
    if isinstance(weight, Quantised):
      if self.dequantize:
        parts = () if name in self.added else tuple(part for part in weight.parts.values() if part != name)
        outputs = {name: (code_of(self.dtype or self.plain), weight.shape)}
        beside = next(iter(weight.parts.values()))
        return Edit(outputs, functools.partial(self._plain, name, change), parts, beside)
      assert change is not None
      stored = {part: self.files.tensors[part] for part in weight.parts.values()}
      outputs = {part: (tensor.code, tensor.shape) for part, tensor in stored.items()}
      return Edit(outputs, functools.partial(self._requantised, name, change))
    outputs = {name: (weight.code if self.dtype is None else code_of(self.dtype), weight.shape)}
    return Edit(outputs, functools.partial(self._plain, name, change), (), self.added.get(name))

  def _plain(self, name: str, change: Change | None) -> dict[str, np.ndarray]:
    """The values of a weight that is stored as floats, once it is changed."""
    old = self.value(name)
    own = self.plain if isinstance(self.held(name), Quantised) else old.dtype
    dtype = own if self.dtype is None else self.dtype
    if change is None:
      return {name: old.astype(dtype)}
    wide = np.result_type(np.float32, dtype) if dtype.itemsize >= 4 else np.dtype(np.float32)
    exact = change(old, wide)
    stored = exact.astype(dtype)
    if dtype != wide:
      self.lost[name] = lost_share(old, exact, stored)
    return {name: stored}

  def _requantised(self, name: str, change: Change) -> dict[str, np.ndarray]:
    """The parts of a quantised weight, once it is changed."""
    weight: Any = self.by_name[name]
    parts = weight.parts_by(self.files.read)
    old = weight.format.dequantise(parts, weight.about)
    exact = change(old, np.dtype(np.float32))
    new = {**parts, **weight.format.requantise(exact, parts, weight.about)}
    self.lost[name] = lost_share(old, exact, weight.format.dequantise(new, weight.about))
    return {weight.parts[part]: value for part, value in new.items()}
