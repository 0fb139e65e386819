"""`adapt` and `from_tree`: modules whose calls just work."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax

from jaxlora._adapt.adapt import adapt as adapt_tree
from jaxlora._adapt.config import LoraConfig
from jaxlora._base.keys import leaf_key, typed_key
from jaxlora._base.text import short
from jaxlora._platform.policy import check_tuning
from jaxlora._transform.record import ON_MATERIALIZE
from jaxlora._weight.partitioned import plain_box
from jaxlora._weight.weight import parts
from jaxlora.nnx._call import call
from jaxlora.nnx._classes import adapted_class
from jaxlora.nnx._variables import Factors, Options, holds_weight
from jaxlora.nnx._walk import FACTORS, mark, owned_variables, paths_of, plain_class


def adapt(
  module: Any,
  config: LoraConfig,
  key: jax.Array,
  *,
  probe: Callable[[Any], Any] | None = None,
  floats: Any = None,
  on_materialize: str = "warn",
  recompute: bool = True,
  tuning: str = "auto",
  platform: str | None = None,
) -> Any:
  """Puts factors beside the weights of a module; it is called, trained, split and saved as any module of NNX is.

      y = x W + s (x A) B

  The module that comes back is an instance of the same class. Its base Variables keep their types, paths and metadata;
  beside them, in the attribute `jaxlora` of the module that holds the weight, are the factors: Variables of type
  `Trainable`, which is the filter for optimizers and gradients. A method of the module, or of a module in it, runs with
  adapted weights through `jaxlora.wrap`, and what it changes in the module or in its arguments comes out. Outside of a
  method an adapted weight reads as the merged one, `W + s A B`, formed as an array.

  Args:
    module: a module of NNX; it is not changed, and the base's arrays are shared.
    config: what to adapt, and how, as for `jaxlora.adapt`; paths are such as `layers/0/kernel`. Adapted weights and
      those trained whole are of type `nnx.Param`.
    key: a random key; every leaf has one of its own, by its path. It also seeds the adapters' dropout, which rests
      while `model.eval()` says so.
    probe: a function of the module, such as `lambda model: model(x)`, as for `jaxlora.adapt`.
    floats: the module that `module` was quantised from, as for `jaxlora.adapt`.
    on_materialize, recompute, tuning, platform: of the calls, as for `jaxlora.wrap`.

  Returns:
    The adapted module.

  Raises:
    TypeError: if `module` is no module of NNX, or `key` no random key.
    ValueError: if it is adapted already; as `jaxlora.adapt` and `jaxlora.wrap` do, naming the leaf or the option.

  Example:
    >>> from flax import nnx
    >>> import jax, jaxlora.nnx
    >>> model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    >>> model = jaxlora.nnx.adapt(model, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> loss = lambda model, x: (model(x) ** 2).mean()
    >>> grad = nnx.grad(loss, argnums=nnx.DiffState(0, jaxlora.nnx.Trainable))
    >>> sorted(nnx.to_pure_dict(grad(model, jax.numpy.ones((3, 6))))["jaxlora"]["kernel"])
    ['a', 'b']
  """
  _check_plain(module, "adapt")
  options = _options("adapt", on_materialize, recompute, tuning, platform)
  states: Any = nnx.split(module, nnx.Param, ..., graph=True)
  graph, params, rest = states
  whole = lambda params: nnx.merge(graph, params, rest, copy=True)
  if floats is not None:
    floats = nnx.state(floats, nnx.Param, graph=True)
  params = adapt_tree(
    params, config, key, probe=None if probe is None else lambda params: probe(whole(params)), floats=floats
  )
  return _closed(whole(params), options, typed_key(key, "adapt: key"))


def from_tree(
  tree: Any,
  *,
  key: jax.Array | None = None,
  on_materialize: str = "warn",
  recompute: bool = True,
  tuning: str = "auto",
  platform: str | None = None,
) -> Any:
  """A module whose calls just work, of one with adapted weights: the inverse of `to_tree`.

  Args:
    tree: a module of NNX with `LoraWeight`s in it, such as `jaxlora.peft.load(folder, module)` returns, or
      `jaxlora.adapt(module, ...)`. It is not changed.
    key: a random key that seeds the dropout of adapters that have one; needed for those alone.
    on_materialize, recompute, tuning, platform: of the calls, as for `jaxlora.wrap`.

  Returns:
    The module, as `jaxlora.nnx.adapt` makes them.

  Raises:
    TypeError: if it is no module of NNX.
    ValueError: if no Variable of it holds an adapted weight; if some have dropout and there is no key, naming them.

  Example:
    >>> from flax import nnx
    >>> import jax, jaxlora.nnx
    >>> tree = jaxlora.adapt(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> jaxlora.nnx.from_tree(tree)(jax.numpy.ones((3, 6))).shape
    (3, 5)
  """
  _check_plain(tree, "from_tree")
  options = _options("from_tree", on_materialize, recompute, tuning, platform)
  if key is not None:
    key = typed_key(key, "from_tree: key")
  return _closed(nnx.clone(tree, graph=True), options, key)


def _check_plain(module: Any, what: str) -> None:
  if not isinstance(module, nnx.Module):
    raise TypeError(f"{what}: found {short(module)}, expected a module of flax.nnx.")
  if plain_class(module) is not None:
    raise ValueError(
      f"{what}: the module is adapted already. Fold its factors in with jaxlora.merge(model), or take its base with"
      " jaxlora.strip(model), first."
    )


def _options(what: str, on_materialize: str, recompute: bool, tuning: str, platform: str | None) -> Options:
  if on_materialize not in ON_MATERIALIZE:
    raise ValueError(
      f"{what}: on_materialize is {on_materialize!r}, expected one of {', '.join(map(repr, ON_MATERIALIZE))}."
    )
  check_tuning(tuning, platform, what)
  return Options(on_materialize, recompute, tuning, platform)


def _closed(module: Any, options: Options, key: jax.Array | None) -> Any:
  """Moves the adapted weights of a module, which is changed, into Variables of their own."""
  paths = paths_of(module)
  held = [(owner, path, variable) for owner, path, variable in owned_variables(module) if holds_weight(variable)]
  if not held:
    raise ValueError(
      "from_tree: no Variable of the module holds an adapted weight. Make one with jaxlora.nnx.adapt(module, config,"
      " key)."
    )
  made: dict[int, Factors] = {}
  for owner, path, variable in held:
    if FACTORS not in vars(owner):
      setattr(owner, FACTORS, nnx.Dict({}))
    if id(variable) not in made:
      made[id(variable)] = _factors(variable, paths[id(variable)], options, key)
    setattr(vars(owner)[FACTORS], path, made[id(variable)])
  for _, _, variable in held:
    if holds_weight(variable):
      variable.set_raw_value(parts(variable.get_raw_value())["base"])
      plain_box(variable)
  for node in mark(module, lambda node: FACTORS in vars(node)):
    kind: Any = type(node)
    object.__setattr__(node, "__class__", adapted_class(kind, call))
  return module


def _factors(variable: nnx.Variable, path: str, options: Options, key: jax.Array | None) -> Factors:
  node = variable.get_raw_value()
  if key is None and getattr(node, "dropout", 0) > 0:
    raise ValueError(f"from_tree: {path} has dropout {node.dropout}, and nothing to draw masks from. Pass key=.")
  if any(part is None for part in parts(node).values()):
    raise ValueError(
      f"from_tree: {path} is one half of a split tree. Put the halves together with jaxlora.join(frozen, trainable)."
    )
  return Factors(node, variable, options, None if key is None else leaf_key(key, f"{path}/dropout"))
