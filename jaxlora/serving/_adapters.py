"""One adapter in a bank's form."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxlora._base.paths import flatten
from jaxlora._base.text import listed
from jaxlora._weight.fingerprint import prints
from jaxlora._weight.tree import adapted_leaves, is_half_leaf
from jaxlora._weight.weight import LoraWeight, is_adapted, parts
from jaxlora.serving._slots import OTHER_BASE, padded


def check_name(name: Any) -> None:
  if not isinstance(name, str):
    raise TypeError(f"an adapter's name is a string; found {name!r}.")


def adapter_nodes(adapter: Any, what: str) -> tuple[dict[str, Any], Any]:
  """What an adapter has at its leaves, and the nesting of its tree."""
  nodes, treedef = flatten(adapter, is_leaf=is_half_leaf)
  own = {path: node for path, node in nodes if is_adapted(node)}
  if not own:
    raise ValueError(
      f"{what} has no adapted leaf; expected the trainable half that jaxlora.split gives, or what jaxlora.adapt gave."
    )
  for path, node in own.items():
    half = any(part is None for part in parts(node).values())
    if half and isinstance(node, LoraWeight) and (node.variant != "lora" or node.extra):
      raise ValueError(
        f"{what}: {path}: an adapter of the variant {node.variant!r} has parts that are frozen, in the other half. Pass"
        " the whole tree, jaxlora.join(frozen, trainable)."
      )
    if missing := [name for name, part in parts(node).items() if part is None and name != "base"]:
      raise ValueError(
        f"{what}: {path}: {', '.join(missing)} missing: this is the frozen half of a tree. Pass the trainable one:"
        " frozen, trainable = jaxlora.split(tree)."
      )
  return {path: _as_lora(node, f"{what}: {path}") for path, node in own.items()}, treedef


def _as_lora(node: Any, what: str) -> Any:
  """A variant's weight as the plain LoRA that it comes to; raises where it comes to none."""
  if not isinstance(node, LoraWeight) or (node.variant == "lora" and not node.extra):
    return node
  if not node.kind.linear:
    raise ValueError(
      f"{what}: the variant {node.variant!r} scales the outputs of base and update alike, which no pair of factors"
      " beside the base can do. Merge that adapter (jaxlora.merge), or train one of another variant."
    )
  a, b = node.factors()
  return LoraWeight.from_factors(node.base, a, b, node.roles, sure=node.sure)


def check_nesting(found: Any, expected: Any, what: str, of: str) -> None:
  if found != expected:
    raise ValueError(
      f"{what}: the tree is nested otherwise than {of}: {found}, expected {expected}. Adapters of one bank are made for"
      " one base: adapt the same parameters."
    )


def joint_base(known: Mapping[str, str], adapter: Any, what: str) -> dict[str, str]:
  """What is known of a bank's base with what an adapter brings; raises if that is another base."""
  if all(node.base is None for _, node in adapted_leaves(adapter)):
    return dict(known)  # a trainable half
  return {**known, **digests(known, adapter, what)}


def digests(known: Mapping[str, str], tree: Any, what: str) -> dict[str, str]:
  """The digests of a base; raises if they are others than those that are known, naming the leaves."""
  found = {path: str(leaf) for path, leaf in prints(tree).items() if leaf.digest}
  if others := [path for path in found if known.get(path, found[path]) != found[path]]:
    raise ValueError(f"{what}: the base is another one than the bank's, in {listed(others)}. {OTHER_BASE}")
  return found


def pad(tree: Any, rank: int | None = None) -> Any:
  """The same adapter at another, higher rank and at scale 1: adapters of one shape then have one structure.

      A -> [A; 0],   B -> [scale * B; 0],   alpha -> rank

  A weight's rank and alpha are static, so that a compiled function takes no other ones. Padded to one rank, adapters of
  any alpha and any lower rank are served by the same compiled function: `jaxlora.join(frozen, jaxlora.pad(half, 16))`.

  Args:
    tree: a combined tree, or the trainable half that `split` gives.
    rank: of every adapted weight afterwards; `None` keeps each one's, and folds the scales alone.

  Returns:
    The tree, without dropout, which is for training.

  Raises:
    ValueError: if a weight's rank is higher already, naming the leaf, or if nothing is adapted.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, alpha=8), jax.random.key(0))
    >>> jaxlora.pad(tree, 3)["kernel"].b.shape, jaxlora.pad(tree, 3)["kernel"].scale
    ((3, 3), 1.0)
  """
  if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
    raise ValueError(f"pad: rank is {rank!r}, expected a whole number above 0, or None.")
  own, treedef = adapter_nodes(tree, "pad: the tree")
  for path, node in own.items():
    if rank is not None and isinstance(node, LoraWeight) and node.rank > rank:
      raise ValueError(f"pad: {path}: rank {node.rank} is above {rank}. Pad to at least the highest rank of the tree.")

  def one(path: str, node: Any) -> Any:
    if not isinstance(own.get(path), LoraWeight):
      return node
    weight = own[path]
    a, b = padded(weight, weight.rank if rank is None else rank)
    return LoraWeight.from_factors(weight.base, a, b, weight.roles, sure=weight.sure)

  nodes, _ = flatten(tree, is_leaf=is_half_leaf)
  return jax.tree.unflatten(treedef, [one(path, node) for path, node in nodes])
