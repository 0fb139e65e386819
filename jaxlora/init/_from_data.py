"""`init_from_data`: factors that start along the inputs of their weight, or along its gradient."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jaxlora._base.checks import is_known
from jaxlora._base.keys import typed_key
from jaxlora._base.matrix import frobenius
from jaxlora._base.paths import flatten
from jaxlora._weight.matrices import thin
from jaxlora._weight.placement import beside_its_base
from jaxlora._weight.tree import map_adapted
from jaxlora._weight.variant import TOKENS
from jaxlora._weight.weight import LoraWeight, is_leaf_node
from jaxlora.init._eva import eva
from jaxlora.init._lora_ga import lora_ga
from jaxlora.init._options import Options
from jaxlora.svd._update import delta_svd, lora_leaves

METHODS = ("eva", "lora_ga")

ON_MISSING = ("error", "keep")

_ZERO = 1e-3  # relative to its factors' norms; an update above it was trained


def init_from_data(
  tree: Any,
  fn: Callable[[Any, Any], Any],
  batches: Iterable[Any],
  key: jax.Array,
  *,
  method: str = "eva",
  rho: float = 1.0,
  gamma: float = 16.0,
  oversample: int = 10,
  iterations: int = 2,
  on_missing: str = "error",
) -> Any:
  """Starts the factors of an adapted tree from data; the adapted model still equals the base.

  Methods:
    `"eva"`: A is the directions in which the inputs of a weight vary most, B is zero.

          X = U S V^T over all inputs X of the weight;    A = V[:, :rank]^T

      The decomposition is incremental: that of each batch, by subspace iteration inside the forward pass, is merged
      into that of those before it. With `rho > 1` the ranks are allocated anew by explained variance, up to `rho` times
      a leaf's own, their sum and every scale unchanged. (Paischer et al., "One Initialization to Rule them All:
      Fine-tuning via Explained Variance Adaptation", 2024, arXiv:2410.07170, section 3. The inputs are not centred.)
    `"lora_ga"`: the first step of the adapter is, at its rank, that of full fine-tuning.

          dL/dW = U S V^T (in x out);  A = c U[:, :rank]^T,  B = c V[:, rank : 2 rank]^T,  c = out^(1/4) / sqrt(gamma)

      Frozen copies of these factors subtract A B again. The gradient is never formed: a randomised decomposition needs
      it times thin matrices, which is what the gradients of A and of B are. (Wang et al., "LoRA-GA: Low-Rank Adaptation
      with Gradient Approximation", 2024, arXiv:2407.05000, algorithm 1.)

  Args:
    tree: what `adapt` returned, not trained yet: any init, and a variant whose factors are A and B themselves.
    fn: `(params, batch) -> output`, as one would write it for plain parameters; for `"lora_ga"` the scalar loss.
    batches: batches of one structure, such as a list of arrays. `"eva"` goes through them once; `"lora_ga"`
      `2 + 2 * iterations` times, so that it takes no iterator.
    key: a random key, typed or raw uint32.
    method: `"eva"` or `"lora_ga"`.
    rho: for `"eva"`: the largest rank of a leaf, over its own; 1 leaves the ranks as they are.
    gamma: for `"lora_ga"`: the paper's gamma, which makes the start smaller.
    oversample: rows of a sketch beyond the rank that is looked for.
    iterations: steps of subspace iteration; more are nearer to the exact decomposition where the spectrum is flat.
    on_missing: what to do with leaves whose input no product shows (`"eva"`: lookups, weights that are materialised,
      loops of unknown length), or whose gradient is zero (`"lora_ga"`): `"error"`, or `"keep"` their start.

  Returns:
    The tree with new factors; with `rho > 1` also new ranks, and alphas that leave the scales as they are.

  Raises:
    ValueError: on an unknown option, without a batch, on a tree that is trained, on a leaf that the method cannot
      start, naming it with the reason; where inputs or gradients are not finite.
    TypeError: if `key` is no random key, or `fn` no function.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
    >>> params = {"up": jnp.ones((6, 8)), "down": jnp.ones((8, 3))}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets=".*"), jax.random.key(0))
    >>> batches = [jax.random.normal(jax.random.key(k), (16, 6)) for k in range(3)]
    >>> tree = jaxlora.init_from_data(tree, fn, batches, jax.random.key(1))
    >>> bool(jnp.allclose(tree["up"].a @ tree["up"].a.T, jnp.eye(2), atol=1e-5))
    True
  """
  if method not in METHODS:
    raise ValueError(f"init_from_data: method is {method!r}, expected one of {', '.join(map(repr, METHODS))}.")
  if on_missing not in ON_MISSING:
    raise ValueError(f"init_from_data: on_missing is {on_missing!r}, expected 'error' or 'keep'.")
  if not callable(fn):
    raise TypeError(f"init_from_data: fn is {fn!r}, expected a function of (params, batch).")
  if not rho >= 1 or not gamma > 0 or oversample < 0 or iterations < 0:
    raise ValueError(
      f"init_from_data: found rho={rho}, gamma={gamma}, oversample={oversample}, iterations={iterations}; expected"
      " rho >= 1, gamma > 0, and neither of the others below 0."
    )
  if method == "lora_ga" and isinstance(batches, Iterator):
    raise ValueError(
      f"init_from_data: batches is a {type(batches).__name__}, which can be gone through once; 'lora_ga' does so"
      f" {2 + 2 * iterations} times. Pass a list."
    )
  key = typed_key(key, "init_from_data: key")
  options = Options(fn, batches, key, rho, gamma, oversample, iterations, on_missing == "keep")
  weights = {path: node for path, node in lora_leaves(tree, "init_from_data", linear=False) if node.variant != TOKENS}
  for path, weight in weights.items():
    _check_fresh(path, weight)
  seen = map_adapted(lambda node: node.materialize() if node.variant == TOKENS else node, _same, _same, tree)
  new = (eva if method == "eva" else lora_ga)(seen, weights, options)
  nodes, treedef = flatten(tree, is_leaf=is_leaf_node)
  return jax.tree_util.tree_unflatten(
    treedef, [beside_its_base(new[path]) if path in new else node for path, node in nodes]
  )


def _same(node: Any) -> Any:
  return node


def _check_fresh(path: str, weight: LoraWeight) -> None:
  if not weight.kind.plain:
    raise ValueError(
      f"init_from_data: {path} is of variant {weight.variant!r}, whose factors are not A and B themselves; expected"
      " 'lora', 'lora_fa' or 'dora'."
    )
  if not is_known(*jax.tree.leaves(weight)):
    raise ValueError(f"init_from_data: {path} is traced; call init_from_data outside jit.")
  norms = [frobenius(thin(x, weight.roles), 3) for x in weight.factors()]
  if float(frobenius(delta_svd(weight).s.ravel())) > _ZERO * float(norms[0] * norms[1]):
    raise ValueError(
      f"init_from_data: {path} has an update already; a new start would throw away what it learned. Start from a fresh"
      " tree (jaxlora.adapt)."
    )
