"""Nodes in the signature of an exported function: `jax.export` writes down which type they have, and what is static."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import json
from typing import Any

from jax import export


def serialised_dataclass(kind: Any) -> Any:
  """Registers a dataclass that is a pytree node, under the name that a process which loads the function looks it up by.

  What is static is written as JSON by field, so that a field can be added later on.
  """
  fields = dataclasses.fields(kind)
  static = [field.name for field in fields if field.metadata.get("static")]
  data = [field.name for field in fields if not field.metadata.get("static")]

  def node(aux: Sequence[Any], children: Sequence[Any]) -> Any:
    return kind(**dict(zip(static, aux, strict=True)), **dict(zip(data, children, strict=True)))

  def written(aux: Sequence[Any]) -> bytes:
    return json.dumps(dict(zip(static, aux, strict=True))).encode()

  def read(text: bytes) -> tuple[Any, ...]:
    found = json.loads(text)
    return tuple(found[name] for name in static)

  return serialised(kind, written, read, node)


def serialised(kind: Any, written: Callable[[Any], bytes], read: Callable[[Any], Any], node: Any) -> Any:
  """Registers a pytree node: how its static part is written and read, and how a node is made of that and children."""
  with contextlib.suppress(ValueError):  # the library was imported a second time in one process
    export.register_pytree_node_serialization(
      kind,
      serialized_name=f"jaxlora.{kind.__name__}",
      serialize_auxdata=written,
      deserialize_auxdata=read,
      from_children=node,
    )
  return kind
