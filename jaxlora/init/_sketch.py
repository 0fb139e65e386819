"""Sketches of the inputs of adapted weights, taken as a function runs forward."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.paths import flatten
from jaxlora._jax.control_flow import scan_counts
from jaxlora._jax.jaxpr import Literal, bind, equation_context, open_jaxpr, source_line
from jaxlora._transform.factored import Factored
from jaxlora._transform.interpreter import Carry, passed_through
from jaxlora._transform.product import Tap
from jaxlora._transform.record import weights_in
from jaxlora._transform.rule import PRODUCTS, RULES, Op, Unfactorable
from jaxlora._weight.roles import factor_shape
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted


@dataclasses.dataclass
class Seen:
  """What happened to the weights, by path: those whose input was seen, and why those that were not.

  `places` holds the user's lines of the equations that enclose the one at hand.
  """

  inputs: set[str] = dataclasses.field(default_factory=set)
  reasons: dict[str, str] = dataclasses.field(default_factory=dict)
  places: list[str] = dataclasses.field(default_factory=list)

  def source(self, eqn: Any) -> str:
    return source_line(eqn) or next(filter(None, reversed(self.places)), "an unknown line")

  def plain(self, value: Any, reason: str) -> Any:
    """The weight as an array: what it meets from here on is not seen."""
    if not isinstance(value, Factored):
      return value
    self.reasons.setdefault(value.path, reason)
    return value.base


class _Term(Tap):
  """Half the squared norm of a thin product, with a gradient that is there before anything asks for it."""

  def __init__(self) -> None:
    self.value: jax.Array | None = None

  def see(self, product: Callable[[jax.Array, jax.Array], Any], x: jax.Array, a: jax.Array) -> None:
    def thin(x: jax.Array, a: jax.Array) -> jax.Array:
      (h,) = jax.tree.leaves(product(x, a))
      return h

    @jax.custom_vjp
    def energy(x, a):
      h = thin(x, a).astype(jnp.float32)
      return jnp.sum(h * h) / 2

    def forward(x, a):
      h, transpose = jax.vjp(lambda a: thin(x, a), a)
      return energy(x, a), transpose(h)[0]

    def backward(sketch, cotangent):
      return None, sketch * cotangent.astype(sketch.dtype)

    energy.defvjp(forward, backward)
    self.value = energy(lax.stop_gradient(x), a)


Walked = tuple[list[Any], jax.Array]


def zero() -> jax.Array:
  return jnp.zeros((), jnp.float32)


def walk(seen: Seen, jaxpr: Any, args: Sequence[Any]) -> Walked:
  """Evaluates a jaxpr on values of which some are `Factored`."""
  inner, consts = open_jaxpr(jaxpr)
  env: dict[Any, Any] = dict(zip(inner.constvars, consts, strict=True)) | dict(zip(inner.invars, args, strict=True))
  total = zero()

  def read(atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else env[atom]

  for eqn in inner.eqns:
    with equation_context(eqn):
      values = [read(atom) for atom in eqn.invars]
      out, more = _apply(seen, eqn, values) if weights_in(values) else (bind(eqn, values), None)
      total = total if more is None else total + more
    env.update(zip(eqn.outvars, out, strict=True))
  return [read(atom) for atom in inner.outvars], total


def _apply(seen: Seen, eqn: Any, values: Sequence[Any]) -> tuple[list[Any], jax.Array | None]:
  name = eqn.primitive.name
  try:
    if name in CONTROL_FLOW:
      seen.places.append(source_line(eqn))
      try:
        return CONTROL_FLOW[name](seen, eqn, values)
      finally:
        seen.places.pop()
    if name not in RULES:
      raise Unfactorable(f"it enters `{name}`")
    return _by_rule(seen, eqn, values)
  except Unfactorable as why:
    reason = f"{why} (`{name}` at {seen.source(eqn)})"
    return bind(eqn, [seen.plain(value, reason) for value in values]), None


def _by_rule(seen: Seen, eqn: Any, values: Sequence[Any]) -> tuple[list[Any], jax.Array | None]:
  term = _Term()
  tap: Any = term  # in the place of a recipe
  op = Op(
    name=eqn.primitive.name,
    params=eqn.params,
    bind=lambda *args, **changes: bind(eqn, args, **changes),
    result=eqn.outvars[0].aval,
    use=0,
    recipe=lambda value: tap,
    recompute=False,
    looping=True,
    h=None,
    took=lambda way: None,
  )
  out = RULES[op.name](op, values)
  if term.value is not None:
    seen.inputs.add(weights_in(values)[0].path)
    out = bind(eqn, [value.base if isinstance(value, Factored) else value for value in values])  # B is zero
  elif op.name in PRODUCTS and not weights_in(out):
    raise Unfactorable("a lookup, or a product that meets the output axes first, has no input to see")
  return out, term.value


def _call(seen: Seen, eqn: Any, values: Sequence[Any]) -> Walked:
  return walk(seen, eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"], values)


def _arrays(seen: Seen, values: Sequence[Any]) -> list[Any]:
  return [seen.plain(value, "it leaves a branch or a loop as a result") for value in values]


def _cond(seen: Seen, eqn: Any, values: Sequence[Any]) -> Walked:
  index, *operands = values
  if isinstance(index, Factored):
    raise Unfactorable("it decides which branch runs")

  def branch(jaxpr: Any) -> Callable[..., Walked]:
    def run(*args):
      out, total = walk(seen, jaxpr, args)
      return _arrays(seen, out), total

    return run

  branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
  if not (platforms := eqn.params.get("branches_platforms")):
    return lax.switch(index, branches, *operands)
  by_platform = {name: fn for names, fn in zip(platforms, branches, strict=True) for name in names or ("default",)}
  return lax.platform_dependent(*operands, **by_platform)


def _scan(seen: Seen, eqn: Any, values: Sequence[Any]) -> Walked:
  params, counts = eqn.params, scan_counts(eqn.params)
  if counts is None:
    raise Unfactorable("this version of JAX describes its scans in a way that cannot be read")
  n_consts, n_carry = counts
  consts, init, xs = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]
  kept = passed_through(params["jaxpr"], n_consts, n_carry, init)
  init = [x if k in kept else seen.plain(x, "a loop carries it and changes it") for k, x in enumerate(init)]
  carry = Carry(init, kept)
  other = "a scan runs over an axis of it that is not stacked"
  xs = [x if isinstance(x, Factored) and x.roles[0] == "s" else seen.plain(x, other) for x in xs]

  def body(state, here):
    free, total = state
    here = [x.replace(roles=x.roles[1:]) if isinstance(x, Factored) else x for x in here]
    out, more = walk(seen, params["jaxpr"], [*consts, *carry.unpack(free), *here])
    return (_arrays(seen, carry.pack(out[:n_carry])), total + more), _arrays(seen, out[n_carry:])

  options = {"length": params["length"], "reverse": params["reverse"], "unroll": params["unroll"]}
  (free, total), ys = lax.scan(body, (carry.free, zero()), xs, **options)
  return [*carry.unpack(free), *ys], total


def _refused(why: str) -> Callable[..., Walked]:
  def rule(seen: Seen, eqn: Any, values: Sequence[Any]) -> Walked:
    raise Unfactorable(why)

  return rule


CONTROL_FLOW: dict[str, Callable[..., Walked]] = {
  **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"), _call),
  "cond": _cond,
  "scan": _scan,
  "while": _refused("a loop of unknown length shows nothing of its inside"),
  "shard_map": _refused("a shard_map shows nothing of its inside"),
}


def sketcher(fn: Callable[..., Any], seen: Seen) -> Callable[[dict[str, jax.Array], Any, Any], dict[str, jax.Array]]:
  """A function from an A for each adapted weight, the tree and a batch, to the sketches `A (x^T x)`, by path.

  Args:
    fn: `(params, batch) -> anything`.
    seen: takes down, while the function is traced, which weights' inputs were seen.
  """

  def energy(factors: dict[str, jax.Array], tree: Any, batch: Any) -> jax.Array:
    nodes, treedef = flatten(tree, is_leaf=is_adapted)
    values = [_entered(path, node, factors) for path, node in nodes]
    plain = [value.base if isinstance(value, Factored) else value for value in values]
    traced = jax.make_jaxpr(fn)(jax.tree_util.tree_unflatten(treedef, plain), batch)
    _, total = walk(seen, traced, [*values, *jax.tree.leaves(batch)])
    return total

  return jax.grad(energy)


def _entered(path: str, node: Any, factors: dict[str, jax.Array]) -> Any:
  if isinstance(node, FullWeight):
    return node.value
  if not isinstance(node, LoraWeight):
    return node
  a, base = factors[path], lax.stop_gradient(node.base)
  rank = a.shape[node.roles.count("s")]
  b = jnp.zeros(factor_shape(tuple(base.shape), node.roles, "o", rank), a.dtype)
  return Factored(base, a, b, gain=None, key=None, roles=node.roles, dropout=0.0, path=path)
