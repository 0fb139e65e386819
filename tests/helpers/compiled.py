"""What a function is traced and compiled to: jaxprs, products, FLOPs and bytes."""

from collections.abc import Callable
import math
import os
from typing import Any

import jax

import jaxlora

# As users compile, whatever the suite does to compile fast.
OPTIMISED = {"xla_backend_optimization_level": 3}
if "fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
  OPTIMISED["xla_cpu_use_fusion_emitters"] = True


def equations(jaxpr: Any):
  """Every equation of a jaxpr and of those inside it."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in inner_jaxprs(eqn):
      yield from equations(inner)


def inner_jaxprs(eqn: Any):
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
        yield item


def optimised(step: Callable[..., Any], *args: Any) -> Any:
  """Compiled as users compile: the suite itself compiles without optimisation."""
  return jax.jit(step, compiler_options=OPTIMISED).lower(*args).compile()


def temp_bytes(step: Callable[..., Any], *args: Any) -> int:
  """What XLA has to hold at once beside arguments and results."""
  return optimised(step, *args).memory_analysis().temp_size_in_bytes


def product_flops(step: Callable[..., Any], *args: Any) -> int:
  """Of every matrix product of a step."""
  total = 0
  for eqn in products(step, *args):
    (summed, _), _ = eqn.params["dimension_numbers"]
    total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[d] for d in summed)
  return total


def products(step: Callable[..., Any], *args: Any) -> list[Any]:
  """The equations of the matrix products of a step."""
  return [eqn for eqn in traced(step, *args) if eqn.primitive.name == "dot_general"]


def traced(step: Callable[..., Any], *args: Any) -> list[Any]:
  """Every equation of a step."""
  return list(equations(jax.make_jaxpr(step)(*args)))


def weight_shaped_products(fn: Callable[..., Any], tree: Any, args: tuple[Any, ...]) -> list[str]:
  """Equations whose result depends on A and on B of a weight, but on no data: a delta, however it is laid out.

  Dependence is followed through inner jaxprs, too. Results of fewer elements than the weight do not count.
  """
  leaves, treedef = jax.tree.flatten((tree, args))
  kinds = jax.tree.leaves((jaxlora.labels(tree), jax.tree.map(lambda _: "data", args)))
  flat = lambda *leaves: jax.tree.leaves(fn(*_unpack(jax.tree.unflatten(treedef, leaves))))
  traced = jax.make_jaxpr(flat)(*leaves)
  found: list[str] = []

  def walk(jaxpr, inputs):
    consts = [frozenset({"data"}) if var.aval.shape else frozenset() for var in jaxpr.constvars]
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: frozenset() if hasattr(atom, "val") else env[atom]
    for eqn in jaxpr.eqns:
      kinds_in = [read(atom) for atom in eqn.invars]
      union = frozenset().union(*kinds_in)
      outs = [union] * len(eqn.outvars)
      inner = [getattr(item, "jaxpr", item) for item in inner_jaxprs(eqn)]
      for sub in inner:
        offset = len(kinds_in) - len(sub.invars)
        if offset >= 0:
          outs = walk(sub, kinds_in[offset:])
          outs = [*outs, *[union] * (len(eqn.outvars) - len(outs))][: len(eqn.outvars)]
      for var, kind in zip(eqn.outvars, outs, strict=True):
        env[var] = kind
        if {"a", "b"} <= kind and "data" not in kind and not inner:
          found.append(f"{eqn.primitive.name} -> {var.aval}")
    return [read(atom) for atom in jaxpr.outvars]

  walk(getattr(traced, "jaxpr", traced), [frozenset({kind}) for kind in kinds])
  return found


def _unpack(tree_and_args):
  tree, args = tree_and_args
  return (tree, *args)
