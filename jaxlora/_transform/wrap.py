"""`wrap`: any function, unmodified, on trees that hold adapted weights."""

from collections.abc import Callable
import types
from typing import Any

import jax
from jax import lax
import numpy as np

from jaxlora._base.coded import is_coded
from jaxlora._base.keys import leaf_key, typed_key
from jaxlora._base.paths import flatten
from jaxlora._base.text import short
from jaxlora._platform.policy import check_tuning, choose_policy
from jaxlora._quant.array import check_quantized
from jaxlora._transform.coded import Coded
from jaxlora._transform.control import named
from jaxlora._transform.factored import TracedWeight, factored, weights_in
from jaxlora._transform.frozen import FrozenWeight, stand_in
from jaxlora._transform.held import described, opened
from jaxlora._transform.interpreter import interpret
from jaxlora._transform.meetings import Unsure, check_roles
from jaxlora._transform.record import ON_MATERIALIZE, Record
from jaxlora._transform.transform import Transform
from jaxlora._weight.checks import check_parts, check_together, check_values, check_weight
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted, is_leaf_node


def wrap(
  fn: Callable[..., Any],
  *,
  dropout_key: jax.Array | None = None,
  on_materialize: str = "warn",
  recompute: bool = True,
  tuning: str = "auto",
  platform: str | None = None,
  adapters: bool = True,
) -> Callable[..., Any]:
  """Makes any function take trees that hold adapted weights.

      wrap(fn)(tree) = fn(merge(tree)),    computed as  x W + s (x A) B,  never as  x (W + s A B)

  The wrapped function has the same signature. It composes with `jax.jit`, `grad`, `vmap`, `jvp`, `checkpoint`, `scan`
  and meshes on either side. Frozen bases are behind `stop_gradient`. Arrays among the arguments are traced, as in
  `jax.jit`; everything else (strings, bools, Python numbers, callables) reaches `fn` as it is. Outside `jax.jit` each
  call traces `fn` anew: put it under `jit`.

  Args:
    fn: a pure function of pytrees, such as `model.apply`. Any argument may hold `LoraWeight`s. Or an adapted module of
      Equinox or NNX, or a method of one: `wrap(model)(x)` is `wrap(lambda model, x: model(x))(model, x)`, and the
      weights are found in it. Under `jax.jit` pass the module as an argument, as in the second form: what a jitted
      function closes over is a constant of it.
    dropout_key: a random key, typed or raw uint32, for the dropout of adapters that have one; `None` means evaluation,
      without dropout. Pass a new key every step: `wrap(fn, dropout_key=key)` is cheap. Every use of a weight has a mask
      of its own, a gradient that `fn` takes inside itself included: differentiate the wrapped function, from outside.
    on_materialize: what to do where a weight has to be formed as one array: `"warn"` once per place, `"ignore"`, or
      `"error"`.
    recompute: whether the backward pass rematerialises the inputs of adapted products, where that takes cheap
      operations (elementwise, or along rows) from residuals that it keeps anyway; and keeps one array of each norm,
      softmax or activation. Training then holds less than running the frozen model backwards does; on CPUs it saves
      time as well. Values and derivatives are the same to rounding.
    tuning: `"auto"` writes the program as the platform's compiler likes it; `"none"` is the plain form everywhere,
      `x W + s (x A) B` and JAX's own differentiation. Values are the same to rounding.
    platform: what the program will be compiled for: `"cpu"`, `"gpu"` or `"tpu"`. `None` finds it, call by call: from
      the mesh or the devices of the arguments, from `jax.default_device`, from the default backend. Say it where a
      program is lowered for a platform that this host does not have. Whatever is said, the program runs everywhere.
    adapters: with `False` the base alone is called, as by `wrap(fn)(strip(tree))`, to the bit and at its cost: the
      reference of preference training. The frozen half of a tree serves as well, as nothing of the other is used.

  Returns:
    A function with `fn`'s signature and results. Two of the same function and settings are equal, without a
    `dropout_key`: as a static argument of `jax.jit` either serves, and nothing is compiled again.

  Raises:
    ValueError: on another `on_materialize`, `tuning` or `platform`; when called, on factors that do not fit their base,
      naming the leaf, and on roles that were taken without certain evidence where the function contradicts them;
      `MaterializeError` where materialising is forbidden.
    TypeError: if `fn` cannot be called, `dropout_key` is no random key, or `adapters` no bool.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> jaxlora.wrap(lambda p, x: x @ p["kernel"])(tree, jnp.ones((2, 4))).shape
    (2, 3)

    A module, and a batch of inputs to it:

    >>> from flax import nnx
    >>> model = jaxlora.adapt(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> jaxlora.wrap(model)(jnp.ones((2, 4))).shape
    (2, 3)

    How far an adapter has moved a model from its base, of which there is one copy:

    >>> apply = lambda p, x: x @ p["kernel"]
    >>> moved = lambda tree, x: jaxlora.wrap(apply)(tree, x) - jaxlora.wrap(apply, adapters=False)(tree, x)
    >>> float(moved(tree, jnp.ones((2, 4))).max())
    0.0
  """
  if not callable(fn):
    raise TypeError(f"wrap: fn is {short(fn)}, expected a function of trees, such as model.apply, or a module to call.")
  if on_materialize not in ON_MATERIALIZE:
    raise ValueError(
      f"wrap: on_materialize is {on_materialize!r}, expected one of {', '.join(map(repr, ON_MATERIALIZE))}."
    )
  check_tuning(tuning, platform, "wrap")
  if not isinstance(adapters, bool):
    raise TypeError(f"wrap: adapters is {short(adapters)}, expected True, or False for the base alone.")
  if dropout_key is not None:
    dropout_key = typed_key(dropout_key, "wrap: dropout_key")
  return described(fn)(Wrapped(fn, dropout_key, on_materialize, recompute, tuning, platform, adapters))


# Equal only where they are the same function, bound to the same object; modules and dataclasses may compare arrays.
_COMPARED = (types.FunctionType, types.MethodType)


class Wrapped:
  """What `wrap` returns: equal to another of the same function and settings, so that `jax.jit` knows it again.

  One with a dropout key, or of a callable that holds weights of its own, equals itself alone.
  """

  def __init__(
    self,
    fn: Callable[..., Any],
    dropout_key: Any,
    on_materialize: str,
    recompute: bool,
    tuning: str,
    platform: str | None,
    adapters: bool,
  ):
    self._function, self._held = opened(fn)
    self._dropout_key, self._on_materialize, self._adapters = dropout_key, on_materialize, adapters
    self._choose = (tuning, platform, recompute)
    self._seen: set[tuple[str, str, str]] = set()
    plain = dropout_key is None and not self._held and isinstance(fn, (*_COMPARED, Wrapped))
    self._settings = (fn, on_materialize, adapters, *self._choose) if plain else (id(self),)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    args = (*self._held, *args)
    if not self._adapters:
      args, kwargs = bases_of(args, kwargs)
    policy = choose_policy(*self._choose, jax.tree.leaves((args, kwargs)))
    return call(self._function, Record(self._on_materialize, self._seen, policy), self._dropout_key, args, kwargs)

  def __get__(self, instance: Any, owner: Any = None) -> Any:
    """As a function does: an attribute of a class is a method of its instances."""
    return self if instance is None else types.MethodType(self, instance)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Wrapped) and self._settings == other._settings

  def __hash__(self) -> int:
    return hash(self._settings)

  def __repr__(self) -> str:
    return f"jaxlora.wrap({short(self._function)})"


def call(
  fn: Callable[..., Any], record: Record, dropout_key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
  """One call of a wrapped function: trace it on plain arrays, interpret its jaxpr on traced weights."""
  nodes, treedef = argument_leaves(args, kwargs)
  leaves = [traced_value(node, path, dropout_key) for path, node in nodes]
  dynamic = [k for k, leaf in enumerate(leaves) if isinstance(leaf, (TracedWeight, jax.Array, np.ndarray))]
  if not weights_in(leaves):
    plain_args, plain_kwargs = jax.tree_util.tree_unflatten(treedef, leaves)
    return fn(*plain_args, **plain_kwargs)

  out_tree = None
  static_out: dict[int, Any] = {}  # results that are no arrays come back as they are

  def flat(*arrays: Any) -> list[Any]:
    nonlocal out_tree
    full = list(leaves)
    for k, array in zip(dynamic, arrays, strict=True):
      full[k] = array
    call_args, call_kwargs = jax.tree_util.tree_unflatten(treedef, full)
    out, out_tree = jax.tree_util.tree_flatten(fn(*call_args, **call_kwargs))
    static_out.update((k, leaf) for k, leaf in enumerate(out) if not isinstance(leaf, (jax.Array, np.ndarray)))
    return [leaf for k, leaf in enumerate(out) if k not in static_out]

  named(flat, getattr(fn, "__name__", "wrapped"))
  values = [leaves[k] for k in dynamic]
  traced = jax.make_jaxpr(flat)(*map(stand_in, values))
  out = [_returned(record, value) for value in interpret(traced, values, Transform(record))]
  weights = {path: node for path, node in nodes if isinstance(node, LoraWeight) and not node.sure}
  check_roles({path: Unsure(node.roles, tuple(node.shape)) for path, node in weights.items()}, record.uses)
  assert out_tree is not None
  arrays_out = iter(out)
  full_out = [static_out[k] if k in static_out else next(arrays_out) for k in range(out_tree.num_leaves)]
  return jax.tree_util.tree_unflatten(out_tree, full_out)


def _returned(record: Record, value: Any) -> Any:
  """A result of the function, which must be an array."""
  if not isinstance(value, TracedWeight):
    return value
  return record.materialize(value, "return", "the function's result", "the function returns it")


def bases_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
  """A call's arguments with the base of every adapted leaf in its place, frozen."""
  pairs, treedef = argument_leaves(args, kwargs)
  for path, node in pairs:
    if is_adapted(node):
      check_parts(node, path, ("base",))
      check_values(node.with_parts({name: None for name in node.parts() if name != "base"}), path)
  bases = [lax.stop_gradient(node.base) if is_adapted(node) else node for _, node in pairs]
  return jax.tree_util.tree_unflatten(treedef, bases)


def traced_value(node: Any, path: str, dropout_key: Any) -> Any:
  """Converts an argument leaf to its traced value."""
  if is_coded(node) and not isinstance(node, TracedWeight):
    check_quantized(node, path)
    return FrozenWeight.of(Coded(lax.stop_gradient(node)), path)
  if not is_adapted(node):  # traced weights among them, of functions that make their own
    return node
  check_weight(node, path)
  check_together(node, path)
  check_values(node, path)
  check_quantized(node.base, path)
  if is_coded(node.base):
    node = node.with_parts({"base": Coded(node.base)})
  if isinstance(node, FullWeight):
    return node.value
  return factored(node, path, None if dropout_key is None else leaf_key(dropout_key, path))


def argument_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[tuple[str, Any]], Any]:
  """The leaves of a call's arguments, each with its path inside its argument, and the structure of both together.

  The argument's own position or keyword leads the path where several arguments hold adapted weights.
  """
  arguments = [*enumerate(args), *sorted(kwargs.items())]
  flat = [(name, argument, flatten(argument, is_leaf=_is_weight)[0]) for name, argument in arguments]
  several = sum(any(_is_weight(leaf) for _, leaf in leaves) for *_, leaves in flat) > 1

  def path_of(name: Any, argument: Any, path: str, leaf: Any) -> str:
    if leaf is argument:
      return str(name)
    return f"{name}/{path}" if several else path

  pairs = [(path_of(name, argument, path, leaf), leaf) for name, argument, leaves in flat for path, leaf in leaves]
  return pairs, jax.tree_util.tree_structure((args, kwargs), is_leaf=_is_weight)


def _is_weight(node: Any) -> bool:
  return is_leaf_node(node) or isinstance(node, TracedWeight)
