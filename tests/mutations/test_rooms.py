"""Bugs in every folder of the library, seeded one by one: a named test of that folder fails on each."""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import jaxlora
from jaxlora._adapt import adapt
from jaxlora._base.matrix import LowRank, svd
from jaxlora._train import adalora, optimizer
from jaxlora._transform import control, factored, wrap
from jaxlora._transform.rules import dot
from jaxlora._weight import fingerprint
from jaxlora._weight.variant import VARIANTS, own_factors
from jaxlora.arithmetic import _formed
from jaxlora.init import _eva
from jaxlora.peft import _records
from jaxlora.serving import _slots
from jaxlora.svd import _low_rank, _ranks
from tests._adapt import test_adapt, test_initializers
from tests._train import test_optim
from tests._transform import test_dropout, test_oracle, test_parameters, test_wrap
from tests._weight import test_variants
from tests.arithmetic import test_arithmetic
from tests.checkpoint import test_refusals
from tests.init import test_from_data
from tests.mutations.seeding import Bug, altered, assert_can_be_seeded, assert_caught, each
from tests.peft import test_round_trips
from tests.serving import test_rows
from tests.svd import test_decompose

# ----------------------------------------------------------------------------------------------------------------------
# The transform.


def forward_scans(patch):
  """A scan that runs backwards is rebuilt as one that runs forwards."""
  forward = lambda *args, **options: lax.scan(*args, **options | {"reverse": False})
  patch.setattr(control, "lax", altered(lax, scan=forward))


def branches_in_reverse(patch):
  """The branches of a switch are rebuilt in another order."""
  reverse = lambda index, branches, *operands: lax.switch(index, branches[::-1], *operands)
  patch.setattr(control, "lax", altered(lax, switch=reverse))


def lost_policies(patch):
  """A remat is rebuilt without the user's policy."""
  saving_nothing = lambda fn, policy, **options: jax.checkpoint(fn, **options)
  patch.setattr(control, "jax", altered(jax, checkpoint=saving_nothing))


def scale_in_the_walk(patch):
  """The scale is in the factors already, and the transform applies it again."""

  def entering(weight, path, key):
    w = factored.factored(weight, path, key)
    return w.replace(b=w.b * jnp.asarray(weight.scale, w.b.dtype))

  patch.setattr(wrap, "factored", entering)


def base_that_trains(patch):
  """The base is behind no `stop_gradient`."""
  patch.setattr(factored, "lax", altered(lax, stop_gradient=lambda x: x))


def one_mask(patch):
  """Every use of a weight drops the same elements."""
  patch.setattr(dot, "dropped", lambda x, w, use, recipe: factored.dropped(x, w, 0, recipe))


def dropout_without_rescaling(patch):
  """What is kept is not divided by the share that is kept."""

  def dropped(x, w, use, recipe):
    x, recipe = factored.dropped(x, w, use, recipe)
    return x * jnp.asarray(1 - w.dropout, x.dtype), recipe

  patch.setattr(dot, "dropped", dropped)


# ----------------------------------------------------------------------------------------------------------------------
# Variants.


def norm_in_the_gradient(patch):
  """DoRA's norm is differentiated, too."""
  patch.setitem(VARIANTS, "dora", VARIANTS["dora_exact"])


def masked_terms_count(patch):
  """AdaLoRA's mask is not looked at."""
  record = VARIANTS["adalora"]
  unmasked = lambda parts: parts | {"keep": jnp.ones_like(parts["keep"])}
  patch.setitem(
    VARIANTS, "adalora", record._replace(factors=lambda parts, roles: record.factors(unmasked(parts), roles))
  )


def one_product_of_two(patch):
  """LoHa's second update is not multiplied in."""
  patch.setitem(VARIANTS, "loha", VARIANTS["loha"]._replace(factors=own_factors))


# ----------------------------------------------------------------------------------------------------------------------
# Adapting and training.


def start_left_in(patch):
  """What PiSSA starts from is not subtracted again."""
  patch.setattr(adapt, "start_subtracted", lambda weight, cancels: weight)


def subtracted_back(patch):
  """The base is what is left when the update is subtracted again, rounded twice."""

  def strip(tree):
    one = lambda node: node.materialize() - node.delta() if isinstance(node, jaxlora.LoraWeight) else node.base
    adapted = lambda node: isinstance(node, (jaxlora.LoraWeight, jaxlora.FullWeight))
    return jax.tree.map(lambda node: one(node) if adapted(node) else node, tree, is_leaf=adapted)

  patch.setattr(jaxlora, "strip", strip)


def raw_gradients(patch):
  """Frozen leaves get updates, as raw gradients are where they pass through `optax.masked`."""
  zeros = optimizer._zeros
  patch.setattr(optimizer, "_zeros", lambda leaf: jax.tree.map(lambda zero: zero + 1, zeros(leaf)))


def fast_a(patch):
  """LoRA+ gives A the higher rate."""
  trade = {"a": "b", "b": "a"}
  labels = optimizer.labels
  patch.setattr(optimizer, "labels", lambda tree: jax.tree.map(lambda label: trade.get(label, label), labels(tree)))


def lowest_scores_stay(patch):
  """Pruning keeps the terms that matter least."""
  highest = adalora._highest
  patch.setattr(adalora, "_highest", lambda scores, count: highest([-score for score in scores], count))


# ----------------------------------------------------------------------------------------------------------------------
# SVD, starts from data, arithmetic.


def one_term_too_few(patch):
  """The rank of a share of energy is one too small."""
  fewer = lambda *args: max(1, _ranks.rank_of_energy(*args) - 1)
  patch.setattr(_low_rank, "rank_of_energy", fewer)


def last_terms(patch):
  """A decomposition is cut to its smallest singular values."""

  def cut(self, rank):
    return LowRank(self.u[..., -rank:], self.s[..., -rank:], self.vt[..., -rank:, :], self.error)

  patch.setattr(LowRank, "cut", cut)


def least_varied_inputs(patch):
  """EVA keeps the directions in which the inputs vary least."""

  def joined(before, more):
    kept = before.s.shape[-1]
    found = svd(jnp.concatenate([part.s[..., None] * part.vt for part in (before, more)], axis=-2))
    return _eva.Directions(found.s[..., -kept:], found.vt[..., -kept:, :])

  patch.setattr(_eva, "_joined", joined)


def smallest_elements(patch):
  """Trimming keeps the elements that are smallest in magnitude."""
  record = _formed.FORMED["magnitude"]
  smallest = lambda x, density, key: x - record.sparse(x, 1 - density, key)
  patch.setitem(_formed.FORMED, "magnitude", record._replace(sparse=smallest))


# ----------------------------------------------------------------------------------------------------------------------
# Serving, checkpoints, PEFT.


def padding_that_counts(patch):
  """Ranks that an adapter lacks are padded with ones."""

  def padded(weight, rank):
    a, b = weight.factors()
    place = weight.roles.count("s")
    widths = [(0, rank - a.shape[place] if axis == place else 0) for axis in range(a.ndim)]
    return tuple(jnp.pad(factor, widths, constant_values=1) for factor in (a, b))

  patch.setattr(_slots, "padded", padded)


def bank_without_scales(patch):
  """A bank takes the factors without their scale."""
  padded = _slots.padded
  patch.setattr(
    _slots, "padded", lambda weight, rank: padded(dataclasses.replace(weight, alpha=float(weight.rank)), rank)
  )


def fingerprint_of_shapes(patch):
  """The values of a base are not looked at."""
  patch.setattr(fingerprint, "dispatched_digest", lambda leaf: "")


def alpha_for_the_scale(patch):
  """A folder's update is scaled by alpha, not by alpha / rank."""
  patch.setattr(_records.Module, "scale", property(lambda self: self.alpha))


def biases_left_out(patch):
  """The leaves that were trained whole are not merged into a base on disk."""
  merged = _records.Adapter.merged

  def without(self, name, tensor, **options):
    return np.asarray(tensor) if name in self.whole else merged(self, name, tensor, **options)

  patch.setattr(_records.Adapter, "merged", without)


BUGS = [
  Bug(forward_scans, test_oracle.test_factored_equals_merged, {"build": "dense", "wrap": "scan", "x64": None}),
  Bug(branches_in_reverse, test_oracle.test_factored_equals_merged, {"build": "dense", "wrap": "switch", "x64": None}),
  Bug(lost_policies, test_parameters.test_the_policy_of_a_remat_holds),
  Bug(scale_in_the_walk, test_oracle.test_factored_equals_merged, {"build": "dense", "wrap": "alone", "x64": None}),
  Bug(base_that_trains, test_wrap.test_the_base_gets_no_gradient, {"fn": lambda p, x: p["w"][jnp.array([2, 0])]}),
  Bug(one_mask, test_dropout.test_every_use_has_a_mask_of_its_own, {"fn": lambda p, x: (x @ p["w"], x @ p["w"])}),
  Bug(dropout_without_rescaling, test_dropout.test_dropout_acts_on_the_adapters_input_alone),
  Bug(norm_in_the_gradient, test_variants.test_the_norm_is_a_constant_of_doras_gradient_and_not_of_the_exact_ones,
      {"x64": None}),
  Bug(masked_terms_count, test_variants.test_adalora_drops_what_is_masked, {"x64": None}),
  Bug(one_product_of_two, test_variants.test_loha_is_the_hadamard_product_of_two_updates, {"x64": None}),
  Bug(start_left_in, test_initializers.test_the_adapted_model_is_the_base,
      {"init": "pissa", "scaling": "standard", "x64": None}),
  Bug(subtracted_back, test_adapt.test_strip_and_merge),
  Bug(raw_gradients, test_optim.test_train_state_leaves_the_base_bit_identical, {"gradient": jax.grad}),
  Bug(fast_a, test_variants.test_lora_plus_moves_b_faster, {"learning_rate": 0.01}),
  Bug(lowest_scores_stay, test_variants.test_pruning_keeps_the_budget_and_does_not_recompile),
  Bug(one_term_too_few, test_decompose.test_low_rank_by_energy, {"x64": None}),
  Bug(last_terms, test_decompose.test_low_rank_is_numpys_svd, {"x64": None}),
  Bug(least_varied_inputs, test_from_data.test_eva_is_the_svd_of_the_inputs, {"variant": "lora", "x64": None}),
  Bug(smallest_elements, test_arithmetic.test_sparse_merges_are_the_papers, {"method": "magnitude", "x64": None}),
  Bug(padding_that_counts, test_rows.test_padding_the_rank_changes_nothing),
  Bug(bank_without_scales, test_rows.test_each_row_is_its_adapter_alone, {"via": "gathered"}),
  Bug(fingerprint_of_shapes, test_refusals.test_a_wrong_base_is_an_error_that_names_the_leaves, {"tmp_path": None}),
  Bug(alpha_for_the_scale, test_round_trips.test_a_base_on_disk_is_merged_tensor_by_tensor, {"tmp_path": None}),
  Bug(biases_left_out, test_round_trips.test_a_base_on_disk_is_merged_tensor_by_tensor, {"tmp_path": None}),
]  # fmt: skip


@each(BUGS)
def test_the_suite_fails_on(bug):
  assert_caught(bug)


def test_each_can_be_seeded():
  assert_can_be_seeded(BUGS)
