"""The roles of weights that are plain arrays: told by the user, by the probe, by the tree itself, or by an adapter."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from jaxlora._adapt.fields import checked_letters, checked_mapping
from jaxlora._adapt.layouts import Clue, Layouts
from jaxlora._adapt.probe import study
from jaxlora._base.paths import components
from jaxlora._base.patterns import first_match, nearest
from jaxlora._weight.boxes import axis_names
from jaxlora._weight.shapes import shape_of_leaf
from jaxlora._weight.weight import LoraWeight
from jaxlora.peft._conv1d import is_named_conv1d
from jaxlora.peft._layout import names_a_convolution, torch_kind, torch_shapes
from jaxlora.peft._names import split_path
from jaxlora.peft._records import Module, PeftError

Axes = Mapping[str, str] | None  # regex over paths -> roles, as `LoraConfig.axes`

# Modules that project heads to features: where an axis has size 1, their first axes are the inputs.
_OUTPUT_PROJECTIONS = ("out", "o", "out_proj", "o_proj", "c_proj", "wo", "to_out", "dense")


@dataclasses.dataclass(frozen=True)
class KnownRoles:
  """What a tree tells of its roles.

  Attributes:
    given: roles by path, from `axes` or the probe.
    layouts: what the tree tells by itself.
    bias_shapes: the shape of the bias beside each weight that has one, by path.
    tied: leaves that the probe shows both looked up and multiplied by: an embedding that is also the head.
    axis_names: the names of the axes of leaves in Flax's boxes, by path.
    stacks: the stacked axes of leaves that have some, as far as they are known, by path.
    conv1d: whether torch's modules of GPT-2's names are its Conv1D.
  """

  given: dict[str, str]
  layouts: Layouts
  bias_shapes: dict[str, tuple[int, ...]]
  tied: frozenset[str]
  axis_names: Mapping[str, tuple[Any, ...]]
  stacks: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  conv1d: bool = True

  def clue(self, path: str, ndim: int) -> Clue | None:
    """The evidence on one layer's weight of `ndim` axes."""
    if path in self.given:
      return Clue(self.given[path].replace("s", ""), "it is given")
    return self.layouts.clue(path, ndim)

  def kind(self, path: str, module: str, roles: str) -> str:
    """The kind of torch module for a leaf."""
    return torch_kind(path, module, roles, table=self.layouts.is_table(path))

  def stores_inputs_first(self, module: str) -> bool:
    """Whether torch has the weight of a linear module as (in, out)."""
    return self.conv1d and is_named_conv1d(module)

  def stacked_axes(self, path: str, count: int) -> tuple[int, ...]:
    """The axes of a leaf along which its layers lie, in the order of the indices in torch's name.

    Raises:
      ValueError: if the roles that are given have another number of them.
    """
    given = self.given.get(path)
    if given is None:
      return self.stacks.get(path, tuple(range(count)))
    if given.count("s") != count:
      raise ValueError(f"roles {given!r}, but its name in torch has {count} indices of stacked layers")
    return tuple(d for d, role in enumerate(given) if role == "s")


def known_roles(leaves: Mapping[str, Any], params: Any, axes: Axes, probe: Any) -> KnownRoles:
  """Collects what is known of the roles in a tree.

  Args:
    leaves: of the tree, by path.
    params: the tree; `None` where there are only its leaves, as in a file.
    axes: as for `load`.
    probe: as for `load`; `None` for none.

  Raises:
    PeftError: where `axes` does not fit the leaves.
    TypeError, ValueError: where it maps no regexes to roles.
  """
  given, tied = {}, set()
  if probe is not None:
    for path, evidence in zip(leaves, study(probe, params), strict=True):
      if (found := evidence.roles()) is not None:
        given[path] = found
      if evidence.looked_up is not None and evidence.contracted is not None:
        tied.add(path)
  given |= _roles_by_axes(leaves, axes)
  layouts = Layouts.of_tree(params, leaves, {})
  return KnownRoles(given, layouts, _bias_shapes(leaves), frozenset(tied), axis_names(params, leaves))


def _roles_by_axes(leaves: Mapping[str, Any], axes: Axes) -> dict[str, str]:
  """The roles that the user's `axes` gives, by path."""
  checked = checked_mapping(axes, "axes", checked_letters)
  for pattern in checked or {}:
    if not any(first_match({pattern: True}, path) for path in leaves):
      raise PeftError(
        f"axes: {pattern!r} matches none of the {len(leaves)} leaves (a regex must match the whole path). Nearest:"
        f" {', '.join(nearest(pattern, leaves))}."
      )
  given = {path: roles for path in leaves if (roles := first_match(checked, path)) is not None}
  for path, roles in given.items():
    shape = shape_of_leaf(leaves[path])
    if len(roles) != len(shape):
      raise PeftError(f"axes: {roles!r} has {len(roles)} letters for {path}, whose shape is {shape}.")
  return given


def _bias_shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  parameters = {path: split_path(path) for path in leaves}
  by_module = {
    module: shape_of_leaf(leaves[path]) for path, (module, parameter) in parameters.items() if parameter == "bias"
  }
  return {
    path: by_module[module]
    for path, (module, parameter) in parameters.items()
    if parameter == "weight" and module in by_module
  }


def confirmed(path: str, node: LoraWeight, known: KnownRoles) -> LoraWeight:
  """An adapted leaf whose roles are certain, or are what the tree tells.

  Where `axes` says that the two sides of a plain update are the other way round, A and B trade places.

  Raises:
    ValueError: if nothing tells the roles, or if something else is told.
  """
  given = known.given.get(path)
  if given is not None and given != node.roles:
    turned = node.roles.translate(str.maketrans("io", "oi"))
    if node.sure or given != turned or not node.kind.plain or node.extra:
      raise ValueError(
        f"axes says {given!r}, and the leaf is adapted with roles {node.roles!r} (variant {node.variant!r}). Adapt it"
        " with those roles (LoraConfig.axes)"
      )
    return dataclasses.replace(node, a=node.b, b=node.a, roles=given)
  if node.sure or given is not None:
    return node
  roles = node.roles.replace("s", "")
  told = known.clue(path, len(roles))
  inputs_first = "".join(sorted(roles))  # as Flax' kernels have them, split into heads or not
  if told is not None and told.roles == roles:
    return node
  if told is None and len(roles) > 2 and components(path)[-1] == "kernel" and roles == inputs_first:
    return node
  why = f"{told.why}, which is {told.roles!r}" if told is not None else known.layouts.weighed(path)
  raise ValueError(
    f"roles {node.roles!r} were taken without evidence: {why}. Say them here or in LoraConfig:"
    f" axes={{{re.escape(path)!r}: 'io' or 'oi'}}, or adapt with probe=, which learns them"
  )


def roles_for_module(path: str, layer: Sequence[int], module: Module, known: KnownRoles) -> Clue:
  """The roles of one layer's weight that a module adapts.

  Raises:
    ValueError: if none fit, or if nothing tells.
  """
  if module.kind == "embedding":
    return Clue("io", "it is a table of embeddings")
  if module.kind == "linear":
    return _roles_by_sizes(path, layer, module.a.shape[1], module.b.shape[0], known)
  last, first = "i" * (len(layer) - 1) + "o", "o" + "i" * (len(layer) - 1)
  found = (module.a.shape, module.b.shape)
  fits = [roles for roles in (last, first) if torch_shapes(layer, roles, "conv", module.rank) == found]
  told = known.clue(path, len(layer))
  if len(fits) < 2 or components(path)[-1] == "kernel":
    return Clue(fits[0] if fits else last, "its adapter fits that way alone", by_name=len(fits) > 1)
  if told is None:
    raise ValueError(f"shape {tuple(layer)} fits as {last!r} and as {first!r}; say axes= or probe=")
  return told


def _roles_by_sizes(path: str, shape: Sequence[int], ins: int, outs: int, known: KnownRoles) -> Clue:
  """The roles of a matrix, split into heads or not, whose numbers of inputs and outputs are known.

  Raises:
    ValueError: if none fit, if they contradict what the tree tells for certain, or if several fit and nothing tells.
  """
  told = known.clue(path, len(shape))
  fits = _fits(shape, ins, outs)
  if len(shape) != 2:
    roles = _with_heads(path, shape, fits, ins, outs)
    return Clue(roles, "its adapter fits that way alone", by_name=len({way[0] for way in fits}) > 1)
  if len(fits) == 2 and told is None:
    raise ValueError(f"{known.layouts.weighed(path)}, and a square one does not tell; say axes= or probe=")
  if len(fits) == 2 and told is not None:
    return told
  if not fits or (told is not None and told.sure and told.roles not in fits):
    transposed = fits == ["oi"]
    raise ValueError(
      f"shape {tuple(shape)}, but the adapter has {ins} inputs and {outs} outputs"
      + (f", and {told.why}" if fits and told is not None else "")
      + ("; if it is stored as (out, in), say axes={pattern: 'oi'} or probe=" if transposed else "")
    )
  return Clue(fits[0], "its adapter fits that way alone")


def _fits(shape: Sequence[int], ins: int, outs: int) -> list[str]:
  """The roles that fit so many inputs and outputs, those with the inputs first before the others."""
  found = []
  for first, second, sizes in (("i", "o", (ins, outs)), ("o", "i", (outs, ins))):
    for k in range(1, len(shape)):
      if (math.prod(shape[:k]), math.prod(shape[k:])) == sizes:
        found.append(first * k + second * (len(shape) - k))
  return found


def _with_heads(path: str, shape: Sequence[int], fits: Sequence[str], ins: int, outs: int) -> str:
  """The roles of a matrix split into heads: inputs first, as Flax has them, unless another name leaves it open."""
  inputs_first = [roles for roles in fits if roles[0] == "i"]
  if not inputs_first:
    raise ValueError(f"shape {tuple(shape)}, but the adapter has {ins} inputs and {outs} outputs")
  if len(fits) > len(inputs_first) and components(path)[-1] != "kernel":
    raise ValueError(
      f"shape {tuple(shape)}: {ins} inputs and {outs} outputs fit it as {' and as '.join(map(repr, fits))}; say axes="
      " or probe="
    )
  # Several fit only where an axis has size 1: the product is the same, and the name tells which is meant.
  projects_heads = split_path(path)[0].split("/")[-1] in _OUTPUT_PROJECTIONS
  return inputs_first[-1 if projects_heads else 0]


def roles_of_layer(path: str, shape: Sequence[int], known: KnownRoles, torch_shape: Sequence[int] | None = None) -> str:
  """The roles of one layer's weight that is trained whole, without its stacked axes.

  Args:
    path: of the leaf.
    shape: of the layer.
    known: roles of the tree.
    torch_shape: of the tensor that it is made of, (out, in, *kernel); `None` where there is none yet.

  Raises:
    ValueError: if nothing tells.
  """
  if len(shape) < 2:
    return "o" * len(shape)
  told = known.clue(path, len(shape))
  if told is not None and told.sure:
    return told.roles
  if names_a_convolution(*components(path)[-3:]) or len(shape) >= 4:
    fits = _convolutions(path, shape, torch_shape)
  elif torch_shape is not None and len(torch_shape) == 2:
    fits = _fits(shape, torch_shape[1], torch_shape[0])
    fits = fits if len(shape) == 2 or components(path)[-1] == "kernel" else []
  else:
    fits = []
  if len(fits) != 1 and len(shape) == 3:
    bias = known.bias_shapes.get(path)
    fits = ["i" * k + "o" * (len(shape) - k) for k in range(1, len(shape)) if bias == tuple(shape[k:])]
  if len(fits) == 1:
    return fits[0]
  if told is not None:
    return told.roles
  why = f": {known.layouts.weighed(path)}" if len(shape) == 2 else ""
  raise ValueError(
    f"shape {tuple(shape)}: nothing tells which axes are inputs{why}; say axes={{{re.escape(path)!r}: roles}}"
  )


def _convolutions(path: str, shape: Sequence[int], torch_shape: Sequence[int] | None) -> list[str]:
  """The roles that a convolution's kernel may have: (*kernel, in, out) as in Flax, (out, in, *kernel) as in torch."""
  last, first = "i" * (len(shape) - 1) + "o", "o" + "i" * (len(shape) - 1)
  name = components(path)[-1]
  if name == "kernel":
    return [last]
  if torch_shape is None:
    return [first] if name == "weight" else []
  shapes = {last: (shape[-1], shape[-2], *shape[:-2]), first: tuple(shape)}
  return [roles for roles, found in shapes.items() if found == tuple(torch_shape)]
