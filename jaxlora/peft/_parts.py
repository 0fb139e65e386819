"""Values of `names` where a leaf and a torch module do not hold the same: one leaf of several modules, and the reverse.

They say what becomes of what; `_regroup` does it.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from jaxlora.peft._rows import Order, halves_to_pairs, ordered, pairs_to_halves, positions

Orders = Order | Sequence[Order | None] | None


@dataclasses.dataclass(frozen=True)
class Split:
  r"""A value of `names`: a leaf whose outputs are those of several torch modules, side by side or stacked.

      leaf = [module_0 | module_1 | ...] along its outputs,    module_k: A, and its rows of B

  Saving writes every module with the leaf's A and its rows of B. Loading stacks the modules' As, unless they are equal,
  and puts their Bs in blocks: the ranks add up, and the update is the modules' own. Where the parts lie along an axis
  of their own before the leaf's others, as in Gemma's `kv_einsum` (2, heads, in, width), the roles decide: `"s"` makes
  it one adapter per part, whose ranks stay.

  Attributes:
    modules: the torch modules in the leaf's order: names as elsewhere in `names`, with `\1` and `{}`.
    sizes: outputs of each, in any unit, such as heads. `None` where an axis of the leaf shows that they are equal, or
      where a file is read that holds all of them.
    groups: 1 where the modules lie one behind the other; where they are interleaved, the number of groups that each
      hold a share of all: the heads of a kernel (in, heads, 3, width).
    order: a permutation of the rows of every module, or one or `None` for each, such as `pairs_to_halves(head_size)`.
    scale: where the leaf is a multiple of torch's weight and bias, as queries are that attention does not scale any
      more: the leaf over torch's. Such values are rounded each way.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> from jaxlora.peft import Split, to_modules
    >>> params = {"layers_0": {"qkv": {"kernel": jnp.ones((8, 16))}}}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> modules = tuple(rf"model.layers.\1.self_attn.{name}_proj" for name in "qkv")
    >>> adapter = to_modules(tree, names={r"layers_(\d+)/qkv": Split(modules, sizes=(2, 1, 1))})
    >>> [module.shape for module in adapter.modules.values()]
    [(8, 8), (4, 8), (4, 8)]

  Source: the update of a row of `W + B A` is that row of B times A.
  """

  modules: Sequence[str]
  sizes: Sequence[int] | None = None
  groups: int = 1
  order: Orders = None
  scale: float | None = None

  def __post_init__(self) -> None:
    _check_parts("Split", "modules", self.modules, self)
    if self.scale is not None and not (
      isinstance(self.scale, float | int) and math.isfinite(self.scale) and self.scale
    ):
      raise ValueError(f"Split: scale: found {self.scale!r}, expected a finite number other than 0.")


@dataclasses.dataclass(frozen=True)
class Joined:
  r"""A value of `names`: a leaf that is, with others, one torch module, such as Phi-3's `qkv_proj`.

      module = [leaf_0 | leaf_1 | ...] along its outputs,    leaf_k: A, and its rows of B

  One entry serves all its leaves: each is the part whose name is among its path's components. Loading gives every leaf
  the module's A and its rows of B. Saving stacks the leaves' As, unless they are equal, and puts their Bs in blocks:
  the ranks add up, and the update is the leaves' own.

  Attributes:
    module: the torch module's name, with `\1` and `{}` as elsewhere in `names`.
    parts: the component of each leaf's path that tells which part it is, in torch's order.
    sizes: outputs of each part, in any unit, such as heads. `None` where the tree has the leaves of all parts.
    groups: 1 where the parts lie one behind the other in torch; where they are interleaved, the number of groups that
      each hold a share of all: the heads of GPT-NeoX' `query_key_value`.
    order: a permutation of the rows of every part, or one or `None` for each, such as `pairs_to_halves(head_size)`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> from jaxlora.peft import Joined, to_modules
    >>> params = {"layers_0": {name: {"kernel": jnp.ones((8, 4))} for name in ("gate", "up")}}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> names = {r"layers_(\d+)/(gate|up)": Joined(r"model.layers.\1.mlp.gate_up_proj", ("gate", "up"))}
    >>> {name: (module.shape, module.rank) for name, module in to_modules(tree, names=names).modules.items()}
    {'model.layers.0.mlp.gate_up_proj': ((8, 8), 4)}

  Source: the update of a row of `W + B A` is that row of B times A.
  """

  module: str
  parts: Sequence[str]
  sizes: Sequence[int] | None = None
  groups: int = 1
  order: Orders = None

  def __post_init__(self) -> None:
    if not isinstance(self.module, str):
      raise TypeError(f"Joined: module: found {self.module!r}, expected the name of a torch module.")
    _check_parts("Joined", "parts", self.parts, self)


@dataclasses.dataclass(frozen=True)
class Experts:
  r"""A value of `names`: a leaf of stacked experts that is one parameter in torch, as PEFT's `target_parameters` adapt.

      lora_A = a as (experts * rank, in),    lora_B[o, r * experts + e] = b[e, r, o]

  Stacked leaves called `experts/gate_up_proj`, and `experts/down_proj` beside one, need no entry. A is that of the
  inputs, as PEFT has it with transformers 5; in earlier versions a module that stores its experts as (in, out), such as
  gpt-oss', does not say so to PEFT: set `is_transposed = True` on it before `PeftModel.from_pretrained`.

  Attributes:
    parameter: its name in torch, with `\1` and `{}` as elsewhere in `names`; `{}` is for stacks beside the experts',
      which is the last stacked axis of the leaf.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> from jaxlora.peft import Experts, to_modules
    >>> params = {"layer_0": {"w1": jnp.ones((4, 8, 6))}}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, axes={".*": "sio"}), jax.random.key(0))
    >>> names = {r"layer_(\d)/w1": Experts(r"model.layers.\1.mlp.experts.gate_up_proj")}
    >>> to_modules(tree, names=names).config["target_parameters"]
    ['experts.gate_up_proj']

  Source: `ParamWrapper` in `peft/tuners/lora/layer.py`.
  """

  parameter: str

  def __post_init__(self) -> None:
    if not isinstance(self.parameter, str) or "." not in self.parameter:
      raise TypeError(f"Experts: parameter: found {self.parameter!r}, expected a name such as 'mlp.experts.down_proj'.")


Parts = Split | Joined


def _check_parts(what: str, field: str, parts: Any, record: Parts) -> None:
  if isinstance(parts, str) or not parts or not all(isinstance(part, str) and part for part in parts):
    raise TypeError(f"{what}: {field}: found {parts!r}, expected a sequence of names.")
  if len(set(parts)) < len(parts):
    raise ValueError(f"{what}: {field}: found {tuple(parts)}, expected each name once.")
  sizes, groups, order = record.sizes, record.groups, record.order
  if sizes is not None and not (len(sizes) == len(parts) and all(_is_count(size) for size in sizes)):
    raise ValueError(f"{what}: sizes: found {sizes!r}, expected {len(parts)} whole numbers of at least 1.")
  if not _is_count(groups):
    raise ValueError(f"{what}: groups: found {groups!r}, expected a whole number of at least 1.")
  if order is None or callable(order):
    return
  if len(order) != len(parts) or not all(one is None or callable(one) for one in order):
    raise TypeError(f"{what}: order: found {order!r}, expected a function, or one or None for each of {len(parts)}.")


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def sizes_of(record: Parts, count: int) -> list[int] | None:
  """The outputs of each part of a whole of `count`, by `sizes` or as there is but one; `None` if these do not tell.

  Raises:
    ValueError: if the sizes do not divide the whole.
  """
  number = len(record.modules if isinstance(record, Split) else record.parts)
  units = [1] if number == 1 else record.sizes
  if units is None:
    return None
  if count % sum(units):
    raise ValueError(f"{count} outputs do not fall into parts of sizes {tuple(units)}")
  return [unit * count // sum(units) for unit in units]


def rows_of(record: Parts, sizes: Sequence[int]) -> list[np.ndarray]:
  """For each part the rows of the whole that are its own, in its own order.

  The whole is the leaf of a `Split`, whose parts are torch's modules, and the torch module of a `Joined`, whose parts
  are leaves.

  Raises:
    ValueError: if groups or orders do not fit the sizes.
  """
  found = []
  for k, (place, size) in enumerate(zip(positions(sizes, record.groups), sizes, strict=True)):
    rows = order_of(record, k, size)
    found.append(place[rows] if isinstance(record, Split) else place[np.argsort(rows)])
  return found


def order_of(record: Parts, part: int, count: int) -> np.ndarray:
  """For each of the `count` rows of one part in torch the leaf's row that it is, among those of the part."""
  order = record.order
  return ordered(order if order is None or callable(order) else order[part], count)


_ORDERS = {"pairs_to_halves": pairs_to_halves, "halves_to_pairs": halves_to_pairs}


def names_from_json(found: Any) -> Any:
  """`names` of a JSON file, where an object with `split`, `joined` or `experts` is a `Split`, `Joined` or `Experts`.

  `{"experts": "...experts.down_proj"}`; `{"split": ["...k_proj", "...v_proj"]}`, or
  `{"joined": "...qkv_proj", "parts": ["q", "k", "v"]}`, the last two with `sizes`, `groups` and `order` besides:
  `{"pairs_to_halves": head_size}`, or a list of those and of null. A split may have a `scale`.

  Raises:
    TypeError, ValueError: naming the entry that is neither a name nor one of these.
  """
  if not isinstance(found, Mapping):
    return found  # `check_names` says what was expected
  return {pattern: _value_from_json(pattern, value) for pattern, value in found.items()}


def _value_from_json(pattern: str, value: Any) -> Any:
  if not isinstance(value, dict):
    return value
  if set(value) == {"experts"}:
    return Experts(value["experts"])
  kinds = {"split": (Split, "modules"), "joined": (Joined, "module")}
  kind = next((kind for kind in kinds if kind in value), None)
  fields = {"sizes", "groups", "order", "parts" if kind == "joined" else "scale"}
  if kind is None or set(value) - fields - {kind} or (kind == "joined" and "parts" not in value):
    raise ValueError(
      f"names: {pattern!r}: found {value!r}, expected a torch name, {{'experts': name}}, {{'split': [names], ...}} or"
      " {'joined': name, 'parts': [components], ...}, the last two with 'sizes', 'groups' and 'order' besides."
    )
  record, first = kinds[kind]
  rest = {name: value[name] for name in fields - {"order"} if name in value}
  return record(**{first: value[kind]}, **rest, order=_order_from_json(pattern, value.get("order")))


def _order_from_json(pattern: str, value: Any) -> Orders:
  if value is None:
    return None
  if isinstance(value, list):
    orders = [_order_from_json(pattern, one) for one in value]
    if all(one is None or callable(one) for one in orders):
      return orders  # type: ignore[return-value]
  if isinstance(value, dict) and len(value) == 1:
    ((name, size),) = value.items()
    sizes = size if isinstance(size, list) else [size]
    if name in _ORDERS and len(sizes) in (1, 2) and all(map(_is_count, sizes)):
      return _ORDERS[name](*sizes)
  raise ValueError(
    f"names: {pattern!r}: order: found {value!r}, expected {{'pairs_to_halves': head_size}} or {{'halves_to_pairs':"
    " head_size}, or a list of those and of null, one for each part."
  )
