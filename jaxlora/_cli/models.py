"""Models that a command is given as `module:function`: imported, called, and adapted where they are not."""

from collections.abc import Callable, Mapping
import importlib
import json
from pathlib import Path
import sys
import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora._adapt.adapt import adapt
from jaxlora._adapt.config import LoraConfig
from jaxlora._base.paths import flatten
from jaxlora._cli.result import BadFile
from jaxlora._weight.weight import is_adapted, is_leaf_node

_RANK = 8
_EXPECTED = "expected a function of no argument that returns (function, parameters, *arguments)"


class Model(NamedTuple):
  """What `module:function` returned.

  Attributes:
    fn: the function of the parameters and of `args`; None where parameters came alone.
    tree: the parameters, adapted.
    args: the function's other arguments.
  """

  fn: Callable[..., Any] | None
  tree: Any
  args: tuple[Any, ...]


def model_of(options: Any) -> Model:
  """The model that MODEL names, adapted as the options say where it is not."""
  found = _called(options.model)
  whole = isinstance(found, tuple) and len(found) >= 2 and callable(found[0])
  fn, tree, *args = found if whole else (None, found)
  fields = _fields(options)
  if any(is_adapted(node) for _, node in flatten(tree, is_leaf=is_leaf_node)[0]):
    if fields:
      raise BadFile(f"{options.model}: its parameters are adapted; expected plain ones beside --{min(fields)}.")
    return Model(fn, tree, tuple(args))
  config = LoraConfig.from_dict({"rank": _RANK, **fields})
  probe = None if fn is None else lambda params: fn(params, *_in_a_trace(args))
  return Model(fn, adapt(tree, config, jax.random.key(0), probe=probe), tuple(args))


def _called(name: str) -> Any:
  """What the function returns."""
  module, colon, function = name.partition(":")
  if not (module and colon and function):
    raise BadFile(f"{name}: found no module:function; {_EXPECTED}, such as mymodels.gpt:small.")
  if "" not in sys.path and str(Path.cwd()) not in sys.path:
    sys.path.insert(0, str(Path.cwd()))  # as python -m has it
  try:
    build = importlib.import_module(module)
    for part in function.split("."):
      build = getattr(build, part)
    return build()  # type: ignore[operator]
  except Exception as error:
    *_, last = traceback.extract_tb(error.__traceback__)
    text = f"{name}: {type(error).__name__}: {error} ({last.filename}:{last.lineno}); {_EXPECTED}."
    raise BadFile(text) from error


def _fields(options: Any) -> Mapping[str, Any]:
  """The fields of `LoraConfig` that the options name; those given one by one go before the file's."""
  file: Any = {} if options.config is None else json.loads(Path(options.config).read_text())
  if not isinstance(file, dict):
    raise BadFile(f"{options.config}: found {type(file).__name__}; expected a JSON object of LoraConfig's fields.")
  given = {name: getattr(options, name) for name in ("rank", "alpha", "targets", "variant")}
  return file | {name: value for name, value in given.items() if value is not None}


def _in_a_trace(args: Any) -> Any:
  """Arguments that stand for arrays, as arrays of zeros: the probe is traced, and nothing is allocated."""
  is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if is_shape(leaf) else leaf, args)
