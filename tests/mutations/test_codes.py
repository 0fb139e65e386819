"""Bugs in bases of codes, seeded one by one, of the silent kind: right shapes, wrong values, floats that are kept."""

import dataclasses

import jax.numpy as jnp

from jaxlora._adapt import from_floats
from jaxlora._platform.wait import at_once
from jaxlora._quant import again, array, blocks, encode, formats
from jaxlora._transform import coded, coded_equations, moves, product, wrap
from jaxlora.quant import _plan, _quantize, _report
from tests.mutations.seeding import Bug, assert_can_be_seeded, assert_caught, each, edited
from tests.quant import (
  test_formats,
  test_host,
  test_meshes,
  test_moves,
  test_refusals,
  test_starts,
  test_transform,
)

# ----------------------------------------------------------------------------------------------------------------------
# Formats.


def scales_of_other_blocks(patch):
  """Every block has the scale of the one that mirrors it."""
  spread = array.spread
  patch.setattr(array, "spread", lambda part, shape: spread(part[::-1], shape))


def the_next_code(patch):
  """Halfway between two values is nearer to the lower one than to the upper."""
  nf4 = formats.FORMATS["nf4"]
  up = nf4.writing._replace(encode=lambda x: nf4.writing.encode(x - 0.05))
  patch.setitem(formats.FORMATS, "nf4", nf4._replace(writing=up))


def means_that_are_lost(patch):
  """The mean of the scales is taken off, and not put back."""
  patch.setattr(encode, "written", edited(encode.written.__wrapped__, '"offset": mean', '"offset": 0 * mean'))


def scales_without_a_sign(patch):
  """Q4_0 has the code 8 for its largest element where that is above zero, which is none of its codes."""
  q4_0 = formats.FORMATS["q4_0"]
  unsigned = q4_0.writing._replace(scale=formats._largest(8))
  patch.setitem(formats.FORMATS, "q4_0", q4_0._replace(writing=unsigned))


def blocks_along_the_outputs(patch):
  """Scales are those of rows, and not of columns."""
  axes = _plan._axes

  def turned(*args):
    found = axes(*args)
    return dataclasses.replace(found, along=found.across, across=found.along)

  patch.setattr(_plan, "_axes", turned)


def floats_that_are_kept(patch):
  """What was written is not let go of."""
  kept, make = [], _quantize._quantized

  def keeping(path, leaf, *args):
    kept.append(jnp.array(leaf))
    return make(path, kept[-1], *args)

  patch.setattr(_quantize, "_quantized", keeping)


def errors_of_the_weight(patch):
  """What an update lost is told relative to the weight."""
  patch.setattr(_report, "update_error", lambda before, after, base: _report.relative_error(before, after))


def shards_that_cut_blocks(patch):
  """Nothing asks whether a device would hold a part of a block."""
  patch.setattr(_quantize, "check_shards", lambda *_: None)


# ----------------------------------------------------------------------------------------------------------------------
# Moves.


def scales_of_the_first_blocks(patch):
  """A slice that begins at a later block has the scales of the first ones."""
  cut = moves.cut

  def from_the_first(*args):
    found = cut(*args)
    return None if found is None else (0, found[1] - found[0])

  patch.setattr(moves, "cut", from_the_first)


def runs_that_are_not_consecutive(patch):
  """Axes that are merged have blocks across their seam."""
  patch.setattr(blocks, "_run", edited(blocks._run, "if k != n and not whole:", "if False:"))


def lookups_that_stay_in_bounds(patch):
  """A row that is out of bounds is the nearest, and not NaN."""
  lookup = edited(moves.lookup, "lax.GatherScatterMode.CLIP if of_codes else mode", "lax.GatherScatterMode.CLIP")
  patch.setattr(moves, "lookup", lookup)


def scales_of_the_first_slice(patch):
  """Where a slice begins is forgotten for the scales."""
  old, new = "(first, size) if k == n", "(zero, size) if k == n"
  patch.setattr(moves, "_dynamic_slice", edited(moves._dynamic_slice, old, new))


def scalars_of_the_first_step(patch):
  """Every equation that was put off takes the first one's scalar."""
  old, new = "self.scalars[first : first + step.others]", "self.scalars[: step.others]"
  patch.setattr(coded.Coded, "dequantize", edited(coded.Coded.dequantize, old, new))


# ----------------------------------------------------------------------------------------------------------------------
# Products.


def floats_ahead(patch):
  """The codes become floats before the function runs, and these are kept for the backward pass."""
  patch.setattr(wrap, "Coded", lambda node: node.dequantize())


def scalars_without_a_gradient(patch):
  """The tangent of a product along what multiplies its weight is left out."""
  patch.setattr(coded, "along_leaves", lambda fn, w, dw: [])


def codes_that_do_not_wait(patch):
  """Codes on the host are fetched once, and kept for the backward pass."""
  for module in (coded, product):
    patch.setattr(module, "how_it_waits", lambda w, policy: at_once)


def stacks_that_are_fetched(patch):
  """Where a function asks for a layer, its codes are residuals on the device."""
  old, new = "return value if isinstance(value, Coded) and target == jax.memory.Space.Device else ", "return "
  patch.setattr(coded_equations, "_sent", edited(coded_equations._sent, old, new))


def slices_of_what_was_fetched(patch):
  """A layer is cut out of the stack on the device."""
  patch.setattr(coded_equations, "ON_THE_HOST", ())


# ----------------------------------------------------------------------------------------------------------------------
# Starts, and what is written again.


def codes_of_all_floats(patch):
  """What the factors have is not taken off before the next step's codes."""
  patch.setattr(from_floats, "_rest", lambda floats, a, b, roles, scale: floats)


def factors_without_their_scale(patch):
  """A and B make up for the loss before the scale multiplies them."""
  pissa = from_floats.pissa
  patch.setattr(from_floats, "pissa", lambda key, w, rank, scale: pissa(key, w, rank, 1.0))


def codes_that_are_not_written_again(patch):
  """QPiSSA's base is the old one, whose principal part is there twice."""
  patch.setattr(from_floats, "encoded_as", lambda x, like: like)


def default_blocks(patch):
  """What is written again has blocks of its own."""
  old, new = "like.format, like.block,", "like.format, blocks_of(x.shape),"
  blocks_of = lambda shape: blocks.block_shape(shape, (0,), 64)
  patch.setitem(again.__dict__, "blocks_of", blocks_of)
  patch.setattr(test_starts.jaxlora.quant._merge, "encoded_as", edited(again.encoded_as, old, new))


HALF = {"format": "q4_0", "double": False}
BUGS = [
  Bug(scales_of_other_blocks, test_formats.test_errors_and_sizes, {"format": "nf4"}),
  Bug(the_next_code, test_formats.test_nf4_is_what_bitsandbytes_makes),
  Bug(means_that_are_lost, test_formats.test_nf4_is_what_bitsandbytes_makes),
  Bug(scales_without_a_sign, test_formats.test_blocks_of_zeros_are_zeros_and_what_is_representable_stays, HALF),
  Bug(blocks_along_the_outputs, test_refusals.test_kernels_of_which_nothing_tells_the_roles),
  Bug(floats_that_are_kept, test_formats.test_one_leaf_is_on_the_device_at_a_time, {"how": "quantize"}),
  Bug(errors_of_the_weight, test_starts.test_merged_into_codes, {"format": "int8", "double": False}),
  Bug(shards_that_cut_blocks, test_meshes.test_blocks_are_not_cut),
  Bug(scales_of_the_first_blocks, test_moves.test_each_move),
  Bug(runs_that_are_not_consecutive, test_moves.test_reshaped_parts,
      {"part": (1, 8, 6), "old": (8, 8, 6), "new": (64, 6), "found": None}),
  Bug(lookups_that_stay_in_bounds, test_transform.test_look_ups_out_of_bounds),
  Bug(scales_of_the_first_slice, test_moves.test_each_move),
  Bug(scalars_of_the_first_step, test_moves.test_each_move),
  Bug(floats_ahead, test_transform.test_residuals_are_codes, {"fn": test_transform.scanned}),
  Bug(scalars_without_a_gradient, test_transform.test_scalars_that_train_have_their_gradient, {"kind": "frozen codes"}),
  Bug(codes_that_do_not_wait, test_host.test_backward_passes_wait_for_their_cotangent),
  Bug(stacks_that_are_fetched, test_host.test_no_stack_is_on_the_device, {"fn": test_host.fetched}),
  Bug(slices_of_what_was_fetched, test_host.test_no_stack_is_on_the_device, {"fn": test_host.unrolled}),
  Bug(codes_of_all_floats, test_starts.test_loftq_is_the_papers_algorithm, {"init": "loftq_niter_2", "steps": 2}),
  Bug(factors_without_their_scale, test_starts.test_loftq_is_the_papers_algorithm, {"init": "residual", "steps": 1}),
  Bug(codes_that_are_not_written_again,
      test_starts.test_parts_of_the_floats_are_taken_out_and_the_rest_is_written, {"init": "olora"}),
  Bug(default_blocks, test_starts.test_merged_into_codes, {"format": "int8", "double": False}),
]  # fmt: skip


@each(BUGS)
def test_the_suite_fails_on(bug):
  assert_caught(bug)


def test_each_can_be_seeded():
  assert_can_be_seeded(BUGS)
