"""The walk."""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._jax.control_flow import scan_counts
from jaxlora._jax.jaxpr import Literal, bind, equation_context, open_jaxpr, specified_sharding
from jaxlora._platform.recipes import REGION, Origins
from jaxlora._platform.region_derivative import again, light
from jaxlora._platform.regions import Region, find
from jaxlora._transform.factored import Factored, picked
from jaxlora._transform.product import Shrinks
from jaxlora._transform.record import Record, Use, weights_in
from jaxlora._transform.rule import BANKED, PRODUCTS, RULES, Op, Unfactorable
from jaxlora._transform.rules.dot import first_half
from jaxlora._transform.rules.layout import with_roles
from jaxlora._transform.ways import stays_whole, update_slice
from jaxlora._weight.roles import factor_axes


def run(record: Record, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
  """Evaluates a jaxpr on values of which some are `Factored`; its results may be, too."""
  env: dict[Any, Any] = {}
  origins = Origins()

  def read(atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else env[atom]

  def evaluate(eqn: Any) -> None:
    values = [read(atom) for atom in eqn.invars]
    with equation_context(eqn):
      if weights_in(values):
        out = apply(record, eqn, values, origins)
      elif record.of_rows and eqn.primitive.name == "dynamic_update_slice":
        out = update_slice(functools.partial(_bound, eqn), *values)
      else:
        out = bind(eqn, values)
        origins.note(eqn.primitive.name, functools.partial(bind, eqn), values, out)
    env.update(zip(eqn.outvars, out, strict=True))

  def evaluate_region(region: Region) -> None:
    values = [read(atom) for atom in region.inputs]
    if weights_in(values):  # an elementwise function of a weight itself
      for k in region.members:
        evaluate(jaxpr.eqns[k])
      return
    taps = tapped(region.result)
    shrinks = Shrinks(tuple(shrink for shrink, _ in taps.values()))
    out, small, halves = light(region, values, shrinks, [a for _, a in taps.values()])
    origins.halves.update(zip(taps, halves, strict=True))
    make = again(region)
    origins.note(REGION, lambda operands: [make(operands)], [*values, *small], [out])
    env[region.result] = out

  def tapped(var: Any) -> dict[int, Any]:
    """The adapted products of a value, by their equations' identity: how each shrinks it, and its A."""
    found = {}
    for eqn in readers.get(var, ()):
      weight_first = eqn.invars[1] is var
      weight = env.get(eqn.invars[0 if weight_first else 1])
      if isinstance(weight, Factored):
        half = first_half(eqn, weight, weight_first, record.looping)
        if half is not None:
          found[id(eqn)] = half
    return found

  env.update(zip(jaxpr.constvars, consts, strict=True))
  env.update(zip(jaxpr.invars, args, strict=True))
  regions = find(jaxpr) if record.recompute else {}
  readers = _products_of([region.result for region in regions.values()], jaxpr)
  freed_after = _last_uses(jaxpr, regions)
  for k, eqn in enumerate(jaxpr.eqns):
    if k not in regions:
      evaluate(eqn)
    elif k == regions[k].members[-1]:
      evaluate_region(regions[k])
    for var in freed_after.get(k, ()):
      env.pop(var, None)
  return [read(atom) for atom in jaxpr.outvars]


def _bound(eqn: Any, *values: Any) -> list[Any]:
  return bind(eqn, values)


def _products_of(values: Sequence[Any], jaxpr: Any) -> dict[Any, list[Any]]:
  """The products that have one of these variables, and another one, as operands."""
  products: dict[Any, list[Any]] = {value: [] for value in values}
  for eqn in jaxpr.eqns if products else ():
    if eqn.primitive.name == "dot_general" and eqn.invars[0] is not eqn.invars[1]:
      for atom in eqn.invars:
        if not isinstance(atom, Literal) and atom in products:
          products[atom].append(eqn)
  return products


def _last_uses(jaxpr: Any, regions: dict[int, Region]) -> dict[int, list[Any]]:
  """Equation number -> the variables that nothing after it reads: a walk holds no more memory than a plain call."""
  last: dict[Any, int] = {}
  for k, eqn in enumerate(jaxpr.eqns):
    at = regions[k].members[-1] if k in regions else k
    for atom in eqn.invars:
      if not isinstance(atom, Literal):
        last[atom] = max(at, last.get(atom, 0))
  for atom in jaxpr.outvars:
    if not isinstance(atom, Literal):
      last.pop(atom, None)
  freed: dict[int, list[Any]] = collections.defaultdict(list)
  for var, k in last.items():
    freed[k].append(var)
  return freed


def apply(record: Record, eqn: Any, values: Sequence[Any], origins: Origins) -> list[Any]:
  """One equation that adapted weights reach: by its rule, or on materialised weights."""
  name = eqn.primitive.name
  try:
    values = _picked_for(record, eqn, values)
    if name in CONTROL_FLOW:
      with record.enclosed_by(eqn):
        return CONTROL_FLOW[name](record, eqn, values)
    if name not in RULES:
      raise Unfactorable(_why_no_rule(name))
    return _by_rule(record, eqn, values, origins)
  except Unfactorable as why:
    source = record.source(eqn)
    plain = [
      record.materialize(value, name, source, str(why)) if isinstance(value, Factored) else value for value in values
    ]
    return bind(eqn, plain)


_LOOPS = ("scan", "while")

_PASSES = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "cond", *_LOOPS)


def _picked_for(record: Record, eqn: Any, values: Sequence[Any]) -> list[Any]:
  """A mixed batch's weights as an equation wants them: of many adapters only where it knows about those.

  Ahead of a loop they are picked once for all of its steps, unless `_banked.stays_whole`. What a scan runs over it
  slices along the first axis, which a bank has for itself.
  """
  name = eqn.primitive.name
  counts = scan_counts(eqn.params) if name == "scan" else None
  constants = len(values) if counts is None else sum(counts)

  def goes_on(k: int, w: Factored) -> bool:
    if name in _LOOPS:
      return k < constants and stays_whole(w)
    return name in BANKED or name in _PASSES

  return [
    picked(value) if isinstance(value, Factored) and not goes_on(k, value) else value for k, value in enumerate(values)
  ]


def _by_rule(record: Record, eqn: Any, values: Sequence[Any], origins: Origins) -> list[Any]:
  name, paths = eqn.primitive.name, [w.path for w in weights_in(values)]
  ways: list[str] = []
  op = Op(
    name=name,
    params=eqn.params,
    bind=lambda *args, **changes: bind(eqn, args, **changes),
    result=eqn.outvars[0].aval,
    use=record.products[paths[0]],
    recipe=origins.recipe if record.recompute else lambda value: None,
    recompute=record.recompute,
    looping=record.looping,
    h=origins.halves.pop(id(eqn), None),
    took=ways.append,
  )
  out = RULES[name](op, values)
  if name in PRODUCTS and not weights_in(out):
    record.products[paths[0]] += 1
    record.uses.append(Use(paths[0], name, True, record.source(eqn), way=next(iter(ways), "")))
  return out


def _why_no_rule(name: str) -> str:
  if name.startswith("custom_"):
    return "the function has a derivative or batching rule of its own, which must hold"
  return f"no rule keeps a weight factored through `{name}`"


def plain_outputs(record: Record, values: Sequence[Any], eqn: Any, what: str) -> list[Any]:
  """Results that must be arrays: weights among them are formed where they leave."""
  name, source = eqn.primitive.name, record.source(eqn)
  return [
    record.materialize(value, name, source, f"it leaves {what} as a result") if isinstance(value, Factored) else value
    for value in values
  ]


def closed(record: Record, jaxpr: Any) -> Callable[..., list[Any]]:
  """An inner jaxpr as a function of values, every recursion's way in."""
  inner, consts = open_jaxpr(jaxpr)
  return lambda *args: run(record, inner, consts, args)


def _named(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
  fn.__name__ = fn.__qualname__ = name
  return fn


class Inner(NamedTuple):
  """An inner jit, rebuilt, and what happened inside it: the weights there go by their place among its operands."""

  fn: Callable[..., list[Any]]
  record: Record


def _jit(record: Record, eqn: Any, values: Sequence[Any]) -> list[Any]:
  """Layers that are one jitted function stay one: it is rebuilt once for all weights of one structure."""
  nameless = [_nameless(record, k, value) for k, value in enumerate(values)]
  leaves, treedef = jax.tree.flatten(nameless)
  own = tuple(eqn.params.get(name) for name in ("name", "in_shardings", "out_shardings", "compiler_options_kvs"))
  key = (id(eqn.params["jaxpr"]), own, record.looping, treedef, tuple(jax.typeof(leaf) for leaf in leaves))
  if key not in record.jits:
    record.jits[key] = _rebuilt_jit(eqn, record)
  inner = record.jits[key]
  out = inner.fn(*nameless)
  for use in inner.record.uses:
    _replay(record, use, values[int(use.path)])
  return [_renamed(value, values) for value in out]


def _nameless(record: Record, k: int, value: Any) -> Any:
  """A weight without what tells it from others of its structure; its next uses have dropout masks of their own."""
  if not isinstance(value, Factored):
    return value
  key = value.key
  if key is not None:
    key = jax.random.fold_in(jax.random.fold_in(key, record.products[value.path]), k)
  return value.replace(path=str(k), key=key)


def _renamed(value: Any, operands: Sequence[Any]) -> Any:
  if not isinstance(value, Factored):
    return value
  original = operands[int(value.path)]
  return value.replace(path=original.path, key=original.key)


def _replay(record: Record, use: Use, w: Factored) -> None:
  """Notes for one weight what was noted when the jit around it was rebuilt."""
  here = next(filter(None, reversed(record.places)), "")
  use = dataclasses.replace(use, path=w.path, source=use.source or here)
  if use.factored:
    record.products[w.path] += 1
    record.uses.append(use)
  else:
    record.report(use, w.key is not None)


def _rebuilt_jit(eqn: Any, around: Record) -> Inner:
  params = eqn.params
  record = Record("ignore", set(), around.recompute, around.of_rows)
  record.looping = around.looping
  inner = closed(record, params["jaxpr"])

  def pinned(value: Any, sharding: Any) -> Any:
    """The inner jit's own sharding of an operand or a result, where the user gave one."""
    sharding = specified_sharding(sharding)
    if sharding is None:
      return value
    if isinstance(value, Factored):
      return value.replace(base=lax.with_sharding_constraint(value.base, sharding))
    return lax.with_sharding_constraint(value, sharding)

  def body(*args):
    record.uses.clear()  # should JAX trace this again, it is still the same uses
    record.products.clear()
    out = inner(*(pinned(*pair) for pair in zip(args, params.get("in_shardings", (None,) * len(args)), strict=True)))
    return [pinned(*pair) for pair in zip(out, params.get("out_shardings", (None,) * len(out)), strict=True)]

  options = dict(params.get("compiler_options_kvs") or ())
  return Inner(jax.jit(_named(body, params["name"]), compiler_options=options or None), record)


def _call(record: Record, eqn: Any, values: Sequence[Any]) -> list[Any]:
  return closed(record, eqn.params["call_jaxpr"])(*values)


def _remat(record: Record, eqn: Any, values: Sequence[Any]) -> list[Any]:
  params = eqn.params
  inner = closed(record, params["jaxpr"])
  if params.get("differentiated") and params["prevent_cse"]:
    # The backward half of a remat: it was to keep the compiler from merging it with the forward half.
    values = lax.optimization_barrier(list(values))
  return jax.checkpoint(inner, policy=params["policy"], prevent_cse=params["prevent_cse"])(*values)


def _cond(record: Record, eqn: Any, values: Sequence[Any]) -> list[Any]:
  index, *operands = values
  if isinstance(index, Factored):
    raise Unfactorable("it decides which branch runs")
  kept = _alike_in_all_branches(eqn.params["branches"], operands)

  def branch(jaxpr: Any) -> Callable[..., list[Any]]:
    inner = closed(record, jaxpr)

    def run_branch(*args):
      out = inner(*args)
      arrays = plain_outputs(record, [None if k in kept else value for k, value in enumerate(out)], eqn, "a branch")
      return [out[k] if k in kept else array for k, array in enumerate(arrays)]

    return run_branch

  branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
  if not (platforms := eqn.params.get("branches_platforms")):
    return lax.switch(index, branches, *operands)
  by_platform = {name: fn for names, fn in zip(platforms, branches, strict=True) for name in names or ("default",)}
  return lax.platform_dependent(*operands, **by_platform)


def _alike_in_all_branches(branches: Sequence[Any], operands: Sequence[Any]) -> set[int]:
  """Which results are weights of one structure whichever branch runs: those leave the branches factored."""
  ways = list(zip(*(_forwarded(jaxpr) for jaxpr in branches), strict=True))

  def structure(k: int | None) -> Any:
    if k is None or not isinstance(operands[k], Factored):
      return None
    leaves, treedef = jax.tree.flatten(operands[k])
    return treedef, *(jax.typeof(leaf) for leaf in leaves)

  found = [{structure(k) for k in way} for way in ways]
  return {k for k, structures in enumerate(found) if len(structures) == 1 and None not in structures}


def _forwarded(jaxpr: Any) -> list[int | None]:
  """Which operand each result is, untouched; `None` for all others. Calls inside are looked through."""
  inner, _ = open_jaxpr(jaxpr)
  place = {var: k for k, var in enumerate(inner.invars)}

  def of(atom: Any) -> int | None:
    return None if isinstance(atom, Literal) else place.get(atom)

  for eqn in inner.eqns:
    if eqn.primitive.name in _TRANSPARENT and any(of(atom) is not None for atom in eqn.invars):
      called = _forwarded(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
      for var, k in zip(eqn.outvars, called, strict=True):
        if k is not None and (source := of(eqn.invars[k])) is not None:
          place[var] = source
  return [of(atom) for atom in inner.outvars]


def passed_through(jaxpr: Any, offset: int, count: int, values: Sequence[Any]) -> list[int]:
  """Which carried values are weights that the body hands on untouched: those are constants of the loop."""
  if not weights_in(values):
    return []
  forwarded = _forwarded(jaxpr)
  return [k for k in range(count) if isinstance(values[k], Factored) and forwarded[k] == offset + k]


def _carried_in(record: Record, values: Sequence[Any], kept: Sequence[int], eqn: Any) -> list[Any]:
  """Initial carries: a weight that the body changes must be an array."""
  name, source = eqn.primitive.name, record.source(eqn)
  reason = "a loop carries it and changes it"
  return [
    record.materialize(value, name, source, reason) if isinstance(value, Factored) and k not in kept else value
    for k, value in enumerate(values)
  ]


class Carry:
  """A loop's carry without the weights that only pass through it."""

  def __init__(self, values: Sequence[Any], kept: Sequence[int]):
    self.kept = {k: values[k] for k in kept}
    self.count = len(values)
    self.free = self.pack(values)

  def pack(self, values: Sequence[Any]) -> list[Any]:
    return [value for k, value in enumerate(values) if k not in self.kept]

  def unpack(self, free: Sequence[Any], step: Any = None) -> list[Any]:
    left = iter(free)
    return [at_step(self.kept[k], step) if k in self.kept else next(left) for k in range(self.count)]


def at_step(value: Any, step: Any) -> Any:
  """A weight inside one step of a loop: every step has a dropout mask of its own."""
  if step is None or not isinstance(value, Factored) or value.key is None:
    return value
  return value.replace(key=jax.random.fold_in(value.key, step))


def _drops(values: Sequence[Any]) -> bool:
  return any(w.key is not None for w in weights_in(values))


def _scan(record: Record, eqn: Any, values: Sequence[Any]) -> list[Any]:
  params = eqn.params
  counts = scan_counts(params)
  if counts is None:
    raise Unfactorable("this version of JAX describes its scans in a way that cannot be read")
  n_consts, n_carry = counts
  consts, init, xs = values[:n_consts], values[n_consts : n_consts + n_carry], list(values[n_consts + n_carry :])
  kept = passed_through(params["jaxpr"], n_consts, n_carry, init)
  carry = Carry(_carried_in(record, init, kept, eqn), kept)
  keys: dict[int, Any] = {}
  for k, x in enumerate(xs):
    if isinstance(x, Factored):
      if x.shape[0] == 1:
        x = xs[k] = with_roles(x, "s" + x.roles[1:])
      if x.roles[0] != "s":
        xs[k] = record.materialize(
          x,
          "scan",
          record.source(eqn),
          f"a scan runs over its first axis, which has role {x.roles[0]!r}, not 's'",
        )
      else:
        keys[k], xs[k] = x.key, x.replace(key=None)
  steps = jnp.arange(params["length"]) if _drops(values) else None
  inner = closed(record, params["jaxpr"])

  def sliced(k: int, x: Any) -> Any:
    return x.replace(roles=x.roles[1:], key=keys[k]) if isinstance(x, Factored) else x

  def body(free, step_and_xs):
    step, here = step_and_xs
    here = [at_step(sliced(k, x), step) for k, x in enumerate(here)]
    with record.in_a_loop():
      out = inner(*(at_step(const, step) for const in consts), *carry.unpack(free, step), *here)
    new = plain_outputs(record, carry.pack(out[:n_carry]), eqn, "a scan")
    return new, [y.replace(key=None) if isinstance(y, Factored) else y for y in out[n_carry:]]

  options = {"_split_transpose": True} if params.get("_split_transpose") else {}
  free, ys = lax.scan(
    body,
    carry.free,
    (steps, xs),
    length=params["length"],
    reverse=params["reverse"],
    unroll=params["unroll"],
    **options,
  )
  by_path = {w.path: w.key for w in weights_in(values)}
  stacked = [y.replace(roles="s" + y.roles, key=by_path[y.path]) if isinstance(y, Factored) else y for y in ys]
  return [*carry.unpack(free), *stacked]


def _while(record: Record, eqn: Any, values: Sequence[Any]) -> list[Any]:
  params = eqn.params
  n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
  cond_consts, body_consts, init = values[:n_cond], values[n_cond : n_cond + n_body], values[n_cond + n_body :]
  kept = passed_through(params["body_jaxpr"], n_body, len(init), init)
  carry = Carry(_carried_in(record, init, kept, eqn), kept)
  condition, body = closed(record, params["cond_jaxpr"]), closed(record, params["body_jaxpr"])
  counted = _drops(values)

  def predicate(free):
    (holds_,) = plain_outputs(record, condition(*cond_consts, *carry.unpack(free)), eqn, "a loop's condition")
    return holds_

  def step(state):
    free, count = state
    at = count if counted else None
    with record.in_a_loop():
      out = body(*(at_step(const, at) for const in body_consts), *carry.unpack(free, at))
    new = plain_outputs(record, carry.pack(out), eqn, "a loop")
    # Under vmap every element has a predicate of its own: those that are through keep what they have.
    going = predicate(free) if many else None
    return [_where(going, *pair) for pair in zip(new, free, strict=True)], count + 1 if counted else None

  (holds_aval,) = open_jaxpr(params["cond_jaxpr"])[0].outvars
  many = bool(holds_aval.aval.shape)
  init_state = (carry.free, jnp.zeros((), jnp.int32) if counted else None)
  free, _ = lax.while_loop(lambda state: jnp.any(predicate(state[0])), step, init_state)
  return carry.unpack(free)


def _where(going: Any, new: Any, old: Any) -> Any:
  """`new` where `going` holds, along the axes that lead both."""
  if going is None:
    return new
  return lax.select(lax.broadcast_in_dim(going, jnp.shape(new), tuple(range(going.ndim))), new, old)


def _shard_map(record: Record, eqn: Any, values: Sequence[Any]) -> list[Any]:
  params = eqn.params
  inner = closed(record, params["jaxpr"])

  def specs(value: Any, spec: Any) -> Any:
    """The specs of a weight's parts: each factor is split as the axes that it holds, and along the rank never."""
    if not isinstance(value, Factored):
      return spec
    entries = (*spec, *(None,) * (len(value.roles) - len(spec)))

    def of_factor(own):
      axes = factor_axes(value.roles, own)
      return jax.sharding.PartitionSpec(*(None if isinstance(d, str) else entries[d] for d in axes))

    key = None if value.key is None else jax.sharding.PartitionSpec()
    return value.mapped(lambda factor, own: of_factor(own), base=spec, key=key)

  def body(*args):
    return tuple(plain_outputs(record, inner(*args), eqn, "a shard_map"))

  mapped = jax.shard_map(
    body,
    mesh=params["mesh"],
    in_specs=tuple(specs(*pair) for pair in zip(values, params["in_specs"], strict=True)),
    out_specs=tuple(params["out_specs"]),
    axis_names=set(params["newly_manual_axes"]),
    check_vma=params["check_vma"],
  )
  return list(mapped(*values))


def _readable(control: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
  """A control-flow rule that gives way, instead of crashing, where a JAX to come names its parameters otherwise."""

  @functools.wraps(control)
  def rule(record: Record, eqn: Any, values: Sequence[Any]) -> list[Any]:
    needed = _PARAMETERS[eqn.primitive.name]
    missing = [name for name in needed if name not in eqn.params]
    if missing:
      raise Unfactorable(f"this version of JAX describes `{eqn.primitive.name}` without {', '.join(missing)}")
    return control(record, eqn, values)

  return rule


# Calls that only hand values in and out.
_TRANSPARENT = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")

_PARAMETERS: dict[str, tuple[str, ...]] = {}


CONTROL_FLOW: dict[str, Callable[..., list[Any]]] = {}

for _names, _control, _needed in (
  (("jit", "pjit"), _jit, ("jaxpr", "name")),
  (("closed_call", "core_call"), _call, ("call_jaxpr",)),
  (("remat", "remat2", "checkpoint"), _remat, ("jaxpr", "policy", "prevent_cse")),
  (("cond",), _cond, ("branches",)),
  (("scan",), _scan, ("jaxpr", "length", "reverse", "unroll")),
  (("while",), _while, ("cond_nconsts", "body_nconsts", "cond_jaxpr", "body_jaxpr")),
  (("shard_map",), _shard_map, ("jaxpr", "mesh", "in_specs", "out_specs", "newly_manual_axes", "check_vma")),
):
  for _name in _names:
    CONTROL_FLOW[_name] = _readable(_control)
    _PARAMETERS[_name] = _needed
