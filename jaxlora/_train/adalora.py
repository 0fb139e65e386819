"""AdaLoRA's schedule: the sensitivity of each term, and the mask of those that are kept."""

from collections.abc import Sequence
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.paths import flatten
from jaxlora._weight.tree import adapted_leaves
from jaxlora._weight.weight import LoraWeight, is_leaf_node, parts, with_parts


def _pruned_leaves(tree: Any, what: str) -> dict[str, LoraWeight]:
  leaves = {path: node for path, node in adapted_leaves(tree) if getattr(node, "variant", None) == "adalora"}
  if not leaves:
    raise ValueError(
      f"{what}: the tree has no leaf of the variant 'adalora', whose terms can be masked. Adapt with"
      " jaxlora.LoraConfig(variant='adalora')."
    )
  return leaves


def sensitivity(tree: Any, gradients: Any) -> dict[str, jax.Array]:
  """How much each term of each AdaLoRA update matters to the loss.

      S_r = |e_r g(e_r)| + mean_in |a_r g(a_r)| + mean_out |b_r g(b_r)|

  One batch's estimate is noisy; the paper smooths it over steps (eqs. 9-11), which `optax.incremental_update` does.

  Args:
    tree: a combined tree.
    gradients: of its trainable leaves, as `jaxlora.grad` gives them.

  Returns:
    Path -> scores of shape `(*stack, rank)`, for the leaves of the variant `"adalora"`.

  Raises:
    ValueError: if the tree has no such leaf, or the gradients are of another tree, naming the leaf.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> config = jaxlora.LoraConfig(rank=4, variant="adalora")
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((8, 6))}, config, jax.random.key(0))
    >>> grads = jaxlora.grad(lambda t: jaxlora.wrap(lambda p: (jnp.ones((2, 8)) @ p["kernel"]).sum())(t))(tree)
    >>> sensitivity(tree, grads)["kernel"].shape
    (4,)

  Source: Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512,
  eqs. 8 and 12.
  """
  slopes = dict(adapted_leaves(gradients))
  scores = {}
  for path, w in _pruned_leaves(tree, "sensitivity").items():
    slope = slopes.get(path)
    if slope is None or any(parts(slope)[name] is None for name in w.kind.trains):
      raise ValueError(f"sensitivity: no gradients for {path}. Pass what jaxlora.grad gives for this tree.")
    stack = w.roles.count("s")

    def mean(x: jax.Array, g: jax.Array, stack: int = stack) -> jax.Array:
      return jnp.mean(jnp.abs(x * g), axis=tuple(range(stack + 1, x.ndim)))

    held, slopes_of = parts(w), parts(slope)
    scores[path] = functools.reduce(jnp.add, [mean(held[name], slopes_of[name]) for name in ("e", "a", "b")])
  return scores


def prune(tree: Any, scores: dict[str, jax.Array], budget: int) -> Any:
  """Keeps the `budget` terms with the highest scores among all AdaLoRA updates, and masks the others.

  Masked terms take no part in the update; they keep their values, so that a later call with other scores can bring
  them back. No shape changes and nothing recompiles: `budget` may be traced, as a schedule's value is.

  Args:
    tree: a combined tree.
    scores: path -> `(*stack, rank)`, such as `sensitivity` gives.
    budget: how many terms to keep, over all leaves and stacked slices.

  Returns:
    The tree with new masks.

  Raises:
    ValueError: if the tree has no AdaLoRA leaf, or scores are missing or of another shape, naming the leaf.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> config = jaxlora.LoraConfig(rank=4, variant="adalora")
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((8, 6))}, config, jax.random.key(0))
    >>> prune(tree, {"kernel": jnp.asarray([3.0, 1.0, 2.0, 0.0])}, budget=2)["kernel"].extra["keep"]
    Array([1., 0., 1., 0.], dtype=float32)

  Source: Zhang et al., arXiv:2303.10512, eq. 6.
  """
  leaves = _pruned_leaves(tree, "prune")
  for path, w in leaves.items():
    found = jnp.shape(scores[path]) if path in scores else "none"
    expected = jnp.shape(w.extra["keep"])
    if found != expected:
      raise ValueError(
        f"prune: scores of {path}: found {found}, expected an array of shape {expected}. Pass what jaxlora.sensitivity"
        " gives for this tree."
      )
  kept = _highest([scores[path] for path in leaves], budget)
  masks = {path: mask.astype(w.extra["keep"].dtype) for (path, w), mask in zip(leaves.items(), kept, strict=True)}
  nodes, treedef = flatten(tree, is_leaf=is_leaf_node)
  new = [with_parts(node, {"keep": masks[path]}) if path in masks else node for path, node in nodes]
  return jax.tree_util.tree_unflatten(treedef, new)


def _highest(scores: Sequence[jax.Array], count: Any) -> list[jax.Array]:
  """Masks of the `count` highest of all scores; of equal scores the first."""
  flat = jnp.concatenate([jnp.ravel(score) for score in scores])
  places = jnp.argsort(jnp.argsort(-flat, stable=True), stable=True)
  chosen = jnp.split(places < count, list(itertools.accumulate(score.size for score in scores))[:-1])
  return [part.reshape(score.shape) for part, score in zip(chosen, scores, strict=True)]
