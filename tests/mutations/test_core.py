"""Bugs in the core and beside it, seeded one by one, of the silent kind: right shapes, wrong values."""

import collections
import dataclasses

import jax
import jax.numpy as jnp

from jaxlora._adapt import halves
from jaxlora._adapt.observer import Observer
from jaxlora._adapt.probe import Probe
from jaxlora._jax.control_flow import Branches, Jit, Scan
from jaxlora._platform import expand, joint, policy, recipes, regions, wait
from jaxlora._transform import control, interpreter, products, transform, wrap
from jaxlora._transform.factored import Factored
from jaxlora._transform.rule import RULES
from jaxlora._transform.rules import conv, gather, layout, linear
from jaxlora._transform.rules import placement as placed
from jaxlora._weight import placement
from jaxlora._weight.weight import UNIT_SCALE
from jaxlora.checkpoint import _rebuild
from jaxlora.init._sketch import Sketch
from jaxlora.peft import _to_modules
from jaxlora.serving import _route, _routed, _ways
from tests._adapt import test_adapt, test_config
from tests._platform import test_recompute, test_regions
from tests._transform import (
  test_control_flow,
  test_dropout,
  test_interpreter,
  test_jitted_layers,
  test_meshes,
  test_oracle,
  test_products,
  test_rules,
)
from tests._transform import test_placement as transform_placement
from tests._weight import test_placement, test_weight
from tests.checkpoint import test_round_trips
from tests.init import test_from_data
from tests.mutations.seeding import Bug, assert_can_be_seeded, assert_caught, each, edited
from tests.peft import test_modules
from tests.serving import test_cache, test_rows

# ----------------------------------------------------------------------------------------------------------------------
# The walk.


def values_that_stay(patch):
  """Every value is held until the walk ends."""
  patch.setattr(interpreter, "_last_uses", lambda equations, results: collections.defaultdict(list))


def products_of_a_region_in_reverse(patch):
  """Weights that share an input get each other's thin products."""
  evaluate = transform.evaluate_region

  def reverse(*args):
    out, small, thin = evaluate(*args)
    return out, small, thin[::-1]

  patch.setattr(transform, "evaluate_region", reverse)


def lost_rewrites(patch):
  """The walk does not know that it may write a primitive in another way."""
  patch.setattr(_route, "_REWRITES", {})


# ----------------------------------------------------------------------------------------------------------------------
# Control flow.


def carries_in_reverse(patch):
  """What a loop carries is handed to its body in another order."""
  patch.setattr(control.Carry, "unpack", edited(control.Carry.unpack, "iter(free)", "iter(free[::-1])"))


def kept_results_in_reverse(patch):
  """Weights that leave a branch factored trade places."""
  old, new = "[out[k] if k in kept", "[out[min(kept) + max(kept) - k] if k in kept"
  patch.setitem(control.CONTROL, Branches, edited(control._branches, old, new))


def loops_that_go_on(patch):
  """Under `vmap`, elements that are through go on for as long as any other one does."""
  patch.setattr(control, "_where", lambda going, new, old: new)


def one_mask_for_all_steps(patch):
  """The key of a weight's dropout is not folded with the step of a loop."""
  patch.setattr(control, "at_step", lambda value, step: value)


def one_mask_for_all_leaves(patch):
  """The key of dropout is not folded with the leaf's path."""
  patch.setattr(wrap, "leaf_key", lambda key, path: key)


def one_mask_for_all_calls(patch):
  """A jit that was rebuilt before does not count its products."""
  patch.setattr(control, "_replay", edited(control._replay, "record.products[w.path] += 1", "pass"))


def jits_by_name(patch):
  """A rebuilt jit is used for every other one of its name."""
  patch.setitem(control.CONTROL, Jit, edited(control._jit, "key = (id(jit.jaxpr), own,", "key = (own,"))


def jits_without_shardings(patch):
  """A rebuilt jit is used for those with other shardings."""
  old, new = "own = (jit.name, tuple(jit.in_shardings), tuple(jit.out_shardings),", "own = (jit.name,"
  patch.setitem(control.CONTROL, Jit, edited(control._jit, old, new))


# ----------------------------------------------------------------------------------------------------------------------
# Rules.


def factors_that_stay(patch):
  """A transposition moves the base's axes, and not the factors'."""
  patch.setattr(
    layout,
    "permuted",
    lambda w, permutation, base: w.replace(base=base, roles="".join(w.roles[d] for d in permutation)),
  )


def slices_along_other_axes(patch):
  """The first two axes of a factor are sliced as each other."""
  patch.setattr(layout, "restricted", edited(layout.restricted, "per_axis[d]", "per_axis[(1, 0, 2)[d]]"))


def fill_in_the_update(patch):
  """Out of bounds a lookup's update is no zero."""
  patch.setitem(RULES[Factored], "gather", edited(gather._gather, "fill_value=0", "fill_value=1"))


def groups_that_share_ranks(patch):
  """A's kernel is laid out rank by rank, and not group by group."""
  old, new = "jnp.concatenate([kernel] * groups, axis=thin)", "jnp.repeat(kernel, groups, axis=thin)"
  patch.setitem(RULES[Factored], "conv_general_dilated", edited(conv._conv, old, new))


def scalars_in_both_factors(patch):
  """A scalar is multiplied into A as well as into B."""

  def scale(op, args):
    (out,), (w,) = linear._scale(op, args), [arg for arg in args if isinstance(arg, Factored)]
    return [out.replace(a=op.bind(*layout.args_with(args, w.a))[0])]

  for name in linear.SCALINGS:
    patch.setitem(RULES[Factored], name, scale)


def factors_that_do_not_trade_places(patch):
  """A weight that is used backwards keeps its A and its B."""
  patch.setattr(Factored, "flipped", edited(Factored.flipped, "a=self.b, b=self.a, ", ""))


# ----------------------------------------------------------------------------------------------------------------------
# Platforms.


def waiting_for_nothing(patch):
  """Residuals come out of the wait as zeros."""
  patch.setattr(wait, "_unchanged", lambda value, zero: jnp.zeros_like(value))


def update_without_a_derivative(patch):
  """The tangent of an adapted product is that of the base's product alone."""
  along = products.Along.__call__

  def of_the_base(self, residuals, steps):
    thin, weights = residuals
    zero = [(w, a, jnp.zeros_like(b)) for w, a, b in weights]
    return along(self, ([dataclasses.replace(h, array=jnp.zeros_like(h.array)) for h in thin], zero), steps)

  patch.setattr(products.Along, "__call__", of_the_base)


def second_derivatives_without_the_input(patch):
  """`h` is differentiated along A alone, where second derivatives need it along x, too."""
  patch.setattr(products, "completed", lambda h, x, a, shrink: h)


def joined_with_the_wrong_rank(patch):
  """The form for TPUs puts the thin products of an input in reverse order beside its cotangents."""
  transposed = joint.transpose_input
  patch.setattr(joint, "transpose_input", lambda each, cotangents, thin: transposed(each, cotangents, thin[::-1]))


def room_that_is_not_kept_free(patch):
  """The norm's own columns run into those of `h`."""
  patch.setattr(joint, "beside_norm", lambda wider, along, h, rank: wider)


def one_outer_product_too_few(patch):
  """The sum of outer products leaves out the last rank."""
  outer_sum = expand._outer_sum
  patch.setattr(expand, "_outer_sum", lambda rows, columns: outer_sum(rows[:, :-1], columns[:-1]))


def recipes_of_other_leaves(patch):
  """An input is rematerialised with its leaves the other way round."""
  patch.setattr(recipes, "_evaluate", edited(recipes._evaluate, "return leaves[step]", "return leaves[-1 - step]"))


def exponentials_with_the_derivative_of_a_line(patch):
  """An exponential that is made of a softmax's result has the derivative of the identity."""
  patch.setattr(regions, "_exp_with_value", regions._valued(lambda step, value: step))


def regions_by_their_shapes(patch):
  """Regions that differ in a constant alone share a trace."""
  old, new = "return str(atom.aval), repr(atom.val)", "return str(atom.aval)"
  patch.setattr(regions.Region, "signature", edited(regions.Region.signature, old, new))


def cpus_forms_for_gpus(patch):
  """A program for a GPU is written as a CPU's compiler likes it."""
  patch.setitem(policy.PLATFORMS, "gpu", dataclasses.replace(policy.CPU, name="gpu"))


# ----------------------------------------------------------------------------------------------------------------------
# Weights and data.


def specs_that_trade_places(patch):
  """A is partitioned as the outputs are, B as the inputs."""
  spec = placement.factor_spec
  patch.setattr(placement, "factor_spec", lambda base, roles, own: spec(base, roles, {"i": "o", "o": "i"}[own]))


def scale_of_one_by_alpha(patch):
  """A weight of given factors has alpha 1, and not scale 1."""
  patch.setitem(UNIT_SCALE, "standard", lambda rank: 1.0)


def halves_that_trade_parts(patch):
  """`join` takes A for B."""
  old, new = "with_parts(trainable, {", 'with_parts(with_parts(trainable, {"a": trainable.b, "b": trainable.a}), {'
  patch.setattr(halves, "_joined", edited(halves._joined, old, new))


def factors_that_stay_behind(patch):
  """A weight goes from device to device, and its factors do not."""
  moved = edited(placed._ppermute, "lax.ppermute(factor, name, pairs)", "factor")
  patch.setitem(RULES[Factored], "ppermute", moved)


def layers_that_are_not_stacked(patch):
  """The probe sees neither what a scan runs over nor what is gone before a product."""
  old = "self.observer.evidence[x.leaf].stacked |= {axis for _, axis in x.axes[0] - chunked}"
  patch.setattr(Probe, "_scan", edited(Probe._scan, old, "pass"))
  patch.setattr(Observer, "product", edited(Observer.product, "|= stacked | absent", "|= stacked"))


def one_round_of_a_loop(patch):
  """The probe does not follow what a loop carries into its next step."""
  old, new = "if new == carry:\n      return out, carry", "return out, new"
  patch.setattr(Probe, "_loop", edited(Probe._loop, old, new))


def sums_of_branches_dropped(patch):
  """The inputs that are seen within a branch are not counted."""

  def branches(handler, eqn, found, values):
    out, count = control._branches(handler, eqn, found, values), len(eqn.outvars)
    return [*out[:count], *map(jnp.zeros_like, out[count:])]

  patch.setitem(Sketch.controls, Branches, branches)


def sums_of_one_step(patch):
  """Of a scan's inputs those of its first step alone are counted."""
  patch.setitem(Sketch.controls, Scan, edited(control._scan, "jnp.sum(total, 0)", "total[0]"))


# ----------------------------------------------------------------------------------------------------------------------
# Serving, checkpoints, PEFT.


def everybodys_ranks(patch):
  """In a wide product every row gets the updates of all adapters."""
  patch.setattr(_ways, "_own_ranks", lambda h, slot: h)


def ids_clipped(patch):
  """An id that no adapter has is that of the nearest one."""
  for module in (_route, _routed, _ways):
    patch.setattr(module, "pick", lambda factors, slot: factors.at[slot].get(mode="clip", wrap_negative_indices=False))


def parts_read_for_each_other(patch):
  """A checkpoint's A is restored as B."""
  old, new = 'held.get("a"), held.get("b")', 'held.get("b"), held.get("a")'
  patch.setattr(_rebuild, "node_of", edited(_rebuild.node_of, old, new))


def torchs_factors_of_a_square(patch):
  """A square weight is written as its transpose's factors."""
  to_torch = _to_modules.factors_to_torch

  def transposed(*args):
    a, b = to_torch(*args)
    return (b.T, a.T) if a.shape == b.T.shape else (a, b)

  patch.setattr(_to_modules, "factors_to_torch", transposed)


ALONE = {"wrap": "alone", "x64": None}
ON_TPUS = {"make": "norm", "policies": ["tpu"], "x64": None}
SCANNED = {"fn": lambda p, x: jax.lax.scan(lambda c, _: (c, x @ p["w"]), 0.0, length=2)[1]}
ON_ONE_DEVICE = {"devices": lambda *trees: trees}

BUGS = [
  Bug(values_that_stay, test_interpreter.test_values_go_after_their_last_use),
  Bug(products_of_a_region_in_reverse, test_regions.test_gradients_are_the_same, {"name": "rms_norm", **ON_ONE_DEVICE}),
  Bug(lost_rewrites, test_cache.test_rows_that_write_to_one_place_write_together),
  Bug(carries_in_reverse, test_control_flow.test_carries_of_one_type_keep_their_places, {"loop": jax.lax.scan}),
  Bug(kept_results_in_reverse, test_control_flow.test_branches_hand_on_several_weights_in_their_places),
  Bug(loops_that_go_on, test_control_flow.test_a_batched_predicate_of_a_loop, {"x64": None}),
  Bug(one_mask_for_all_steps, test_dropout.test_every_use_has_a_mask_of_its_own, SCANNED),
  Bug(one_mask_for_all_leaves, test_dropout.test_every_leaf_has_masks_of_its_own),
  Bug(one_mask_for_all_calls, test_dropout.test_jitted_layers_have_dropout_masks_of_their_own),
  Bug(jits_by_name, test_jitted_layers.test_jitted_functions_of_one_name_are_told_apart),
  Bug(jits_without_shardings, test_meshes.test_jits_of_one_function_keep_their_own_shardings),
  Bug(factors_that_stay, test_rules.test_layouts, {"name": "transpose", "roles": "iio"}),
  Bug(slices_along_other_axes, test_rules.test_layouts, {"name": "slice", "roles": "iio"}),
  Bug(fill_in_the_update, test_rules.test_ids_out_of_bounds_have_the_users_fill, {"roles": "io", "fill": 0.0}),
  Bug(groups_that_share_ranks, test_oracle.test_factored_equals_merged, {"build": "conv_grouped"} | ALONE),
  Bug(scalars_in_both_factors, test_oracle.test_factored_equals_merged, {"build": "scaled_and_cast"} | ALONE),
  Bug(
    factors_that_do_not_trade_places,
    test_rules.test_products_of_a_square,
    {"fn": lambda w, x: jnp.tanh(x @ w) @ w.T},
  ),
  Bug(waiting_for_nothing, test_recompute.test_values_that_pass_through_waiting_are_untouched_bit_for_bit,
      {"dtype": "float32"}),
  Bug(update_without_a_derivative, test_oracle.test_factored_equals_merged, {"build": "dense"} | ALONE),
  Bug(second_derivatives_without_the_input, test_products.test_second_derivatives,
      {"policies": ["cpu"], "case": "few tokens", "x64": None}),
  Bug(joined_with_the_wrong_rank, test_products.test_norms_that_several_weights_read, ON_TPUS),
  Bug(room_that_is_not_kept_free, test_products.test_norms_that_several_weights_read, ON_TPUS),
  Bug(one_outer_product_too_few, test_oracle.test_factored_equals_merged, {"build": "used_twice"} | ALONE),
  Bug(recipes_of_other_leaves, test_recompute.test_gradients_are_the_same, {"activation": "quotient", **ON_ONE_DEVICE}),
  Bug(exponentials_with_the_derivative_of_a_line, test_regions.test_gradients_are_the_same,
      {"name": "softmax_by_hand", **ON_ONE_DEVICE}),
  Bug(regions_by_their_shapes, test_regions.test_regions_that_differ_are_told_apart),
  Bug(cpus_forms_for_gpus,
      test_recompute.test_one_device_waits_by_arithmetic_and_several_or_other_platforms_by_a_barrier),
  Bug(specs_that_trade_places, test_placement.test_parts_of_a_weight_on_a_mesh),
  Bug(scale_of_one_by_alpha, test_weight.test_from_factors_reads_the_rank_and_has_scale_one),
  Bug(halves_that_trade_parts, test_adapt.test_the_halves_of_square_weights_are_joined_part_by_part),
  Bug(
    factors_that_stay_behind,
    transform_placement.test_shards_come_together_by_factors,
    {"body": transform_placement.handed_on, "variant": "lora"},
  ),
  Bug(layers_that_are_not_stacked, test_oracle.test_the_probe_finds_the_roles, {"build": "scanned_layers"}),
  Bug(one_round_of_a_loop, test_config.test_what_a_loop_carries_into_its_next_step_is_seen),
  Bug(sums_of_branches_dropped, test_from_data.test_sketches_in_control_flow,
      {"build": "dense", "wrapper": "cond", "x64": None}),
  Bug(sums_of_one_step, test_from_data.test_sketches_in_control_flow,
      {"build": "dense", "wrapper": "scan", "x64": None}),
  Bug(everybodys_ranks, test_rows.test_each_row_is_its_adapter_alone, {"via": "wide"}),
  Bug(ids_clipped, test_rows.test_ids_that_are_none_are_the_base_where_they_are_traced),
  Bug(parts_read_for_each_other, test_round_trips.test_factors_of_one_shape_come_back_in_their_places,
      {"tmp_path": None}),
  Bug(torchs_factors_of_a_square, test_modules.test_names_and_axes_are_taken_both_ways),
]  # fmt: skip


@each(BUGS)
def test_the_suite_fails_on(bug):
  assert_caught(bug)


def test_each_can_be_seeded():
  assert_can_be_seeded(BUGS)
