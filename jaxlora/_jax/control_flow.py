"""Control flow as JAX describes it: the one list of its names, and one reading of its parameters for all versions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxlora._jax.jaxpr import Literal, open_jaxpr


class Unreadable(Exception):
  """An equation whose parameters this version of JAX describes in an unknown way."""


class Jit(NamedTuple):
  """`jax.jit` of an inner function. Shardings are those of the user, `None` or unspecified where there are none."""

  jaxpr: Any
  name: str
  in_shardings: Sequence[Any]
  out_shardings: Sequence[Any]
  options: dict[str, Any]


class Call(NamedTuple):
  """A call that hands values in and out, and nothing else."""

  jaxpr: Any


class Remat(NamedTuple):
  """`jax.checkpoint`; `backward` where this is its second half, in a differentiated program."""

  jaxpr: Any
  policy: Any
  prevent_cse: Any
  backward: bool


class CustomRule(NamedTuple):
  """A function with a derivative rule of its own, which must hold."""

  jaxpr: Any


class Branches(NamedTuple):
  """`lax.cond` and `lax.switch`, the index before the operands; or a branch for each platform."""

  branches: Sequence[Any]
  platforms: Sequence[Any] | None


class Scan(NamedTuple):
  """`lax.scan`; its operands are `constants`, then `carries`, then what it runs over."""

  jaxpr: Any
  constants: int
  carries: int
  length: int
  reverse: bool
  unroll: Any
  options: dict[str, Any]


class While(NamedTuple):
  """`lax.while_loop`; its operands are the condition's constants, the body's, and the carry."""

  condition: Any
  condition_constants: int
  body: Any
  body_constants: int


class ShardMap(NamedTuple):
  """`jax.shard_map`."""

  jaxpr: Any
  mesh: Any
  in_specs: Sequence[Any]
  out_specs: Sequence[Any]
  axis_names: set[Any]
  check_vma: bool


Structure = Jit | Call | Remat | CustomRule | Branches | Scan | While | ShardMap


def structure(eqn: Any) -> Structure | None:
  """What an equation of control flow holds; `None` for every other equation.

  Raises:
    Unreadable: where its parameters have an unknown form.
  """
  name = eqn.primitive.name
  reader = _READERS.get(name)
  if reader is None:
    return None
  try:
    return reader(eqn.params)
  except KeyError as missing:
    raise Unreadable(f"this version of JAX describes `{name}` without {missing.args[0]}") from missing
  except (AttributeError, TypeError, ValueError) as error:
    raise Unreadable(f"this version of JAX describes `{name}` in a way that cannot be read") from error


def called(eqn: Any) -> Any | None:
  """The inner jaxpr of a jitted function, or of one with a derivative of its own; `None` for others."""
  if eqn.primitive.name not in (*_JITS, "custom_jvp_call"):
    return None
  return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def forwarded(jaxpr: Any) -> list[int | None]:
  """Which operand of a jaxpr each result is, untouched; `None` for all others. Calls inside are looked through."""
  inner, _ = open_jaxpr(jaxpr)
  place = {var: k for k, var in enumerate(inner.invars)}

  def operand(atom: Any) -> int | None:
    return None if isinstance(atom, Literal) else place.get(atom)

  for eqn in inner.eqns:
    found = structure(eqn) if eqn.primitive.name in _TRANSPARENT else None
    if isinstance(found, (Jit, Call, Remat)) and any(operand(atom) is not None for atom in eqn.invars):
      for var, k in zip(eqn.outvars, forwarded(found.jaxpr), strict=True):
        if k is not None and (source := operand(eqn.invars[k])) is not None:
          place[var] = source
  return [operand(atom) for atom in inner.outvars]


def _jit(params: dict[str, Any]) -> Jit:
  inner, _ = open_jaxpr(params["jaxpr"])
  return Jit(
    params["jaxpr"],
    params["name"],
    params.get("in_shardings", (None,) * len(inner.invars)),
    params.get("out_shardings", (None,) * len(inner.outvars)),
    dict(params.get("compiler_options_kvs") or ()),
  )


def _remat(params: dict[str, Any]) -> Remat:
  return Remat(params["jaxpr"], params["policy"], params["prevent_cse"], bool(params.get("differentiated")))


def _high(params: dict[str, Any]) -> Structure | None:
  """What newer JAX holds in an object (`jax_remat3`, `jax_custom_vjp3`); `None` for any other kind of object."""
  held = params["_prim"]
  kind = type(held).__name__
  if kind == "RematTraced":
    prevent = held.prevent_cse if isinstance(held.prevent_cse, bool) else any(held.prevent_cse)  # one for each operand
    return Remat(held.jaxpr, held.policy, prevent, backward=False)
  if kind not in ("CustomVJPTraced", "CustomJVPTraced"):
    return None
  jaxpr = held.traced.jaxpr
  inner, _ = open_jaxpr(jaxpr)
  if len(inner.invars) != len(held.in_avals_flat):  # operands of its derivative alone
    raise ValueError(f"found {len(held.in_avals_flat)} operands, expected {len(inner.invars)}")
  return CustomRule(jaxpr)


def _scan(params: dict[str, Any]) -> Scan:
  if "num_consts" in params:  # up to 0.11
    constants, carries = params["num_consts"], params["num_carry"]
  else:  # 0.12
    consts, carry, _ = params["ft_in"].unpack()
    constants, carries = len(consts), len(carry)
  options = {"_split_transpose": True} if params.get("_split_transpose") else {}
  length, reverse, unroll = (params[name] for name in ("length", "reverse", "unroll"))
  return Scan(params["jaxpr"], constants, carries, length, reverse, unroll, options)


def _while(params: dict[str, Any]) -> While:
  return While(*(params[name] for name in ("cond_jaxpr", "cond_nconsts", "body_jaxpr", "body_nconsts")))


def _custom(params: dict[str, Any]) -> CustomRule | Call:
  """A derivative of its own, which must hold, unless `shortcut` says that it is JAX's."""
  inner, _ = open_jaxpr(params["call_jaxpr"])
  only = inner.eqns[0] if len(inner.eqns) == 1 else None
  if only is not None and only.primitive.name in _JITS and only.params["name"].startswith(SHORTCUT):
    return Call(params["call_jaxpr"])
  return CustomRule(params["call_jaxpr"])


def _shard_map(params: dict[str, Any]) -> ShardMap:
  axes = set(params["newly_manual_axes"])
  mesh, in_specs, out_specs = (params[name] for name in ("mesh", "in_specs", "out_specs"))
  return ShardMap(params["jaxpr"], mesh, in_specs, out_specs, axes, params["check_vma"])


SHORTCUT = (
  "jaxlora_shortcut"  # how the name of a jit begins that is all that a function with a derivative of its own does
)
_JITS = ("jit", "pjit")
_REMATS = ("remat", "remat2", "checkpoint")
_CALLS = ("closed_call", "core_call")
_CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call")
_HIGH = "call_hi_primitive"
_TRANSPARENT = (*_JITS, *_CALLS, *_REMATS, _HIGH)
_READERS: dict[str, Callable[[dict[str, Any]], Structure | None]] = {
  **dict.fromkeys(_JITS, _jit),
  **dict.fromkeys(_CALLS, lambda params: Call(params["call_jaxpr"])),
  **dict.fromkeys(_REMATS, _remat),
  **dict.fromkeys(_CUSTOM_RULES, _custom),
  _HIGH: _high,
  "cond": lambda params: Branches(params["branches"], params.get("branches_platforms")),
  "scan": _scan,
  "while": _while,
  "shard_map": _shard_map,
}
