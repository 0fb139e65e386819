"""`register_variant`: a user's own variant, in one record."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._weight.family import FAMILY
from jaxlora._weight.start import Start, over_outputs
from jaxlora._weight.variant import VARIANTS, Shapes, Variant, is_variant

LABELS = ("a", "b", "magnitude")  # those that `labels` gives to low-rank weights


class _Registered(Mapping[str, Variant]):
  """The variants that `LoraConfig(variant=...)` takes, by name; read-only, `register_variant` adds one."""

  def __getitem__(self, name: str) -> Variant:
    return VARIANTS[name]

  def __iter__(self) -> Iterator[str]:
    return iter(VARIANTS)

  def __len__(self) -> int:
    return len(VARIANTS)

  def __repr__(self) -> str:
    return f"<variants {', '.join(VARIANTS)}>"


variants = _Registered()
"""The variants that `LoraConfig(variant=...)` takes, by name; read-only, `register_variant` adds one."""

_TRIAL = (6, 4), "io", 2  # shape, roles and rank of the weight that a new record is tried on


def register_variant(name: str, variant: Variant) -> None:
  """Adds a variant under the name that `LoraConfig(variant=...)` takes.

      W' = gain * (W + scale * sum_r A[..., r, in] B[..., r, out]),    (A, B) = factors(parts)

  The record is tried on a small weight, abstractly: nothing is computed. From then on the variant is adapted, wrapped,
  split, merged, saved and served as the library's own are; a process that loads a checkpoint of it registers it first.

  Args:
    name: a new name.
    variant: its record; that of an existing one (`jaxlora.variants["lora"]`) is a good start.

  Raises:
    ValueError: if the name is taken, or a field of the record contradicts another, naming the field, what was found and
      what was expected.
    TypeError: if `name` is no string, `variant` no `Variant`, or a field no function.

  Example:
    LoRA with one trained number that gates the whole update:

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> lora = jaxlora.variants["lora"]
    >>> gated = jaxlora.Variant(
    ...   trains={**lora.trains, "gate": "magnitude"},
    ...   shapes=lambda shape, roles, rank: {**lora.shapes(shape, roles, rank), "gate": ()},
    ...   start=lambda start: {**lora.start(start), "gate": start.full((), 1.0)},
    ...   factors=lambda parts, roles: (parts["a"], parts["gate"] * parts["b"]),
    ... )
    >>> jaxlora.register_variant("gated", gated)
    >>> params, x = {"kernel": jnp.ones((6, 5))}, jnp.ones((2, 6))
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, variant="gated"), jax.random.key(0))
    >>> tree["kernel"]
    LoraWeight(6x5 io, rank 2, f32, gated)
    >>> apply = lambda params, x: x @ params["kernel"]
    >>> tree = jax.tree.map(lambda leaf: leaf + 0.5, tree)  # as if trained
    >>> bool(jnp.allclose(jaxlora.wrap(apply)(tree, x), apply(jaxlora.merge(tree), x), rtol=1e-5))
    True
    >>> jaxlora.unregister_variant("gated")
  """
  if not isinstance(name, str) or not name:
    raise TypeError(f"register_variant: name is {name!r}, expected a non-empty string.")
  if is_variant(name):
    raise ValueError(f"register_variant: {name!r} is registered already; expected a new name.")
  if not isinstance(variant, Variant):
    raise TypeError(f"register_variant: {name!r} is {variant!r}, expected a jaxlora.Variant.")
  _check_record(f"register_variant: {name!r}", variant)
  VARIANTS[name] = variant


def unregister_variant(name: str) -> None:
  """Removes a variant that `register_variant` added, as where a notebook's cell runs again with another record.

  Functions compiled for trees of that variant keep the record that they were compiled with.

  Raises:
    ValueError: if no user registered that name.
  """
  if name in FAMILY or name not in VARIANTS:
    raise ValueError(
      f"unregister_variant: found {name!r}, expected one that register_variant added:"
      f" {', '.join(repr(own) for own in VARIANTS if own not in FAMILY) or 'there is none'}."
    )
  del VARIANTS[name]


def _check_record(what: str, variant: Variant) -> None:
  for field in ("shapes", "start", "factors", "gain"):
    function = getattr(variant, field)
    if not callable(function) and not (field == "gain" and function is None):
      raise TypeError(f"{what}: {field} is {function!r}, expected a function.")
  (shape, roles, rank), base = _TRIAL, jax.ShapeDtypeStruct(_TRIAL[0], jnp.float32)
  shapes = variant.shapes(shape, roles, rank)
  _check_names(what, variant.trains, shapes)
  held = jax.eval_shape(lambda base: _started(variant, base), base)
  found = {part: tuple(array.shape) for part, array in held.items()}
  if found != shapes:
    raise ValueError(f"{what}: start makes parts of the shapes {found}, expected those of its own shapes, {shapes}.")
  a, b = jax.eval_shape(lambda parts: variant.factors(parts, roles), {"base": base, **held})
  if (a.shape[1:], b.shape[1:]) != (shape[:1], shape[1:]) or a.shape[0] != b.shape[0]:
    raise ValueError(
      f"{what}: factors gives shapes {a.shape} and {b.shape} for a {shape[0]} x {shape[1]} weight; expected (r,"
      f" {shape[0]}) and (r, {shape[1]}) with one r."
    )
  if (gain_of := variant.gain) is not None:
    gain = jax.eval_shape(lambda parts, a, b: gain_of(parts, roles, a, b), {"base": base, **held}, a, b)
    if gain.shape != over_outputs(shape, roles):
      raise ValueError(f"{what}: gain has shape {gain.shape}, expected {over_outputs(shape, roles)}, one per output.")


def _check_names(what: str, trains: Mapping[str, str], shapes: Shapes) -> None:
  ranks = [shapes[part][:1] for part in ("a", "b") if part in shapes]
  if ranks != [_TRIAL[2:], _TRIAL[2:]] or "base" in shapes:
    raise ValueError(
      f"{what}: shapes gives {shapes} for rank {_TRIAL[2]}; expected the parts a and b, the rank their first axis, and"
      " no base."
    )
  if not trains or not set(trains) <= set(shapes) or not set(trains.values()) <= set(LABELS):
    raise ValueError(
      f"{what}: trains is {dict(trains)}, expected at least one of the parts {', '.join(shapes)}, each with a label out"
      f" of {', '.join(map(repr, LABELS))}."
    )


def _started(variant: Variant, base: Any) -> dict[str, Any]:
  def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any, fan_in: int, rank: int) -> jax.Array:
    return jnp.zeros(shape, dtype)

  key = jax.random.key(0)
  return dict(variant.start(Start(base, *_TRIAL[1:], base.dtype, key, shared=key, drawn={}, init=zeros)))
