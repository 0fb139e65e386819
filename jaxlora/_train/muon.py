"""Which axes of the factors are the matrix that Muon makes orthogonal."""

from typing import Any

import optax

from jaxlora._weight.tree import map_adapted
from jaxlora._weight.weight import LoraWeight, parts, trained_parts, with_parts


def muon_dimensions(tree: Any) -> Any:
  """The dimension numbers of factors for `optax.contrib.muon(muon_weight_dimension_numbers=...)`.

      A, (*stack, rank, *in), maps inputs to the rank;    B, (*stack, rank, *out), maps the rank to outputs

  Muon takes a matrix as (inputs, outputs), and what is no matrix goes to Adam. By itself it would take A for a map from
  the rank to the inputs, and scale its update by sqrt(in / rank); give the factors of stacked layers, experts, and of
  kernels with heads to Adam; and make DoRA's magnitudes orthogonal, which are no matrices. These numbers say what is
  what, slice by slice of a stack; magnitudes, vectors and leaves trained whole go to Adam.

  Args:
    tree: a combined tree, its trainable half, or either as an optimizer shows it.

  Returns:
    The tree with a `MuonDimensionNumbers` in the place of each trained factor, and `None` for Adam.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora, optax
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> muon_dimensions(tree)["kernel"].parts()["a"]
    MuonDimensionNumbers(reduction_axis=(1,), output_axis=(0,))
    >>> tx = jaxlora.optimizer(optax.contrib.muon(1e-2, muon_weight_dimension_numbers=muon_dimensions))
    >>> state = tx.init(tree)

  Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Bernstein and Newhouse, "Old
  Optimizer, New Norm", arXiv:2409.20325, on the scale sqrt(out / in).
  """
  return map_adapted(_of_factors, lambda node: with_parts(node, dict.fromkeys(parts(node))), lambda leaf: None, tree)


def _of_factors(node: LoraWeight) -> Any:
  labels = trained_parts(node)
  stack = node.roles.count("s")

  def one(name: str, part: Any) -> Any:
    if labels.get(name) not in ("a", "b") or not hasattr(part, "ndim"):
      return None
    rank, own = (stack,), tuple(range(stack + 1, part.ndim))
    return optax.contrib.MuonDimensionNumbers(*((own, rank) if labels[name] == "a" else (rank, own)))

  return with_parts(node, {name: one(name, part) for name, part in parts(node).items()})
