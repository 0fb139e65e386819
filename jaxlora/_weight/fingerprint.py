"""A digest of every leaf of a base, computed where the leaf lies."""

from collections.abc import Sequence
import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlora._base.coded import is_coded
from jaxlora._base.digests import digest, dispatched_digest
from jaxlora._base.paths import flatten
from jaxlora._weight.tree import base_tree


def fingerprint(params: Any) -> dict[str, str]:
  """A digest of every leaf of a tree of parameters, by which a checkpoint recognises its base.

      h_lane = sum_k mix(word_k ^ place_k(lane)) mod 2^32,    two lanes

  The words are the bits of the elements, the place is mixed from an element's index along every axis, and `mix` is the
  finaliser of MurmurHash3, a bijection of 32-bit words. So every bit of every element counts: where one element
  changes the digest always does, and any other two leaves agree with a chance of 2^-64. It tells bases apart and is no
  defence against forgery. The sum is of integers: exact in any order, hence the same on
  every device, under every sharding, and for NumPy and JAX arrays of the same bits.

  The cost is one pass over each leaf on the devices that hold it (a reduction: no copy, no gather, 8 bytes come back),
  and one small compilation per shape, dtype and sharding; NumPy arrays, and leaves of a few kilobytes, are read by
  NumPy, in pieces. The digests of JAX arrays, which never change, are remembered for as long as the arrays live: a loop
  that keeps its base pays once.

  Args:
    params: any pytree; of an adapted tree, its base counts, of a quantised leaf its codes and scales. Arrays of any
      dtype, random keys, numbers; `jax.ShapeDtypeStruct`s have no values and get no digest.

  Returns:
    path -> `"dtype[shape]:digest"`, as in `{"dense/kernel": "float32[16,8]:0f3c..."}`.

  Example:
    >>> import jax.numpy as jnp
    >>> one, other = fingerprint({"w": jnp.zeros((2, 3))}), fingerprint({"w": jnp.ones((2, 3))})
    >>> one["w"].split(":")[0], one == other
    ('float32[2,3]', False)
  """
  return {path: str(leaf) for path, leaf in prints(params).items()}


class Print(NamedTuple):
  """Dtype, shape and digest of a leaf; the digest is empty for a leaf without values."""

  dtype: str
  shape: tuple[int, ...]
  digest: str

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.shape))}]" + f":{self.digest}" * bool(self.digest)


def prints(params: Any) -> dict[str, Print]:
  """The digests by path. All are dispatched to their devices before the first result is waited for."""
  leaves, _ = flatten(base_tree(params), is_leaf=is_coded)
  parts = {path: jax.tree.leaves(leaf) if is_coded(leaf) else [leaf] for path, leaf in leaves}
  dispatched = {path: [dispatched_digest(part) for part in held] for path, held in parts.items()}
  found = {}
  for path, leaf in leaves:
    digests = [digest(*pair) for pair in zip(parts[path], dispatched[path], strict=True)]
    found[path] = Print(dtype_name(leaf), shape_of(leaf), _of_codes(leaf, digests) if is_coded(leaf) else digests[0])
  return found


def _of_codes(leaf: Any, digests: Sequence[str]) -> str:
  """The digest of a quantised leaf: of its parts, and of the format that says what they stand for."""
  if not all(digests):
    return ""
  text = " ".join([type(leaf).__name__, str(getattr(leaf, "format", "")), *digests])
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def shape_of(leaf: Any) -> tuple[int, ...]:
  return tuple(leaf.shape) if hasattr(leaf, "shape") else ()


def dtype_name(leaf: Any) -> str:
  """`"bfloat16"`, `"key<fry>"` for random keys, and the name of the type for anything that is no array."""
  if hasattr(leaf, "dtype"):
    return str(leaf.dtype)
  return np.asarray(leaf).dtype.name if isinstance(leaf, bool | int | float | complex) else type(leaf).__name__
