"""From a tree to torch's modules. No files here."""

import collections
from collections.abc import Collection
import dataclasses
from typing import Any
import warnings

import jax
import numpy as np

from jaxlora._base.paths import flatten, opened
from jaxlora._base.processes import GATHER, not_here
from jaxlora._base.text import listed
from jaxlora._weight.checks import check_parts
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted, is_leaf_node, parts
from jaxlora.peft._config import config_of
from jaxlora.peft._conv1d import told_by_model
from jaxlora.peft._for_torch import joined_names, named_for_torch
from jaxlora.peft._layout import factors_to_torch, magnitude_to_torch, weight_to_torch
from jaxlora.peft._model import TorchModel
from jaxlora.peft._names import Names, check_names
from jaxlora.peft._packed import packed_problems
from jaxlora.peft._records import Adapter, Module, PeftError, TokenRows, fail, raise_problems
from jaxlora.peft._roles import Axes, KnownRoles, confirmed, known_roles, roles_of_layer, shape_of_leaf
from jaxlora.peft._serve_checks import HEADS, module_saved_with
from jaxlora.peft._state import not_finite, state_of
from jaxlora.peft._tied import HEADLESS, NEVER_CALLED, head_name, is_embedding, is_shared, tied_head
from jaxlora.peft._tied_leaves import own_head
from jaxlora.peft._tokens import is_rows, token_rows_of, without_rows


def to_modules(tree: Any, *, names: Names = None, axes: Axes = None) -> Adapter:
  """The adapter of a tree as torch's modules: what `save` writes, in memory. Touches no file, and needs no safetensors.

      A = a as (rank, in),    B = bᵀ as (out, rank),    W' = W + scale * B A

  The layouts and names are those that `save` describes. The result is folded into a torch model's parameters one by one
  with `Adapter.merged`, and put on another tree with `from_modules`.

  Args:
    tree: what `adapt` returned, or its trainable half. Bases may be `jax.ShapeDtypeStruct`s.
    names: regex over paths -> torch module's name, as for `save`.
    axes: regex -> roles, where nothing in the tree tells those of a leaf, adapted or trained whole: `"s"` for the axis
      of stacked layers, as in `"os"` for a norm's (features, layers).

  Returns:
    An `Adapter` with NumPy arrays: factors in their own dtype, or float32 where torch does not compute in it, and the
    configuration that a PEFT folder with them has.

  Raises:
    PeftError: listing the leaves that PEFT's format has no place for, or that hold NaN.
    ValueError: if the tree has no adapted leaf, or is its frozen half.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora, jaxlora.peft
    >>> params = {"layers_0": {"q_proj": {"kernel": jnp.ones((16, 8))}}}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> adapter = jaxlora.peft.to_modules(tree)
    >>> module = adapter.modules["model.layers.0.q_proj"]
    >>> module.a.shape, module.b.shape, module.shape, adapter.config["r"]
    ((2, 16), (8, 2), (8, 16), 2)
    >>> again = jaxlora.peft.from_modules(adapter, params)
    >>> bool((again["layers_0"]["q_proj"]["kernel"].a == tree["layers_0"]["q_proj"]["kernel"].a).all())
    True

  Source: the format is that of `peft` 0.21, `peft/utils/save_and_load.py` and `peft/tuners/lora/`.
  """
  return adapter_of_tree(tree, names, axes, "to_modules")


def module_sizes(tree: Any, names: Names, axes: Axes) -> dict[str, int] | None:
  """How many elements the weight of each module of a tree's torch model has, by the module's name.

  `None` for the trainable half of a tree, which has but some of them.
  """
  tree = without_rows(tree)
  leaves = dict(flatten(tree, is_leaf=is_leaf_node)[0])
  model = TorchModel.of_leaves(leaves, names, known_roles(leaves, tree, axes, None), [])
  return None if model.module_names() is None else model.sizes()


def adapter_of_tree(tree: Any, names: Names, axes: Axes, subject: str, task_type: str | None = None) -> Adapter:
  """`to_modules`, for a caller whose name its errors begin with.

  The task tells which head torch's model has: PEFT takes those of some tasks from the file, trained or not.
  """
  tree = opened(tree)
  nodes = flatten(tree, is_leaf=is_leaf_node)[0]
  if elsewhere := [path for path, node in nodes if _elsewhere(node)]:
    raise fail(subject, [f"{path}: other processes hold shards of it" for path in elsewhere], GATHER)
  rows = {path: token_rows_of(path, node, subject) for path, node in nodes if is_rows(node)}
  tree = without_rows(tree)
  leaves = dict(flatten(tree, is_leaf=is_leaf_node)[0])
  check_names(names, leaves)
  problems: list[str] = []
  known = known_roles(leaves, tree, axes, None)
  model = TorchModel.of_leaves(leaves, names, known, problems)
  known = dataclasses.replace(known, conv1d=told_by_model(model.sizes()))
  adapted = [path for path in model.targets if isinstance(leaves[path], LoraWeight)]
  modules = [module for path in adapted for module in _modules_of(path, model, known, subject, problems)]
  whole, bias = _trained_whole(
    model, known, {module.name for module in modules}, HEADS.get(str(task_type), ()), problems
  )
  modules, whole = named_for_torch(modules, whole, leaves, model.layers, model.targets, known.conv1d, problems)
  tokens = _named_rows(rows, model, problems)
  if not modules and not whole and not rows and not problems:
    raise ValueError(f"{subject}: the tree has no adapted leaf. Make one with jaxlora.adapt(params, config, key).")
  _check_together(modules, problems)
  by_name, packed = {module.name: module for module in modules}, model.packed()
  problems += packed_problems(packed, by_name, whole)
  raise_problems(subject, problems)
  dropouts = [leaf.dropout for leaf in leaves.values() if isinstance(leaf, LoraWeight)]
  tied = None if task_type in HEADLESS else _tied_table(model, subject)
  if tied is not None:
    _add_tied_head(by_name, whole, *tied)
  config = config_of(
    by_name,
    whole,
    bias=bias,
    known=model.module_names(),
    dropout=max(dropouts, key=dropouts.count, default=0.0),
    packed=packed,
    conv1d=known.conv1d,
    heads=HEADS.get(str(task_type), ()),
  )
  if tied is not None:
    config["ensure_weight_tying"] = True
  if tokens:
    config["trainable_token_indices"] = {
      name.removesuffix(".weight"): list(table.indices) for name, table in tokens.items()
    }
  adapter = Adapter(by_name, whole, {}, config, packed=packed, tokens=tokens)
  if broken := not_finite(state_of(adapter)):
    raise fail(subject, broken, "Training has diverged: go back to an earlier checkpoint; nothing was written.")
  return adapter


def _named_rows(rows: dict[str, TokenRows], model: TorchModel, problems: list[str]) -> dict[str, TokenRows]:
  """The rows of tokens by the names of torch's parameters."""
  found = {path: model.targets[path] for path in rows if path in model.targets}
  problems += [
    f"{path}: rows of it train, and PEFT has those of a module's weight alone. Give names= with a torch name, or merge"
    " it into the base (jaxlora.merge)"
    for path in rows
    if path not in found or found[path].parameter != "weight"
  ]
  return {f"{target.module}.weight": rows[path] for path, target in found.items()}


def _elsewhere(node: Any) -> bool:
  return is_adapted(node) and any(not_here(part) for name, part in parts(node).items() if name != "base")


def _tied_table(model: TorchModel, subject: str) -> tuple[str, str] | None:
  """The torch modules of an adapted embedding that is the head, too, and of that head: of a tree without another head.

  DoRA's gain over the features of a look-up is none over the outputs of a head: such an embedding is left alone.

  Raises:
    PeftError: for the trainable half of a tree, which does not show whether the frozen half has a head.
  """
  shapes = {path: shape_of_leaf(leaf) for path, leaf in model.leaves.items()}
  for path, target in model.targets.items():
    leaf = model.leaves[path]
    if is_adapted(leaf) and path.endswith("embedding") and is_shared(target.module):
      raise PeftError(f"{subject}: {path}: {NEVER_CALLED} Merge it into the base (jaxlora.merge).")
    if not is_adapted(leaf) or target.parameter != "weight" or not is_embedding(target.module):
      continue
    gain = isinstance(leaf, LoraWeight) and leaf.kind.gain is not None
    head = head_name(target.module, (other.module for other in model.targets.values()))
    if target.stacked or head is None or own_head(shapes, path) is not None:
      continue
    if gain:
      _warn_of_look_ups_alone(subject, path, head)
      continue
    if leaf.base is None:
      raise PeftError(
        f"{subject}: {path}: is adapted, and this half of a tree does not show whether it is the head, too. Save the"
        " whole tree: jaxlora.join(frozen, trainable)."
      )
    return target.module, head
  return None


def _warn_of_look_ups_alone(subject: str, path: str, head: str) -> None:
  warnings.warn(
    f"{subject}: {path}: is adapted with a gain over the features of a look-up (DoRA), which a head has none of. In"
    f" PEFT the look-ups alone change: where the model's head is this embedding ({head}), it computes something else."
    " Write the merged one instead (jaxlora.merge), or leave the embedding out (LoraConfig(exclude=)); of a model that"
    " has no head say so: jaxlora.peft.save(..., task_type='FEATURE_EXTRACTION').",
    UserWarning,
    stacklevel=5,
  )


def _add_tied_head(modules: dict[str, Module], whole: dict[str, np.ndarray], table: str, head: str) -> None:
  """Adds the head whose weight is an adapted embedding: PEFT adapts the two uses as two modules."""
  if table in modules:
    modules[head] = tied_head(modules[table], head)
  else:
    whole[f"{head}.weight"] = whole[f"{table}.weight"]


def _check_together(modules: Collection[Module], problems: list[str]) -> None:
  """Adds what is wrong with modules that are fine by themselves."""
  if len({module.magnitude is None for module in modules}) > 1:
    plain = [module.name for module in modules if module.magnitude is None]
    problems.append(
      f"{listed(plain)}: no DoRA, while others of the tree are; PEFT has one variant for a whole adapter. Save them"
      " apart"
    )
  counts = collections.Counter(module.name for module in modules)
  problems += [
    f"{name}: several leaves have this name in torch. Tell them apart by names=; if they are one module together, with"
    " jaxlora.peft.Joined(module, parts)"
    for name in sorted(counts)
    if counts[name] > 1
  ]


_DORA = ("dora", "dora_exact")  # the one kind of gain that PEFT has


def _modules_of(path: str, model: TorchModel, known: KnownRoles, subject: str, problems: list[str]) -> list[Module]:
  """The torch modules of an adapted leaf, one per stacked layer."""
  node, target = model.leaves[path], model.targets[path]
  check_parts(node, f"{subject}: {path}", {"a", "b", *node.extra} | ({"base"} if node.extra else set()))
  if target.parameter == "bias":
    problems.append(f"{path}: PEFT adapts weights, and this is called {target.module}.bias")
    return []
  if not node.kind.linear and node.variant not in _DORA:
    problems.append(f"{path}: PEFT has no variant {node.variant!r}, and no module of it can hold one. Merge it first")
    return []
  try:
    node = confirmed(path, node, known)
  except ValueError as error:
    problems.append(f"{path}: {error}")
    return []
  roles = node.roles.replace("s", "")
  kind = known.kind(path, target.module, roles)
  a, b, alpha, scaling = _plain_factors(node)
  magnitude = node.extra["magnitude"] if node.variant in _DORA else None
  modules = []
  for index, name in model.layers(path):
    first, second = factors_to_torch(a[index], b[index], roles, kind)
    norms = None if magnitude is None else magnitude_to_torch(np.asarray(magnitude[index]), kind, first.ndim)
    modules.append(Module(name, kind, first, second, alpha, scaling, norms))
  return modules


def _plain_factors(node: LoraWeight) -> tuple[np.ndarray, np.ndarray, float, str]:
  """A, B, alpha and scaling of plain LoRA on the same base, in dtypes of torch.

  The update of any other variant or initialiser is written as that of its effective factors, with a rank of their own:
  after PiSSA it is twice the node's.
  """
  if node.kind.plain and not (node.extra.keys() - {"magnitude", "norm"}):
    return _torch_array(node.a), _torch_array(node.b), node.alpha, node.scaling
  a, b = map(_torch_array, node.factors())
  return a, b, float(a.shape[node.roles.count("s")]), "standard"


def _torch_array(array: Any) -> np.ndarray:
  """An array in NumPy, and in a dtype that torch computes in."""
  array = np.asarray(array)
  return array if array.dtype.name in ("float64", "float32", "float16", "bfloat16") else array.astype(np.float32)


def _trained_whole(
  model: TorchModel, known: KnownRoles, adapted: Collection[str], heads: Collection[str], problems: list[str]
) -> tuple[dict[str, np.ndarray], str]:
  """The tensors that replace torch's parameters, by name, and the value of PEFT's option `bias` that covers them.

  Args:
    model: of the tree.
    known: roles of the tree.
    adapted: the names of the adapted modules.
    heads: ends of the names of modules that are written whole in any case.
    problems: what is wrong is added to these.
  """
  parameters = model.parameters()
  trained = {
    name: {parameter for parameter, (path, _) in held.items() if isinstance(model.leaves[path], FullWeight)}
    for name, held in parameters.items()
  }
  for group in joined_names(model.targets, model.layers):  # PEFT saves the one module that they are
    which = set().union(*(trained[name] for name in group))
    trained |= {name: which & parameters[name].keys() for name in group}
  problems += [
    f"{path}: PEFT saves modules, and a leaf of this name is none of Flax's. Give names= with a torch name that ends"
    " in .weight or .bias, or merge it into the base (jaxlora.merge)"
    for path, target in model.targets.items()
    if isinstance(model.leaves[path], FullWeight) and target.parameter is None
  ]
  bias_alone = {name for name, which in trained.items() if which == {"bias"} and "weight" in parameters[name]}
  saved = {name for name, which in trained.items() if which} - bias_alone
  saved |= {name for name in set(parameters) - set(adapted) if module_saved_with(name, heads)}
  # PEFT goes by the ends of names: a module that is called like a saved one is saved, too, with the base's values.
  saved |= {name for name in set(parameters) - set(adapted) if any(name.endswith(other) for other in saved)}
  replaced = [(name, parameter) for name in saved for parameter in parameters[name]]
  replaced += [(name, "bias") for name in bias_alone - saved]
  whole = {
    f"{name}.{parameter}": tensor
    for name, parameter in sorted(replaced)
    if (tensor := _torch_tensor(*parameters[name][parameter], name, parameter, model, known, problems)) is not None
  }
  bias = "all" if bias_alone - saved - set(adapted) else "lora_only" if bias_alone - saved else "none"
  return whole, bias


def _torch_tensor(
  path: str,
  index: tuple[int, ...],
  name: str,
  parameter: str,
  model: TorchModel,
  known: KnownRoles,
  problems: list[str],
) -> np.ndarray | None:
  """The value of one torch parameter: of the leaf at `path`, at an index along its stacked axes."""
  leaf = model.leaves[path]
  value = leaf.value if isinstance(leaf, FullWeight) else leaf
  if value is None or isinstance(value, (LoraWeight, jax.ShapeDtypeStruct)):
    problems.append(
      f"{path}: its value is needed, as PEFT saves whole modules, and {name} is one of those. Pass the whole tree, with"
      " the base's values; or, where it is the head of the task_type, leave that out"
    )
    return None
  value = np.moveaxis(np.asarray(value), model.stacks[path], range(len(index)))[index]
  return layer_to_torch(path, name, parameter, value, known, problems)


def layer_to_torch(
  path: str, name: str, parameter: str, value: np.ndarray, known: KnownRoles, problems: list[str]
) -> np.ndarray | None:
  """The value of one torch parameter of the module `name`: of one layer of the leaf at `path`."""
  value = _torch_array(value)
  if parameter == "bias":
    return value.reshape(-1)
  try:
    roles = roles_of_layer(path, value.shape, known)
  except ValueError as error:
    problems.append(f"{path}: {error}")
    return None
  return weight_to_torch(value, roles, known.kind(path, name, roles), known.stores_inputs_first(name))
