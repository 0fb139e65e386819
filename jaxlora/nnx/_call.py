"""One call of an adapted module: the method of the plain module, through `wrap`; what it changes comes out."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax

from jaxlora._transform.wrap import wrap
from jaxlora.nnx._changes import Changes
from jaxlora.nnx._level import check_level
from jaxlora.nnx._opened import open_in_place
from jaxlora.nnx._variables import drops
from jaxlora.nnx._view import frozen_base
from jaxlora.nnx._walk import factors_of, is_object


def call(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
  """Calls a method of an adapted module, by its name.

  The module and the NNX objects among the arguments go through `wrap` as states, and are built anew inside of its
  trace: they are of that trace's level, as NNX wants it of what a call changes. What it changed is read off these
  copies, returned from the trace, and written to the objects that the caller has.
  """
  check_level(module)
  leaves, treedef = jax.tree_util.tree_flatten((args, kwargs), is_leaf=is_object)
  places = [k for k, leaf in enumerate(leaves) if is_object(leaf)]
  real = [module, *(leaves[k] for k in places)]
  copies = nnx.merge(*nnx.split(real, graph=True), copy=True)
  adapted, *_ = [open_in_place(copy, frozen_base) for copy in copies if not isinstance(copy, nnx.Variable)]
  graph, states = nnx.split(copies, graph=True)
  own = states.pop(0) if 0 in states else {}
  plain_leaves = [None if k in places else leaf for k, leaf in enumerate(leaves)]
  changes = Changes(real, name, adapted)

  def pure(own: Any, others: Any, leaves: Sequence[Any]) -> Any:
    state = nnx.State({0: own, **others})
    inner = nnx.merge(graph, state)
    changes.begin(inner)
    full = list(leaves)
    for k, given in zip(places, inner[1:], strict=True):
      full[k] = given
    given_args, given_kwargs = jax.tree_util.tree_unflatten(treedef, full)
    return changes.end(getattr(inner[0], name)(*given_args, **given_kwargs))

  pure.__name__ = type(module).__name__
  factors = [held for *_, held in factors_of(module)]
  options = factors[0].options._asdict()
  drawing = next((held for held in factors if drops(held)), None)
  key = None if drawing is None else drawing.rngs()
  return changes.apply(wrap(pure, dropout_key=key, **options)(own, dict(states), plain_leaves))
