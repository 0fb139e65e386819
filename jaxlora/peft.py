"""Adapters to and from PEFT: `save` writes what Hugging Face's `peft` loads, `load` reads what it writes.

Needs the extra `jaxlora[peft]` (safetensors), and never torch. Nothing is unpickled.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import _paths, _peft_file, _probe
from jaxlora._axes import factor_shape
from jaxlora._config import LoraConfig, first_match
from jaxlora._peft_file import Adapter, Module, PeftError
from jaxlora._peft_names import (
  Names,
  Place,
  Target,
  check_names,
  default_target,
  ends_with,
  find_places,
  given_target,
  key_of,
  scanned_lists,
  split_path,
)
from jaxlora._serialization import register_with_flax
from jaxlora._targets import listed
from jaxlora._variants import VARIANTS, squared_norms
from jaxlora._weight import FullWeight, LoraWeight, check_parts, is_adapted

__all__ = ["PeftError", "load", "save"]

Axes = Mapping[str, str] | None


def save(
  folder: Any,
  tree: Any,
  *,
  names: Names = None,
  base_model_name_or_path: str | None = None,
  task_type: str | None = None,
  axes: Axes = None,
) -> None:
  r"""Writes the adapter of a tree as a folder that `peft.PeftModel.from_pretrained` loads.

      lora_A.weight = a as (rank, in),    lora_B.weight = bᵀ as (out, rank),    scale as alpha says

  Kernels split into heads become matrices, convolutions (rank, in, *kernel) and (out, rank, 1, ...), embeddings
  `lora_embedding_A` and `_B`; scanned layers are written one by one. Ranks and alphas that differ are in `rank_pattern`
  and `alpha_pattern`, which vLLM does not read: it takes `lora_alpha / r` for all. Leaves trained whole become
  `modules_to_save`, or, biases alone, `bias="lora_only"` or `"all"`. An embedding that is the head, too, is adapted in
  both uses here, and in its look-ups alone in PEFT: there the two are not the same function. PEFT has one dropout for
  all modules: the most common one is written.

  Args:
    folder: made if it is not there; an adapter that it holds is replaced.
    tree: what `adapt` returned, or its trainable half. Bases may be `jax.ShapeDtypeStruct`s.
    names: regex over paths, or over those of the leaves' modules -> the torch module's name, with `\1` for a group of
      the regex and `{}` for the index of a stacked layer. The first that matches counts; leaves that none matches, and
      all of them with `None`, are called by the habits of the Hugging Face Hub: `h/0/attn/c_attn/kernel` is
      `transformer.h.0.attn.c_attn`; `layers_0`, `layers/0` and scanned `layers` are `model.layers.0`.
    base_model_name_or_path: written to the configuration.
    task_type: written to the configuration, such as `"CAUSAL_LM"`.
    axes: regex -> roles, for kernels trained whole whose axes nothing tells.

  Raises:
    PeftError: listing the leaves that PEFT's format has no place for, or that hold NaN; nothing is written.
    ValueError: if the tree has no adapted leaf.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora, jaxlora.peft, tempfile
    >>> params = {"layers_0": {"q_proj": {"kernel": jnp.ones((16, 8))}}}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   jaxlora.peft.save(folder, tree)
    ...   loaded = jaxlora.peft.load(folder, params)
    >>> bool((loaded["layers_0"]["q_proj"]["kernel"].a == tree["layers_0"]["q_proj"]["kernel"].a).all())
    True
  """
  leaves = dict(_paths.flatten(tree, is_leaf=is_adapted)[0])
  check_names(names, leaves)
  problems: list[str] = []
  model = _Model.of(leaves, names, problems)
  modules = [module for path, node in leaves.items() if isinstance(node, LoraWeight) for module in model.adapted(path)]
  whole, bias = model.trained_whole(axes, {module.name for module in modules})
  if not modules and not whole and not problems:
    raise ValueError("save: the tree has no adapted leaf. Make one with jaxlora.adapt(params, config, key).")
  if len({module.magnitude is None for module in modules}) > 1:
    plain = [module.name for module in modules if module.magnitude is None]
    problems.append(
      f"{listed(plain)}: no DoRA, while others of the tree are; PEFT has one variant for a whole adapter. Save them"
      " apart"
    )
  twice = {module.name for k, module in enumerate(modules) if module.name in {m.name for m in modules[:k]}}
  problems += [f"{name}: several leaves have this name in torch. Tell them apart by names=" for name in sorted(twice)]
  _raise("save", problems)
  dropouts = [node.dropout for node in leaves.values() if isinstance(node, LoraWeight)]
  _peft_file.write(
    folder,
    modules,
    whole,
    bias=bias,
    known=model.known(),
    dropout=max(dropouts, key=dropouts.count, default=0.0),
    base_model_name_or_path=base_model_name_or_path,
    task_type=task_type,
  )


def load(
  folder: Any,
  params: Any,
  *,
  names: Names = None,
  axes: Axes = None,
  probe: Callable[[Any], Any] | None = None,
) -> Any:
  """Reads a folder that PEFT wrote, and puts its adapter on `params`.

      a = lora_A.weight as (rank, *in),    b = lora_B.weightᵀ as (rank, *out)

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`.
    params: the base, as `adapt` takes it; arrays or `jax.ShapeDtypeStruct`s.
    names: as in `save`.
    axes: regex -> roles, one letter per axis, for leaves where shapes do not tell: a square matrix is taken for (in,
      out), as Flax stores it, unless this or the probe says otherwise.
    probe: a function of `params` alone, as in `adapt`: traced, never run, to learn the roles.

  Returns:
    A tree of the same nesting with `LoraWeight`s, and `FullWeight`s for `modules_to_save` and trained biases. Factors
    keep the file's dtype. In a stack of layers of which only some are adapted the others have zero factors.

  Raises:
    PeftError: listing everything that does not fit: tensors without a leaf or with several, halves, shapes, ranks, NaN,
      options that make it another method than LoRA. Whatever the files hold, no other error comes of it.

  Example: see `save`.

  Source: the format is that of `peft` 0.21, `peft/utils/save_and_load.py` and `peft/tuners/lora/`.
  """
  nodes, treedef = _paths.flatten(params, is_leaf=is_adapted)
  leaves = dict(nodes)
  for path, leaf in leaves.items():
    if is_adapted(leaf):
      raise ValueError(f"load: {path} is adapted already. Load onto plain parameters (jaxlora.strip, jaxlora.merge).")
  check_names(names, leaves)
  register_with_flax()
  adapter = _peft_file.read(folder)
  roles = _known_roles(leaves, params, axes, probe)
  new, problems = _place_all(adapter, leaves, names, roles)
  _raise(f"load: {folder}", [*adapter.unsupported, *problems])
  return jax.tree_util.tree_unflatten(treedef, [new.get(path, leaf) for path, leaf in leaves.items()])


def _raise(subject: str, problems: Sequence[str]) -> None:
  if problems:
    raise _peft_file.fail(subject, problems)


# ----------------------------------------------------------------------------------------------------------------------
# What a weight is in torch: kind and layout.


def _kind(path: str, module: str, own: str) -> str:
  """The torch layer that holds a weight with these roles, the stacked ones left out."""
  if own == "io" and _paths.components(path)[-1] == "embedding":
    return "embedding"
  convolution = own in ("i" * (len(own) - 1) + "o", "o" + "i" * (len(own) - 1)) and 3 <= len(own) <= 5
  named = _names_a_convolution(*_paths.components(path)[-3:], *module.split(".")[-2:])
  return "conv" if convolution and (named or len(own) > 3) else "linear"


_CONVOLUTION = re.compile(r"(?:.*_)?conv(?:olution)?(?:[1-3]d)?\d*(?:_.*)?", re.IGNORECASE)


def _names_a_convolution(*parts: str) -> bool:
  """Whether `Conv_0`, `conv1d`, `temporal_conv` or the like is among some names: (i, i, o) may be heads as well."""
  return any(map(_CONVOLUTION.fullmatch, parts))


def _channels_last(own: str) -> bool:
  return own[0] == "i"


def _torch_shapes(shape: Sequence[int], own: str, kind: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The shapes of torch's A and B for a weight of `shape`."""
  ins = [size for size, role in zip(shape, own, strict=True) if role == "i"]
  outs = [size for size, role in zip(shape, own, strict=True) if role == "o"]
  if kind != "conv":
    return (rank, math.prod(ins)), (math.prod(outs), rank)
  if _channels_last(own):
    ins = [ins[-1], *ins[:-1]]
  return (rank, *ins), (math.prod(outs), rank, *(1 for _ in ins[1:]))


def _factors_to_torch(a: np.ndarray, b: np.ndarray, own: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
  """(rank, *in), (rank, *out) -> torch's A and B."""
  matrix = b.reshape(len(b), -1).T
  if kind != "conv":
    return a.reshape(len(a), -1), matrix
  if _channels_last(own):
    a = np.moveaxis(a, -1, 1)
  return a, matrix.reshape(*matrix.shape, *(1 for _ in range(a.ndim - 2)))


def _factors_from_torch(module: Module, shape: Sequence[int], own: str) -> tuple[np.ndarray, np.ndarray]:
  """Torch's A and B -> (rank, *in), (rank, *out)."""
  a = module.a
  if module.kind == "conv" and _channels_last(own):
    a = np.moveaxis(a, 1, -1)
  ins, outs = (factor_shape(tuple(shape), own, role, module.rank) for role in "io")
  return a.reshape(ins), module.b_matrix.T.reshape(outs)


def _whole_to_torch(value: np.ndarray, own: str, kind: str, name: str) -> np.ndarray:
  """A weight in the layout of torch's layer: (out, in), (out, in, *kernel); GPT-2's Conv1D, embeddings: as it is."""
  if value.ndim == 1 or kind == "embedding":
    return value
  outs = [d for d, role in enumerate(own) if role == "o"]
  ins = [d for d, role in enumerate(own) if role == "i"]
  if kind == "conv":
    return value.transpose(outs + ([ins[-1], *ins[:-1]] if _channels_last(own) else ins))
  matrix = value.transpose(outs + ins).reshape(math.prod(value.shape[d] for d in outs), -1)
  return matrix.T if name.rpartition(".")[2] in _peft_file.CONV1D else matrix


def _whole_from_torch(tensor: np.ndarray, shape: Sequence[int], own: str, kind: str, name: str) -> np.ndarray | None:
  """A weight of torch's in the layout of a leaf, or `None` where it does not fit."""
  if len(shape) == 1 or kind == "embedding":
    return tensor if tensor.shape == tuple(shape) else None
  example = np.empty(shape, np.int8)
  outs = [d for d, role in enumerate(own) if role == "o"]
  ins = [d for d, role in enumerate(own) if role == "i"]
  order = outs + ([ins[-1], *ins[:-1]] if kind == "conv" and _channels_last(own) else ins)
  turned = kind == "linear" and tensor.ndim == 2 and name.rpartition(".")[2] in _peft_file.CONV1D
  for candidate in (tensor.T, tensor) if turned else (tensor,):
    if candidate.shape == _whole_to_torch(example, own, kind, "").shape:
      return candidate.reshape([shape[d] for d in order]).transpose(np.argsort(order))
  return None


# ----------------------------------------------------------------------------------------------------------------------
# Roles of weights that no `LoraWeight` tells of.

_OUTPUTS = ("out", "o", "out_proj", "o_proj", "c_proj", "wo", "to_out", "dense")


@dataclasses.dataclass(frozen=True)
class _Roles:
  """Roles as far as they are known before a file is read.

  Attributes:
    said: by path, from `axes` or the probe.
    outputs_first: whether the biases of the tree tell that its matrices are stored (out, in).
    biases: shape of the bias beside each leaf.
    tied: leaves that the probe shows looked up and multiplied by: an embedding that is the head, too.
  """

  said: dict[str, str]
  outputs_first: bool
  biases: dict[str, tuple[int, ...]]
  tied: frozenset[str]


def _known_roles(leaves: Mapping[str, Any], params: Any, axes: Axes, probe: Any) -> _Roles:
  said, tied = {}, set()
  if probe is not None:
    for path, evidence in zip(leaves, _probe.study(probe, params), strict=True):
      if (found := evidence.roles()) is not None:
        said[path] = found
      if evidence.looked_up is not None and evidence.contracted is not None:
        tied.add(path)
  checked = LoraConfig(axes=axes).axes  # says what is wrong with them
  for pattern in checked or {}:
    if not any(first_match({pattern: True}, path) for path in leaves):
      raise PeftError(
        f"axes: {pattern!r} matches none of the {len(leaves)} leaves (a regex must match the whole path). Nearest:"
        f" {', '.join(_paths.nearest(pattern, leaves))}."
      )
  for path, leaf in leaves.items():
    if (given := first_match(checked, path)) is not None:
      if len(given) != len(_shape(leaf)):
        raise PeftError(f"axes: {given!r} has {len(given)} letters for {path}, whose shape is {_shape(leaf)}.")
      said[path] = given
  biases = _biases(leaves)
  sides = [(_shape(leaves[path]), bias) for path, bias in biases.items()]
  first = any(len(shape) == 2 and shape[0] != shape[1] and bias == (shape[0],) for shape, bias in sides)
  return _Roles(said, first, biases, frozenset(tied))


def _biases(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """The shape of the bias beside each weight that has one."""
  parameters = {path: split_path(path) for path in leaves}
  of_module = {module: _shape(leaves[path]) for path, (module, parameter) in parameters.items() if parameter == "bias"}
  return {path: of_module[module] for path, (module, p) in parameters.items() if p == "weight" and module in of_module}


def _shape(leaf: Any) -> tuple[int, ...]:
  if isinstance(leaf, LoraWeight) and leaf.base is None:
    return _shape_of_factors(leaf)
  if isinstance(leaf, FullWeight) and leaf.base is None:
    return tuple(np.shape(leaf.value))
  return tuple(leaf.base.shape if is_adapted(leaf) else np.shape(leaf))


def _shape_of_factors(node: LoraWeight) -> tuple[int, ...]:
  a, b, stack = list(node.a.shape), list(node.b.shape), node.roles.count("s")
  sides = {"s": iter(a[:stack]), "i": iter(a[stack + 1 :]), "o": iter(b[stack + 1 :])}
  return tuple(next(sides[role]) for role in node.roles)


def _roles_by_sizes(path: str, shape: Sequence[int], ins: int, outs: int, roles: _Roles) -> str:
  """The roles of a matrix, split into heads or not, of which the flat sizes are known.

  Raises:
    ValueError: if none fit, or if a square matrix lies in a tree of matrices stored the other way round.
  """
  fits = [
    "i" * k + "o" * (len(shape) - k)
    for k in range(1, len(shape))
    if math.prod(shape[:k]) == ins and math.prod(shape[k:]) == outs
  ]
  if len(shape) == 2 and roles.outputs_first and ins == outs:
    raise ValueError("the tree stores other matrices as (out, in), and a square one does not tell; say axes= or probe=")
  if not fits:
    other = len(shape) == 2 and tuple(shape) == (outs, ins)
    raise ValueError(
      f"shape {tuple(shape)}, but the adapter has {ins} inputs and {outs} outputs"
      + ("; if it is stored as (out, in), say axes={pattern: 'oi'} or probe=" if other else "")
    )
  # Several fit only where an axis has size 1: the product is the same, and the name tells which is meant.
  outputs = split_path(path)[0].split("/")[-1] in _OUTPUTS
  return fits[-1 if outputs else 0]


def _roles_of_whole(path: str, shape: Sequence[int], roles: _Roles) -> str:
  """The roles of a weight trained whole, told by `axes` or the probe, by its bias, or by its name.

  Raises:
    ValueError: if nothing tells.
  """
  ndim, bias = len(shape), roles.biases.get(path)
  conv = _names_a_convolution(*_paths.components(path)[-3:])
  if ndim >= 4 or (ndim == 3 and conv):
    return "i" * (ndim - 1) + "o"
  if ndim == 2:
    if shape[0] == shape[1] and roles.outputs_first and _paths.components(path)[-1] != "embedding":
      raise ValueError("the tree stores other matrices as (out, in), and a square one does not tell; say axes=")
    return "oi" if bias == (shape[0],) and shape[0] != shape[1] else "io"
  fits = ["i" * k + "o" * (ndim - k) for k in range(1, ndim) if bias == tuple(shape[k:])]
  if len(fits) != 1:
    raise ValueError(f"shape {tuple(shape)}: nothing tells which axes are inputs; say axes={{pattern: roles}}")
  return fits[0]


# ----------------------------------------------------------------------------------------------------------------------
# Saving.


@dataclasses.dataclass
class _Model:
  """A tree seen as torch's model: what each leaf is called there. What is wrong is added to `problems`."""

  leaves: Mapping[str, Any]
  targets: dict[str, Target]
  problems: list[str]

  @classmethod
  def of(cls, leaves: Mapping[str, Any], names: Names, problems: list[str]) -> "_Model":
    stacks = _stacks(leaves)
    targets = {}
    for path, leaf in leaves.items():
      stacked = leaf.roles.count("s") if isinstance(leaf, LoraWeight) else stacks(path)
      try:
        target = given_target(path, names) or default_target(path, stacked)
      except PeftError as error:
        if is_adapted(leaf):
          problems.append(str(error))
        continue
      if isinstance(leaf, LoraWeight) and target.stacked != stacked:
        problems.append(
          f"{path}: roles {leaf.roles!r} have {stacked} stacked axes, but names gives {target.module!r} with"
          f" {target.stacked} places for an index"
        )
        continue
      if target.stacked > len(_shape(leaf)):
        if is_adapted(leaf):
          problems.append(f"{path}: shape {_shape(leaf)}, but names gives {target.module!r} more places for an index")
        continue
      targets[path] = target
    return cls(leaves, targets, problems)

  def known(self) -> list[str] | None:
    """The names of all modules of the model, if the tree is whole."""
    if any(isinstance(leaf, LoraWeight) and leaf.base is None for leaf in self.leaves.values()):
      return None
    return sorted({name for path in self.targets for _, name in self._names(path)})

  def _names(self, path: str) -> list[tuple[tuple[int, ...], str]]:
    """The index of each layer of a leaf, and what the module is called."""
    target, leaf = self.targets[path], self.leaves[path]
    sizes = _shape(leaf)
    if isinstance(leaf, LoraWeight):
      sizes = tuple(size for size, role in zip(sizes, leaf.roles, strict=True) if role == "s")
    return [(index, target.name(index)) for index in np.ndindex(*sizes[: target.stacked])]

  def adapted(self, path: str) -> list[Module]:
    """The torch modules that an adapted leaf is, one per stacked layer."""
    if path not in self.targets:
      return []
    node, target = self.leaves[path], self.targets[path]
    check_parts(node, f"save: {path}", {"a", "b", *node.extra} | ({"base"} if node.extra else set()))
    own = node.roles.replace("s", "")
    kind = _kind(path, target.module, own)
    if target.parameter == "bias":
      self.problems.append(f"{path}: PEFT adapts weights, and this is called {target.module}.bias")
      return []
    a, b, alpha, scaling = _written(node)
    magnitude = node.extra.get("magnitude")
    made = []
    for index, name in self._names(path):
      first, second = _factors_to_torch(a[index], b[index], own, kind)
      norms = None if magnitude is None else _magnitude_to_torch(np.asarray(magnitude[index]), kind, first.ndim)
      made.append(Module(name, kind, first, second, alpha, scaling, norms))
    return made

  def trained_whole(self, axes: Axes, adapted: set[str]) -> tuple[dict[str, np.ndarray], str]:
    """What replaces torch's parameters, and PEFT's option for biases that goes with it."""
    roles = _known_roles(self.leaves, None, axes, None)
    parameters: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}  # module -> parameter -> leaf and layer
    for path, target in self.targets.items():
      for index, name in self._names(path):
        parameters.setdefault(name, {})[target.parameter or "weight"] = (path, index)
    trained = {
      name: {p for p, (path, _) in held.items() if isinstance(self.leaves[path], FullWeight)}
      for name, held in parameters.items()
    }
    self.problems += [
      f"{path}: PEFT saves modules, and a leaf of this name is none of Flax's. Give names= with a torch name that ends"
      " in .weight or .bias, or merge it into the base (jaxlora.merge)"
      for path, target in self.targets.items()
      if isinstance(self.leaves[path], FullWeight) and target.parameter is None
    ]
    only_bias = {name for name, which in trained.items() if which == {"bias"} and "weight" in parameters[name]}
    saved = {name for name, which in trained.items() if which} - only_bias
    # PEFT goes by the ends of names: what is called like a saved module is saved, too, with the base's values.
    saved |= {name for name in set(parameters) - adapted if any(name.endswith(other) for other in saved)}
    wanted = [(name, parameter) for name in saved for parameter in parameters[name]]
    wanted += [(name, "bias") for name in only_bias - saved]
    whole = {
      f"{name}.{parameter}": tensor
      for name, parameter in sorted(wanted)
      if (tensor := self._tensor(*parameters[name][parameter], name, parameter, roles)) is not None
    }
    bias = "all" if only_bias - saved - adapted else "lora_only" if only_bias - saved else "none"
    return whole, bias

  def _tensor(self, path: str, index: tuple[int, ...], name: str, parameter: str, roles: _Roles) -> np.ndarray | None:
    """The value of one torch parameter."""
    leaf = self.leaves[path]
    value = leaf.value if isinstance(leaf, FullWeight) else leaf
    if value is None or isinstance(value, (LoraWeight, jax.ShapeDtypeStruct)):
      self.problems.append(f"{path}: its value is needed, as PEFT saves whole modules, and {name} is one of those")
      return None
    value = np.asarray(value)[index]
    if parameter == "bias":
      return value.reshape(-1)
    try:
      own = _own_roles(path, value.shape, len(index), roles)
    except ValueError as error:
      self.problems.append(f"{path}: {error}")
      return None
    return _whole_to_torch(value, own, _kind(path, name, own), name)


def _own_roles(path: str, shape: Sequence[int], stacked: int, roles: _Roles) -> str:
  """The roles of one layer's weight, trained whole."""
  if len(shape) < 2:
    return "o" * len(shape)
  said = roles.said.get(path)
  if said is None:
    return _roles_of_whole(path, shape, roles)
  if said[:stacked] != "s" * stacked or said.count("s") != stacked:
    raise ValueError(f"axes: {said!r} does not begin with {stacked} 's' for the stacked axes")
  return said[stacked:]


def _stacks(leaves: Mapping[str, Any]) -> Callable[[str], int]:
  """How many stacked axes a leaf has, told by the adapted ones below the same scanned module."""
  scanned: dict[str, int] = {}
  for path, leaf in leaves.items():
    parts = _paths.components(path)
    places = scanned_lists(parts)
    if isinstance(leaf, LoraWeight) and leaf.roles.count("s") == len(places):
      scanned |= {"/".join(parts[: k + 1]): count for count, k in enumerate(places, 1)}
  return lambda path: max((count for stem, count in scanned.items() if path.startswith(f"{stem}/")), default=0)


def _written(node: LoraWeight) -> tuple[np.ndarray, np.ndarray, float, str]:
  """The factors, alpha and scaling that stand for a node in a file: relative to the base that torch's model has.

  Whatever is no plain LoRA is one of its effective factors' rank, such as twice the rank after PiSSA.
  """
  if not (node.extra.keys() - {"magnitude", "norm"}) and node.kind.factors is VARIANTS["lora"].factors:
    return np.asarray(node.a), np.asarray(node.b), node.alpha, node.scaling
  a, b = node.factors()
  return np.asarray(a), np.asarray(b), float(a.shape[node.roles.count("s")]), "standard"


def _magnitude_to_torch(magnitude: np.ndarray, kind: str, ndim: int) -> np.ndarray:
  """(1, *out) -> (out,), or (1, out, 1, ...) for a convolution."""
  return magnitude.reshape((1, -1, *(1 for _ in range(ndim - 2))) if kind == "conv" else (-1,))


# ----------------------------------------------------------------------------------------------------------------------
# Loading.


def _place_all(
  adapter: Adapter, leaves: Mapping[str, Any], names: Names, roles: _Roles
) -> tuple[dict[str, Any], list[str]]:
  """The new leaves by path, and everything that does not fit."""
  tensors = {key_of(name): tensor for name, tensor in {**adapter.bases, **adapter.whole}.items()}
  wanted = [*((name, "weight") for name in adapter.modules), *tensors]
  places, missing = find_places(dict.fromkeys(wanted), leaves, names)
  factored: dict[str, dict[tuple[int, ...], Module]] = {}
  whole: dict[str, dict[tuple[int, ...], tuple[str, np.ndarray]]] = {}
  problems = []
  for key, problem in missing.items():
    if len(missing) > _MOST_TIED or not _is_tied(tensors.get(key), key, places, tensors):
      problems.append(problem)
  for name, module in adapter.modules.items():
    if place := places.get((name, "weight")):
      factored.setdefault(place.path, {})[place.index] = module
  for name, tensor in adapter.whole.items():
    if place := places.get(key_of(name)):
      whole.setdefault(place.path, {})[place.index] = (name, tensor)
  new: dict[str, Any] = {}
  for path in factored:
    try:
      if path in whole:
        raise ValueError("adapted, and saved whole, too")
      new[path] = _factored(path, leaves[path], factored[path], roles, adapter.dropout)
    except ValueError as error:
      problems.append(f"{path} ({next(iter(factored[path].values())).name}): {error}")
  for path in whole.keys() - factored.keys():
    name = next(iter(whole[path].values()))[0]
    try:
      value = _trained(path, leaves[path], whole[path], roles)
      if not _is_untouched(adapter, name, leaves[path], value):
        new[path] = FullWeight(base=leaves[path], value=value)
    except ValueError as error:
      problems.append(f"{path} ({name}): {error}")
  if names is None:  # else the tree is not called as torch's model is, and no name's end tells
    problems += _left_out(adapter, leaves, new, factored)
  for name, tensor in adapter.bases.items():
    if place := places.get(key_of(name)):
      problems += _other_base(place, leaves[place.path], name, tensor, roles)
  return new, problems


def _left_out(
  adapter: Adapter, leaves: Mapping[str, Any], new: Mapping[str, Any], layers: Mapping[str, Mapping[Any, Module]]
) -> list[str]:
  """Weights that `target_modules` names, and the file has nothing for: PEFT would start them anew, with a warning."""
  config = adapter.config
  targets = config.get("target_modules")
  if not isinstance(targets, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
    return []
  missing = []
  for path, leaf in leaves.items():
    ending = next((t for t in targets if isinstance(t, str) and ends_with(path, t)), None)
    if ending is None or len(_shape(leaf)) < 2:
      continue
    node = new.get(path)
    if node is None and path not in layers:
      missing.append(f"{path}: target_modules names {ending!r}, but the file holds no factors for it")
    elif isinstance(node, LoraWeight):
      stack = math.prod(node.a.shape[: node.roles.count("s")])
      if len(layers[path]) < stack:
        missing.append(
          f"{path}: target_modules names {ending!r}, but the file holds {len(layers[path])} of {stack} layers"
        )
  return missing


_MOST_TIED = 20  # a model has one or two ends that are tied


def _is_tied(tensor: Any, key: tuple[str, str], places: Mapping[Any, Place], tensors: Mapping[Any, np.ndarray]) -> bool:
  """Whether a tensor without a leaf is another one's copy: PEFT saves both ends of tied embeddings."""
  if tensor is None:
    return False
  others = (other for name, other in tensors.items() if name != key and name in places)
  return any(other.shape == tensor.shape and np.array_equal(other, tensor) for other in others)


def _is_untouched(adapter: Adapter, name: str, leaf: Any, value: Any) -> bool:
  """Whether a tensor is the base's own, which PEFT saves with adapted embeddings."""
  module, _, parameter = name.rpartition(".")
  listed = adapter.config.get("modules_to_save") or []
  if parameter == "bias" or any(module.endswith(m) or f".{m}." in f".{module}." for m in listed):
    return False
  return not isinstance(leaf, jax.ShapeDtypeStruct) and bool((jnp.asarray(leaf) == value).all())


def _other_base(place: Place, leaf: Any, name: str, tensor: np.ndarray, roles: _Roles) -> list[str]:
  """What is wrong where the file holds the base of an adapted module."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return []
  try:
    if np.array_equal(np.asarray(_trained(place.path, leaf, {place.index: (name, tensor)}, roles)), np.asarray(leaf)):
      return []
    found = "other values"
  except ValueError as error:
    found = str(error)
  return [
    f"{place.path} ({name}): the file holds the base weight, and it is not this one: {found}. Load onto that base: put"
    " the file's tensor into params"
  ]


def _device_array(array: np.ndarray) -> jax.Array:
  if array.dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
    array = array.astype(np.float32)
  return jnp.asarray(np.ascontiguousarray(array))


def _factored(
  path: str, leaf: Any, layers: Mapping[tuple[int, ...], Module], roles: _Roles, dropout: float
) -> LoraWeight:
  """One adapted leaf, of one module or of all layers of a stack.

  Raises:
    ValueError: if they do not fit.
  """
  shape, (first, *_) = _shape(leaf), layers.values()
  if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
    raise ValueError(f"dtype {leaf.dtype} cannot be adapted; expected a real floating dtype")
  if path in roles.tied and first.kind == "embedding":
    raise ValueError(
      "PEFT adapts the look-up alone, and this leaf is the head's weight, too. Give the tree a head of its own"
    )
  stacked = len(next(iter(layers)))
  full = _roles_of_factored(path, shape, first, stacked, roles)
  own = full.replace("s", "")
  stack = tuple(size for size, role in zip(shape, full, strict=True) if role == "s")
  sizes = [size for size, role in zip(shape, full, strict=True) if role != "s"]
  rank = max(module.rank for module in layers.values())
  scale, one = first.scale, len(layers) == 1 and not stacked
  pieces = {}
  for index, module in layers.items():
    expected = _torch_shapes(sizes, own, module.kind, module.rank)
    if any(k >= size for k, size in zip(index, stack, strict=True)):
      raise ValueError(f"{module.name} is layer {index}, but the leaf's shape {shape} has {stack} of them")
    if (module.a.shape, module.b.shape) != expected or module.kind != first.kind:
      raise ValueError(
        f"{module.name} has lora_A {module.a.shape} and lora_B {module.b.shape}; expected {expected[0]} and"
        f" {expected[1]} for a leaf of shape {shape} with roles {full!r}"
      )
    pieces[index] = _factors_from_torch(module, sizes, own)
  if one:
    a, b = pieces[()]
  else:  # one rank and one scale for the stack: smaller ranks are filled up with zeros, scales go into b
    a, b = (
      np.zeros((*stack, rank, *piece.shape[1:]), np.result_type(*(p[k].dtype for p in pieces.values())))
      for k, piece in enumerate(pieces[next(iter(pieces))])
    )
    for index, module in layers.items():
      factor = module.scale / scale
      a[index][: module.rank] = pieces[index][0]
      b[index][: module.rank] = pieces[index][1] if factor == 1 else pieces[index][1] * b.dtype.type(factor)
  alpha = first.alpha if first.rank == rank else _alpha_for(scale, rank, first.scaling)
  dora = first.magnitude is not None
  return LoraWeight(
    base=leaf,
    variant="dora" if dora else "lora",
    extra=_magnitudes(leaf, full, layers) if dora else {},
    a=_device_array(a),
    b=_device_array(b),
    roles=full,
    rank=rank,
    alpha=alpha,
    scaling=first.scaling,
    dropout=dropout,
  )


def _magnitudes(leaf: Any, roles: str, layers: Mapping[tuple[int, ...], Module]) -> dict[str, jax.Array]:
  """DoRA's parts; layers of a stack that are not in the file keep the base's norms.

  Raises:
    ValueError: if the base's values are not known.
  """
  if isinstance(leaf, jax.ShapeDtypeStruct):
    raise ValueError("DoRA takes the norms of the base, and this one has a shape alone; load onto the base's values")
  norm = jnp.sqrt(squared_norms(jnp.asarray(leaf), roles))
  magnitude = np.array(norm)
  for index, module in layers.items():
    assert module.magnitude is not None
    magnitude[index] = module.magnitude.astype(magnitude.dtype).reshape(magnitude[index].shape)
  return {"magnitude": jnp.asarray(magnitude), "norm": norm}


def _alpha_for(scale: float, rank: int, scaling: str) -> float:
  return scale * (rank if scaling == "standard" else math.sqrt(rank))


def _roles_of_factored(path: str, shape: Sequence[int], module: Module, stacked: int, roles: _Roles) -> str:
  said = roles.said.get(path)
  if said is not None:
    if said.count("s") != stacked:
      raise ValueError(f"roles {said!r}, but its name in the file has {stacked} indices of stacked layers")
    return said
  own = shape[stacked:]
  if len(own) < 2:
    raise ValueError(f"shape {tuple(shape)} has fewer than two axes beside {stacked} stacked ones")
  if module.kind == "embedding":
    found = "io"
  elif module.kind == "conv":
    last = "i" * (len(own) - 1) + "o"
    first = "o" + "i" * (len(own) - 1)
    fits = len(own) == module.a.ndim and _torch_shapes(own, last, "conv", module.rank)[0] != module.a.shape
    found = first if fits and _torch_shapes(own, first, "conv", module.rank)[0] == module.a.shape else last
  else:
    found = _roles_by_sizes(path, own, module.a.shape[1], module.b.shape[0], roles)
  if len(found) != len(own):
    raise ValueError(f"shape {tuple(shape)}, but the adapter is one of {module.kind}: {module.a.shape}")
  return "s" * stacked + found


def _trained(
  path: str, leaf: Any, layers: Mapping[tuple[int, ...], tuple[str, np.ndarray]], roles: _Roles
) -> jax.Array:
  """The value of a leaf trained whole; layers of a stack that are not in the file keep the base's.

  Raises:
    ValueError: if a tensor does not fit.
  """
  shape, stacked = _shape(leaf), len(next(iter(layers)))
  abstract = isinstance(leaf, jax.ShapeDtypeStruct)
  value = np.zeros(shape, leaf.dtype) if abstract or not stacked else np.array(leaf)
  for index, (name, tensor) in layers.items():
    own = shape[stacked:]
    if any(k >= size for k, size in zip(index, shape[:stacked], strict=True)):
      raise ValueError(f"{name} is layer {index}, but the leaf's shape {shape} has {shape[:stacked]} of them")
    if name.endswith(".bias"):
      found = tensor.reshape(own) if tensor.ndim == 1 and tensor.size == math.prod(own) else None
    else:
      letters = _own_roles(path, own, stacked, roles)
      found = _whole_from_torch(
        tensor, own, letters, _kind(path, name.rpartition(".")[0], letters), name.rpartition(".")[0]
      )
    if found is None:
      raise ValueError(f"{name} has shape {tensor.shape}, which does not fit a leaf of shape {shape}")
    value[index] = found.astype(leaf.dtype)
  return _device_array(value)
