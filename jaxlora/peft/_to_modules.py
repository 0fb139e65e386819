"""From a tree to torch's modules."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from jaxlora._base.paths import components, flatten
from jaxlora._base.text import listed
from jaxlora._weight.checks import check_parts
from jaxlora._weight.variant import VARIANTS
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted
from jaxlora.peft._layout import factors_to_torch, kind_of, magnitude_to_torch, whole_to_torch
from jaxlora.peft._names import Names, Target, check_names, default_target, given_target, scanned_lists
from jaxlora.peft._records import Module, PeftError, fail
from jaxlora.peft._roles import Axes, Roles, known_roles, own_roles, shape_of_leaf
from jaxlora.peft._write import write


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
  leaves = dict(flatten(tree, is_leaf=is_adapted)[0])
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
  raise_problems("save", problems)
  dropouts = [node.dropout for node in leaves.values() if isinstance(node, LoraWeight)]
  write(
    folder,
    modules,
    whole,
    bias=bias,
    known=model.known(),
    dropout=max(dropouts, key=dropouts.count, default=0.0),
    base_model_name_or_path=base_model_name_or_path,
    task_type=task_type,
  )


def raise_problems(subject: str, problems: Sequence[str]) -> None:
  if problems:
    raise fail(subject, problems)


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
      if target.stacked > len(shape_of_leaf(leaf)):
        if is_adapted(leaf):
          problems.append(
            f"{path}: shape {shape_of_leaf(leaf)}, but names gives {target.module!r} more places for an index"
          )
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
    sizes = shape_of_leaf(leaf)
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
    kind = kind_of(path, target.module, own)
    if target.parameter == "bias":
      self.problems.append(f"{path}: PEFT adapts weights, and this is called {target.module}.bias")
      return []
    a, b, alpha, scaling = _written(node)
    magnitude = node.extra.get("magnitude")
    made = []
    for index, name in self._names(path):
      first, second = factors_to_torch(a[index], b[index], own, kind)
      norms = None if magnitude is None else magnitude_to_torch(np.asarray(magnitude[index]), kind, first.ndim)
      made.append(Module(name, kind, first, second, alpha, scaling, norms))
    return made

  def trained_whole(self, axes: Axes, adapted: set[str]) -> tuple[dict[str, np.ndarray], str]:
    """What replaces torch's parameters, and PEFT's option for biases that goes with it."""
    roles = known_roles(self.leaves, None, axes, None)
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

  def _tensor(self, path: str, index: tuple[int, ...], name: str, parameter: str, roles: Roles) -> np.ndarray | None:
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
      own = own_roles(path, value.shape, len(index), roles)
    except ValueError as error:
      self.problems.append(f"{path}: {error}")
      return None
    return whole_to_torch(value, own, kind_of(path, name, own), name)


def _stacks(leaves: Mapping[str, Any]) -> Callable[[str], int]:
  """How many stacked axes a leaf has, told by the adapted ones below the same scanned module."""
  scanned: dict[str, int] = {}
  for path, leaf in leaves.items():
    parts = components(path)
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
