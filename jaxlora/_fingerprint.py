"""What a base is known by: a digest of every leaf, computed where the leaf lies."""

from typing import Any, NamedTuple
import weakref

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import _paths
from jaxlora._weight import is_adapted

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: consecutive multiples of it are far apart
_LANES = (0x243F6A88, 0x85A308D3)  # the first digits of pi


def fingerprint(params: Any) -> dict[str, str]:
  """A digest of every leaf of a tree of parameters: what a checkpoint knows its base by.

      h_lane = sum_k mix(word_k ^ place_k(lane)) mod 2^32,    two lanes

  The words are the bits of the elements, the place is mixed from an element's index along every axis, and `mix` is the
  finaliser of MurmurHash3, a bijection of 32-bit words. So every bit of every element counts, and one element that
  changes always changes the digest; two leaves that differ elsewhere agree with a chance of 2^-64. It tells bases
  apart, it is no defence against someone who forges one. The sum is of integers: exact in any order, hence the same on
  every device, under every sharding, and for NumPy and JAX arrays of the same bits.

  The cost is one pass over each leaf on the devices that hold it (a reduction: no copy, no gather, 8 bytes come back),
  and one small compilation per shape, dtype and sharding. The digests of JAX arrays, which never change, are
  remembered for as long as the arrays live, so that a training loop that keeps its base pays once.

  Args:
    params: any pytree; of an adapted tree, its base counts. Arrays of any dtype, random keys, numbers;
      `jax.ShapeDtypeStruct`s have no values and get no digest.

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
  """What is known of a leaf; the digest is empty for a leaf without values."""

  dtype: str
  shape: tuple[int, ...]
  digest: str

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.shape))}]" + f":{self.digest}" * bool(self.digest)


def prints(params: Any) -> dict[str, Print]:
  """The digests by path. All are under way before the first is waited for."""
  leaves, _ = _paths.flatten(base_of(params))
  started = [(path, leaf, _started(leaf)) for path, leaf in leaves]
  found = {}
  for path, leaf, lanes in started:
    digest = lanes if isinstance(lanes, str) else "".join(f"{int(lane):08x}" for lane in np.asarray(lanes))
    _remember(leaf, digest)
    found[path] = Print(dtype_name(leaf), shape_of(leaf), digest)
  return found


def base_of(tree: Any) -> Any:
  """The tree with the bases of adapted nodes in their places."""
  return jax.tree_util.tree_map(lambda node: node.base if is_adapted(node) else node, tree, is_leaf=is_adapted)


def shape_of(leaf: Any) -> tuple[int, ...]:
  return tuple(leaf.shape) if hasattr(leaf, "shape") else ()


def dtype_name(leaf: Any) -> str:
  """`"bfloat16"`, `"key<fry>"` for random keys, and for what is no array the type's name."""
  if hasattr(leaf, "dtype"):
    return str(leaf.dtype)
  return np.asarray(leaf).dtype.name if isinstance(leaf, bool | int | float | complex) else type(leaf).__name__


# ----------------------------------------------------------------------------------------------------------------------
# The digest of one leaf.

_known: dict[int, tuple[weakref.ref, str]] = {}  # by identity: JAX arrays have no hash


def _remember(leaf: Any, digest: str) -> None:
  if isinstance(leaf, jax.Array) and id(leaf) not in _known:
    place = id(leaf)
    _known[place] = weakref.ref(leaf, lambda _: _known.pop(place, None)), digest


def _started(leaf: Any) -> Any:
  """The digest where it is known, or the lanes, under way on the leaf's devices."""
  if isinstance(leaf, jax.Array):
    known = _known.get(id(leaf))
    if known is not None and known[0]() is leaf:
      return known[1]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    with jax.enable_x64(leaf.dtype.itemsize == 8 or jax.config.jax_enable_x64):
      return _lanes(leaf)
  if isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex):
    return _lanes(_narrow(np.asarray(leaf)))
  return ""


def _lanes(x: Any) -> jax.Array:
  # The lanes are an argument: XLA would fold the places of a constant one into an array of the leaf's size.
  return _lanes_of(x, np.array(_LANES, np.uint32))


@jax.jit
def _lanes_of(x: jax.Array, lanes: jax.Array) -> jax.Array:
  words = _words(x)
  return jnp.stack([jnp.sum(_mix(words ^ _places(words.shape, lane)), dtype=jnp.uint32) for lane in lanes])


def _mix(x: jax.Array) -> jax.Array:
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
  return x ^ (x >> jnp.uint32(16))


def _places(shape: tuple[int, ...], lane: jax.Array) -> jax.Array:
  """A word for each place of an array. Index by index: flat ones would wrap at 2^32 and reshape sharded axes."""
  places = jnp.broadcast_to(lane, (1,) * len(shape))
  for axis, size in enumerate(shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, (1,) * axis + (size,) + (1,) * (len(shape) - axis - 1), axis)
    places = _mix(places ^ ((index + jnp.uint32(1)) * jnp.uint32(_GOLDEN)))
  return places


def _words(x: jax.Array) -> jax.Array:
  """The bits of an array as uint32, with a trailing axis where an element takes several words, the low one first."""
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    parts = [_words(jnp.real(x)), _words(jnp.imag(x))]
    return jnp.stack(parts, -1) if x.dtype.itemsize == 8 else jnp.concatenate(parts, -1)
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  bits = _bits(x.dtype)
  if bits < 8:  # every value of these has a 32-bit float of its own
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  unsigned = {8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _bits(dtype: Any) -> int:
  return int((jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits)


def _narrow(x: np.ndarray) -> np.ndarray:
  """A NumPy array with wide elements taken apart into their words, as JAX may be set to narrow them."""
  if x.dtype.kind != "c" and x.dtype.itemsize <= 4:
    return x
  words = np.frombuffer(x.astype(x.dtype.newbyteorder("<")).tobytes(), np.dtype("<u4"))
  return words.reshape(*x.shape, x.dtype.itemsize // 4)
