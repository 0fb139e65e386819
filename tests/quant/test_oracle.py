"""`wrap(f)(tree)` equals `f(merge(dequantize(tree)))` on quantised trees, values and gradients."""

import jax
import jax.numpy as jnp
import pytest

import jaxlora
from tests import helpers


def crossed():
  """Every legal pair; by default every fourth builder, each in one kind of control flow: every policy meets others."""
  for k, build in enumerate(helpers.BUILDERS):
    wraps = [wrap for wrap in helpers.WRAPPERS if helpers.legal(build, wrap)]
    for j, wrap in enumerate(wraps):
      kept = k % 4 == 0 and j == (5 * k // 4) % len(wraps)
      yield pytest.param(build, wrap, marks=() if kept else pytest.mark.nightly)


def is_leaf(node):
  return isinstance(node, jaxlora.LoraWeight | jaxlora.QuantizedArray)


def quantised(case, format="nf4", **options):
  """The case's parameters with every weight in codes. Blocks of 4: the weights are small."""
  targets = lambda path, leaf: path in case.roles
  return jaxlora.quantize(case.params, format, **{"block_size": 4, "targets": targets, "axes": case.roles} | options)


def adapted(case, *args, **options):
  """The case's adapted tree on bases in codes."""
  on = lambda node, base: node.with_parts({"base": base}) if isinstance(node, jaxlora.LoraWeight) else node
  return jax.tree.map(on, case.adapted(), quantised(case, *args, **options), is_leaf=is_leaf)


@pytest.mark.parametrize(("build", "wrap"), crossed())
def test_factored_on_codes_equals_merged(build, wrap, x64):
  case = helpers.BUILDERS[build](jnp.float64)
  helpers.check(
    helpers.WRAPPERS[wrap](case.fn),
    adapted(case),
    case.args,
    1e-12,
    reverse=wrap not in helpers.FORWARD_ONLY,
    on_materialize="ignore",
  )
