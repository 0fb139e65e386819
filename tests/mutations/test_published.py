"""Bugs that LoRA libraries have had, seeded one by one: a named test of this suite fails on each.

Weights are square where the bug would else be an error of shapes: what is silent must be caught by values.
"""

import dataclasses
import functools

import jax.numpy as jnp

from jaxlora._adapt import adapt, config, initializers, merge, plan
from jaxlora._base import matrix
from jaxlora._transform import factored, wrap
from jaxlora._weight.roles import low_rank_delta
from jaxlora._weight.variant import VARIANTS
from jaxlora._weight.weight import SCALINGS, LoraWeight
from jaxlora.arithmetic import _combine, _formed, _sums
from tests._adapt import test_adapt, test_initializers
from tests._transform import test_oracle
from tests._weight import test_variants
from tests.arithmetic import test_arithmetic
from tests.mutations.seeding import Bug, assert_can_be_seeded, assert_caught, each
from tests.svd import test_decompose

FACTORS, MERGED = LoraWeight.factors, merge._merged


def raw_alpha(patch):
  """The scale is alpha, not alpha / rank."""
  patch.setitem(SCALINGS, "standard", lambda alpha, rank: alpha)


def lost_root(patch):
  """RsLoRA's scale is alpha / rank."""
  patch.setitem(SCALINGS, "rslora", lambda alpha, rank: alpha / rank)


def swapped_factors(patch):
  """A over the outputs and B over the inputs, where the function runs; square weights do not mind the shapes."""

  def entering(weight, path, key):
    w = factored.factored(weight, path, key)
    return w.replace(a=w.b, b=w.a) if w.a.shape == w.b.shape else w

  patch.setattr(wrap, "factored", entering)


def ignored_overrides(patch):
  """The pattern of ranks is not looked at."""
  bare = lambda given: dataclasses.replace(given, overrides=None)
  patch.setattr(plan, "leaf_plan", lambda given, path: config.leaf_plan(bare(given), path))


def ignored_exclude(patch):
  """The pattern of excluded leaves is not looked at."""
  select = plan.select
  patch.setattr(plan, "select", lambda given, *rest: select(dataclasses.replace(given, exclude=None), *rest))


def merged_twice(patch):
  """A weight that is used in two places gets its update twice."""
  patch.setattr(
    merge,
    "_merged",
    lambda node, *rest: MERGED(
      dataclasses.replace(node, base=node.materialize()) if isinstance(node, LoraWeight) else node, *rest
    ),
  )


def scale_twice(patch):
  """The scale is in the factors already, and is applied again."""

  def factors(self):
    a, b = FACTORS(self)
    return a, b * jnp.asarray(self.scale, b.dtype)

  patch.setattr(LoraWeight, "factors", factors)


def magnitude_over_the_inputs(patch):
  """DoRA's norms are those of the rows; a square weight does not mind."""

  def gain(parts, roles, a, b):
    whole = parts["base"] + low_rank_delta(a, b, roles)
    return parts["magnitude"] / jnp.sqrt(jnp.sum(whole * whole, axis=1))[None]

  patch.setitem(VARIANTS, "dora", VARIANTS["dora"]._replace(gain=gain))
  patch.setattr(test_variants, "weight", functools.partial(test_variants.weight, shape=(6, 6)))


def base_changed_at_the_start(patch):
  """PiSSA's start is not taken off."""

  def factors(self):
    bare = dataclasses.replace(self, extra={n: x for n, x in self.extra.items() if n not in ("a0", "b0")})
    return FACTORS(bare)

  patch.setattr(LoraWeight, "factors", factors)


def one_key_for_all(patch):
  """Leaves of one shape start alike."""
  patch.setattr(adapt, "leaf_key", lambda key, path: key)


def fan_of_the_stack(patch):
  """The fan-in counts the stacked axes, too."""
  patch.setitem(
    initializers.INITIALIZERS,
    "kaiming",
    lambda key, shape, dtype, fan_in, rank: initializers.kaiming(key, shape, dtype, fan_in * shape[0], rank),
  )


def b_not_zero(patch):
  """The adapted model is not the base at first."""
  lora = VARIANTS["lora"]

  def start(given):
    return lora.start(given) | {"b": 1e-3 + jnp.zeros(given.b_shape, given.dtype)}

  patch.setitem(VARIANTS, "lora", lora._replace(start=start))


def sums_of_factors(patch):
  """PEFT's "linear": the factors are added, not the updates."""

  def exact(path, terms):
    first, moved = terms[0].node, [term for term in terms if isinstance(term.node, LoraWeight)]
    if len(moved) < 2 or len({term.node.rank for term in moved}) > 1:
      return _sums.exact(path, terms)
    a, b = (sum(abs(t.weight) ** 0.5 * getattr(t.node, name) for t in moved) for name in "ab")
    return dataclasses.replace(first, a=a, b=b)

  for module in (_combine, _formed):
    patch.setattr(module, "exact", exact)


def scale_lost_in_a_sum(patch):
  """A sum folds in the alphas, and not what rsLoRA makes of them."""

  def exact(path, terms):
    plain = lambda node: dataclasses.replace(node, scaling="standard") if isinstance(node, LoraWeight) else node
    return _sums.exact(path, [term._replace(node=plain(term.node)) for term in terms])

  for module in (_combine, _formed):
    patch.setattr(module, "exact", exact)


def dare_without_rescaling(patch):
  """What DARE keeps is not divided by the density."""
  dare = _formed.FORMED["dare"]
  drop = lambda x, density, key: dare.sparse(x, density, key) * jnp.asarray(density, x.dtype)
  patch.setitem(_formed.FORMED, "dare", dare._replace(sparse=drop))


def ties_without_signs(patch):
  """TIES averages all updates, whatever their signs."""
  ties = _formed.FORMED["ties"]
  patch.setitem(_formed.FORMED, "ties", ties._replace(total=lambda deltas: jnp.stack(list(deltas)).mean(0)))


def root_in_one_factor(patch):
  """The singular values are in both factors whole."""
  patch.setattr(matrix.LowRank, "factors", lambda self: (self.s[..., None] * self.u.mT, self.s[..., None] * self.vt))


BUGS = [
  Bug(raw_alpha, test_adapt.test_merge_is_the_formula, {"x64": None}),
  Bug(lost_root, test_adapt.test_exclude_overrides_and_train),
  Bug(swapped_factors, test_oracle.test_factored_equals_merged, {"build": "used_twice", "wrap": "alone", "x64": None}),
  Bug(ignored_overrides, test_adapt.test_alpha_defaults_to_the_rank_of_the_leaf),
  Bug(ignored_exclude, test_adapt.test_exclude_overrides_and_train),
  Bug(merged_twice, test_oracle.test_factored_equals_merged, {"build": "embed_tied", "wrap": "alone", "x64": None}),
  Bug(scale_twice, test_adapt.test_merge_is_the_formula, {"x64": None}),
  Bug(magnitude_over_the_inputs, test_variants.test_dora_is_the_magnitude_times_the_direction, {"x64": None}),
  Bug(
    base_changed_at_the_start,
    test_initializers.test_variants_of_a_product_start_so_too,
    {"variant": "lora_fa", "x64": None},
  ),
  Bug(one_key_for_all, test_adapt.test_every_leaf_has_a_key_of_its_own),
  Bug(fan_of_the_stack, test_adapt.test_initialisers, {"init": "kaiming", "variance": 1 / (3 * 400)}),
  Bug(b_not_zero, test_adapt.test_initialisers, {"init": "gaussian", "variance": 1 / 256}),
  Bug(sums_of_factors, test_arithmetic.test_opposite_weights_cancel, {"x64": None}),
  Bug(scale_lost_in_a_sum, test_arithmetic.test_exact_is_the_sum_of_the_deltas, {"x64": None}),
  Bug(dare_without_rescaling, test_arithmetic.test_dare_drops_and_rescales, {"x64": None}),
  Bug(ties_without_signs, test_arithmetic.test_sparse_merges_are_the_papers, {"method": "ties", "x64": None}),
  Bug(root_in_one_factor, test_decompose.test_low_rank_is_numpys_svd, {"x64": None}),
]


@each(BUGS)
def test_the_suite_fails_on(bug):
  assert_caught(bug)


def test_each_can_be_seeded():
  assert_can_be_seeded(BUGS)
