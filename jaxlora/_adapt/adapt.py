"""`adapt`: from parameters to a tree with adapted leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._adapt.config import LeafPlan, LoraConfig
from jaxlora._adapt.from_floats import started
from jaxlora._adapt.initializers import INITIALIZERS, FromWeight, from_weight, gives_both, kaiming
from jaxlora._adapt.plan import plan_tree
from jaxlora._adapt.tokens import with_rows
from jaxlora._base.checks import is_abstract
from jaxlora._base.coded import decoded, is_coded, type_of_leaf
from jaxlora._base.dtypes import wide
from jaxlora._base.keys import leaf_key, typed_key
from jaxlora._base.memory import on_device
from jaxlora._base.processes import check_same_on_all, spans_processes
from jaxlora._weight.matrices import laid_out, matrices
from jaxlora._weight.partitioned import with_own_names
from jaxlora._weight.placement import beside_its_base
from jaxlora._weight.start import Initializer, Start
from jaxlora._weight.variant import variant_named
from jaxlora._weight.weight import SCALINGS, FullWeight, LoraWeight, start_subtracted


def adapt(
  params: Any, config: LoraConfig, key: jax.Array, *, probe: Callable[[Any], Any] | None = None, floats: Any = None
) -> Any:
  """Puts a `LoraWeight` in the place of every targeted leaf; the function of the tree stays what it was, bit for bit.

      W -> (W, A, B),   A as `config.init` says,  B = 0

  An init that gives both factors keeps it to rounding: the weight is then `W + scale (A B - A0 B0)`.

  With `floats` the leaves whose base is codes start as near to the floats as codes and factors can be together:

      W ~ Q + scale A B

  `init="residual"` keeps the codes, and starts with the principal part of what they lost, `W - Q`. `"loftq"` goes on
  from there: codes of `W - scale A B`, factors of what those lose, in turn. `"pissa"` and `"olora"` start with their
  part of W, and write the rest of it as codes, in the format that the base has (QPiSSA). What `strip` gives is the base
  that was written so: keep it with the adapter, which fits no other.

  Every leaf has a random key of its own, made from its path: other targets change nothing in it. The roles of a
  weight's axes come from `config.axes`, then from the probe, then from what the tree tells: the types of Equinox's
  modules, biases, names (`kernel` is (in, out), `weight` is taken for (out, in), `w` for (in, out)), other matrices.
  A matrix of which nothing tells is taken for (in, out). What is not certain is checked by `wrap` at the first trace.

  On a mesh A lies as the contracted axes of its base do, B as the free ones, and the rank is never split.

  Args:
    params: any pytree of arrays: a Flax parameter dict, `flax.nnx` state, lists, dataclasses. Leaves may be
      `jax.ShapeDtypeStruct`s, as before the weights are loaded: what is made of a weight's values (leaves trained
      whole, DoRA's magnitudes, PiSSA) is a `ShapeDtypeStruct` then, too; so is every part where these say how they lie
      (`sharding=`): see `jaxlora.sharding.materialize`. NumPy arrays stay NumPy's, and every call of a compiled
      function copies them to the device: `jax.device_put(params)` does it once.
    config: what to adapt, and how.
    key: a random key, typed or raw uint32.
    probe: a function of `params` alone, such as `lambda p: model.apply({"params": p}, x)`. It is traced abstractly and
      never run, to learn which axes of each weight are contracted. Needed for kernels of more than two axes, unless
      `config.axes` has their roles.
    floats: the tree that `params` was quantised from, with the same paths, for inits that start from it; NumPy arrays
      serve. One leaf after the other is moved to the device and let go of.

  Returns:
    A tree of the same nesting with `LoraWeight` and, for `config.train`, `FullWeight` nodes.

  Raises:
    ValueError: naming the leaf or the field, what was found, what was expected and what to do: an empty or already
      adapted tree, a pattern without a match, a leaf that cannot be adapted, a rank too large, floats that are not
      those of the base; a key that is not the same on all processes that the parameters lie on.
    TypeError: if `key` is no random key.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"dense": {"kernel": jnp.ones((16, 8))}}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> tree["dense"]["kernel"].a.shape, tree["dense"]["kernel"].b.shape
    ((2, 16), (2, 8))

    A quantised base, and factors that start with what it lost:

    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (128, 64))}
    >>> config = jaxlora.LoraConfig(rank=16, init="residual")
    >>> tree = jaxlora.adapt(jaxlora.quantize(params, "nf4"), config, jax.random.key(0), floats=params)
    >>> lost = lambda tree: jnp.linalg.norm(tree["kernel"] - params["kernel"])
    >>> bool(lost(jaxlora.merge(tree)) < 0.8 * lost(jaxlora.dequantize(jaxlora.strip(tree))))
    True

  Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1; Li et al.,
    "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv:2310.08659, algorithm 1; Meng, Wang
    and Zhang, "PiSSA", arXiv:2404.02948, section 4 (QPiSSA).
  """
  key = typed_key(key, "adapt: key")
  plan = plan_tree(params, config, probe, floats)
  drawn: dict[Any, Any] = {}
  if any(map(spans_processes, jax.tree.leaves(params))):
    check_same_on_all(key, "adapt: key")

  def one(path: str, leaf: Any) -> Any:
    if path in plan.adapted:
      values = plan.floats.get(path)
      make = _abstract if is_abstract(leaf) or is_abstract(values) else _factored
      return make(leaf, values, *plan.adapted[path], path not in plan.unsure, key, drawn)
    if path in plan.tables:
      return with_rows(leaf, *plan.tables[path], config.dtype)
    if path in plan.whole:
      value = decoded(on_device(leaf)) if is_coded(leaf) and not is_abstract(leaf) else leaf
      whole = type_of_leaf(leaf) if is_abstract(leaf) else jnp.array(value, copy=True)
      return FullWeight(base=leaf, value=whole)
    return leaf

  return with_own_names(jax.tree_util.tree_unflatten(plan.treedef, [one(*pair) for pair in plan.leaves.items()]))


def _factored(
  base: Any, floats: Any, roles: str, plan: LeafPlan, sure: bool, key: jax.Array, drawn: dict[Any, Any]
) -> LoraWeight:
  """The weight with factors as its plan says. A is drawn only where no initialiser makes both factors."""
  if floats is not None:
    return _factored_from(floats, base, roles, plan, sure, key, drawn)
  start = _start(base, roles, plan, key, drawn)
  both = from_weight(plan.init)
  given = _given(both, start, plan) if both else _zero_a(start) if plan.zero == "a" else {}
  held = {**variant_named(plan.variant).start(start._replace(given=given or None)), **given}
  held = {name: on_device(part) for name, part in held.items()}  # a base may rest in the host's memory
  weight = _weight(base, held, roles, plan, sure)
  return weight if both is None else start_subtracted(weight, both.cancels)


def _factored_from(
  floats: Any, base: Any, roles: str, plan: LeafPlan, sure: bool, key: jax.Array, drawn: dict[Any, Any]
) -> LoraWeight:
  """The weight of a base of codes with factors that start from what it was made of."""
  new = started(floats, base, roles, plan, leaf_key(key, plan.path))
  start = _start(new.base, roles, plan, key, drawn)._replace(given={"a": new.a, "b": new.b})
  variant = variant_named(plan.variant)
  held = {**variant.start(start), "a": new.a, "b": new.b}
  if variant.gain is not None:  # what trains beside the factors starts from the base and them
    whole = LoraWeight.from_factors(on_device(new.base), new.a, new.b, roles, alpha=plan.alpha, scaling=plan.scaling)
    of_whole = variant.start(start._replace(base=whole.materialize(wide(new.base))))
    held |= {name: of_whole[name].astype(held[name].dtype) for name in variant.trains if name not in ("a", "b")}
  return _weight(new.base, {name: on_device(part) for name, part in held.items()}, roles, plan, sure)


def _start(base: Any, roles: str, plan: LeafPlan, key: jax.Array, drawn: dict[Any, Any]) -> Start:
  return Start(
    base=base,
    roles=roles,
    rank=plan.rank,
    dtype=plan.dtype or base.dtype,
    key=leaf_key(key, plan.path),
    shared=key,
    drawn=drawn,
    init=_initializer(plan),
  )


def _weight(base: Any, held: dict[str, Any], roles: str, plan: LeafPlan, sure: bool) -> LoraWeight:
  weight = LoraWeight.from_factors(
    base,
    held.pop("a"),
    held.pop("b"),
    roles,
    alpha=plan.alpha,
    scaling=plan.scaling,
    dropout=plan.dropout,
    variant=plan.variant,
    sure=sure,
    **held,
  )
  return beside_its_base(weight)


def _abstract(
  base: Any, floats: Any, roles: str, plan: LeafPlan, sure: bool, key: jax.Array, drawn: dict[Any, Any]
) -> LoraWeight:
  """The weight of a base that is only a shape and a dtype, as before the weights are loaded.

  Factors that need nothing more are made. Where some part is made of the weight's values, or the base says how it is
  to lie, every part is a shape and a dtype, too, as `jax.eval_shape` gives them.
  """
  told = is_abstract(base) and any(getattr(part, "sharding", None) is not None for part in jax.tree.leaves(base))
  if not gives_both(plan.init) and not told:
    try:
      return _factored(base, None, roles, plan, sure, key, drawn)
    except (TypeError, AttributeError):  # what a shape gives where an array is computed with
      pass
  try:
    weight = jax.eval_shape(lambda base, floats: _factored(base, floats, roles, plan, sure, key, {}), base, floats)
  except jax.errors.JAXTypeError as error:
    raise ValueError(
      f"{plan.path}: found a shape and a dtype, expected an array: the variant {plan.variant!r} or its init looks at"
      " the weight's values, which no trace can give it. Adapt once the weights are loaded: the same key draws the same"
      " factors."
    ) from error
  return beside_its_base(weight.with_parts({"base": base})) if told else weight


def _given(both: FromWeight, start: Start, plan: LeafPlan) -> dict[str, jax.Array]:
  """The factors that an initialiser of both makes of the weight."""
  w = matrices(decoded(on_device(start.base)), start.roles).astype(wide(start.base))
  factors = both.make(start.key, w, plan.rank, SCALINGS[plan.scaling](plan.alpha, plan.rank))
  shape = jnp.shape(start.base)
  return {
    name: laid_out(factor, shape, start.roles, own).astype(start.dtype)
    for name, factor, own in zip("ab", factors, "io", strict=True)
  }


def _zero_a(start: Start) -> dict[str, jax.Array]:
  """A zero, and B drawn as A would be, a map from the rank: `W + A B` is W at first, as where B is zero."""
  b = start.init(start.key, start.b_shape, start.dtype, start.rank, start.rank)
  return {"a": start.zeros(start.a_shape), "b": b}


def _initializer(plan: LeafPlan) -> Initializer:
  """The function that draws A; what a user's own returns is checked."""
  if not callable(plan.init):
    return INITIALIZERS.get(plan.init, kaiming)  # beside given factors a variant draws none, unless it has others
  draw = plan.init

  def checked(key: jax.Array, shape: tuple[int, ...], dtype: Any, fan_in: int, rank: int) -> jax.Array:
    a = draw(key, shape, dtype, fan_in, rank)
    if jnp.shape(a) != tuple(shape) or jnp.result_type(a) != dtype:
      raise ValueError(
        f"{plan.path}: init gives an array of shape {jnp.shape(a)}, dtype {jnp.result_type(a)}; expected shape"
        f" {tuple(shape)}, dtype {jnp.dtype(dtype).name}."
      )
    return jnp.asarray(a)

  return checked
