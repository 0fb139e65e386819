"""A digest of one array, computed where it lies; what it is made of, `fingerprint` of a base says.

Reading order: the digest -> lanes -> words.
"""

from typing import Any
import weakref

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.memory import Space, on_device, space_of

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: consecutive multiples of it are far apart

_LANES = np.array([0x243F6A88, 0x85A308D3], np.uint32)  # the first digits of pi

_PIECE = 1 << 20  # elements of a NumPy array at a time
_SMALL = 1 << 15  # bytes that are read sooner than a program for their shape is compiled


def digest_of(array: Any) -> str:
  """The digest of one array, of NumPy's or JAX's, computed where it lies."""
  return digest(array, dispatched_digest(array))


def digest(leaf: Any, lanes: Any) -> str:
  """The digest of a leaf from what was dispatched for it; remembered for as long as the leaf lives."""
  text = lanes if isinstance(lanes, str) else "".join(f"{int(lane):08x}" for lane in np.asarray(lanes))
  _remember(leaf, text)
  return text


_known: dict[int, tuple[weakref.ref, str]] = {}  # by identity: JAX arrays have no hash


def _remember(leaf: Any, digest: str) -> None:
  if isinstance(leaf, jax.Array) and id(leaf) not in _known:
    place = id(leaf)
    _known[place] = weakref.ref(leaf, lambda _: _known.pop(place, None)), digest


def dispatched_digest(leaf: Any) -> Any:
  """The digest where it is known, or the lanes, being computed on the leaf's devices; empty without values."""
  if isinstance(leaf, jax.Array):
    known = _known.get(id(leaf))
    if known is not None and known[0]() is leaf:
      return known[1]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    # What rests with the host may be too large for the device; what is small is here before a program is compiled.
    if leaf.is_fully_addressable and (space_of(leaf) == Space.Host or leaf.nbytes <= _SMALL):
      return _host_lanes(np.asarray(leaf))
    leaf = on_device(leaf)
    # The lanes are an argument: XLA would fold constant ones into an array of places of the leaf's size.
    with jax.enable_x64(leaf.dtype.itemsize >= 8 or jax.config.read("jax_enable_x64")):
      return _device_lanes(leaf, _LANES)
  if isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex):
    return _host_lanes(np.asarray(leaf))
  return ""


@jax.jit
def _device_lanes(x: jax.Array, lanes: Any) -> jax.Array:
  return jnp.stack([_lane(jnp, _words(x), lane) for lane in lanes])


def _host_lanes(x: np.ndarray) -> np.ndarray:
  """The lanes of a NumPy array, by NumPy, piece by piece: nothing is compiled, the leaf is not copied."""
  lanes = np.zeros(len(_LANES), np.uint32)
  rows = max(1, _PIECE // max(1, x[:1].size)) if x.ndim else 1
  for start in range(0, len(x), rows) if x.ndim else (0,):
    words = _host_words(x[start : start + rows] if x.ndim else x)
    with np.errstate(over="ignore"):  # NumPy warns of scalars alone
      lanes += np.stack([_lane(np, words, lane, start) for lane in _LANES])
  return lanes


def _lane(xp: Any, words: Any, lane: Any, start: int = 0) -> Any:
  return xp.sum(_mix(words ^ _places(xp, words.shape, lane, start)), dtype=np.uint32)


def _mix(x: Any) -> Any:
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
  return x ^ (x >> np.uint32(16))


def _places(xp: Any, shape: tuple[int, ...], lane: Any, start: int) -> Any:
  """A word for each element's place, mixed axis by axis: flat indices would wrap at 2^32 and reshape sharded axes."""
  places = xp.reshape(lane, (1,) * len(shape))
  for axis, size in enumerate(shape):
    index = xp.arange(1, size + 1, dtype=np.uint32) + np.uint32(0 if axis else start)
    places = _mix(places ^ xp.expand_dims(index * np.uint32(_GOLDEN), [d for d in range(len(shape)) if d != axis]))
  return places


def _words(x: jax.Array) -> jax.Array:
  """The bits of an array as uint32, with a trailing axis where an element takes several words, the low one first."""
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    parts = [_words(jnp.real(x)), _words(jnp.imag(x))]
    return jnp.stack(parts, -1) if x.dtype.itemsize == 8 else jnp.concatenate(parts, -1)
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  if _bits(x.dtype) < 8:  # every value of these is one of float32's
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _host_words(x: np.ndarray) -> np.ndarray:
  """The same words of a NumPy array."""
  if x.dtype.itemsize > 4:
    words = np.frombuffer(x.astype(x.dtype.newbyteorder("<")).tobytes(), np.dtype("<u4"))
    return words.astype(np.uint32).reshape(*x.shape, x.dtype.itemsize // 4)
  if x.dtype != np.bool_ and _bits(x.dtype) < 8:
    x = x.astype(np.float32)
  native = np.array(x, x.dtype.newbyteorder("=") if x.dtype.isbuiltin == 1 else x.dtype, order="C")
  return native.view(f"u{native.dtype.itemsize}").astype(np.uint32)


def _bits(dtype: Any) -> int:
  return int((jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits)
