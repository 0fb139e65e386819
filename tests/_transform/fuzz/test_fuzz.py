"""Random programs around one adapted weight, against the oracle: `wrap(f)(tree) == f(merge(tree))`."""

import itertools
from typing import Any

import hypothesis
import jax
import pytest

from tests import helpers
from tests._transform.fuzz.programs import Program, programs
from tests.helpers import POLICIES

TOLERANCE, NARROW_TOLERANCE = 1e-11, 1e-3  # the second where a program casts to float32: a wrong rule is wrong by more
EXAMPLES = itertools.count(1)


UNDER_ANY = hypothesis.strategies.sampled_from(list(POLICIES))


def check(program: Program, on_materialize: str, policy: str = "cpu") -> None:
  if next(EXAMPLES) % 200 == 0:
    jax.clear_caches()  # thousands of programs are compiled for one call each
  names = program.names()
  tolerance = NARROW_TOLERANCE if "float32" in repr(program.steps) else TOLERANCE
  args = program.tree(), (program.data(),), tolerance
  options = {"reverse": "while" not in names, "on_materialize": on_materialize}
  helpers.check(program, *args, **options, policies=[POLICIES[policy]])


def two_by_three(*steps: Any, ids: tuple[Any, ...] = (), start: int = 0) -> Program:
  return Program((2, 3), "io", 1, 1.0, steps, (), ids, start, 0)


# What the fuzz found once: ids out of bounds filled both factors as well as the base (with NaN, or with a number), and
# a start before the first element, already made positive once, was made positive again for the factors. And stacked
# axes that no input has were flattened in B, and not in what meets it.
ALONG_OUTPUTS = ("dot", 0, ((0,), (0,)), ((1,), (1,)), "right", None)
STACKED_OUTPUTS = Program((2, 3, 2, 2), "ioss", 1, 1.0, (ALONG_OUTPUTS,), ((2, 3),), (), 0, 0)


@pytest.mark.usefixtures("x64")
@hypothesis.given(programs(), UNDER_ANY)
@hypothesis.example(two_by_three(("lookup", 0, 0, "fill", True), ids=([0, 2],)), "cpu")
@hypothesis.example(two_by_three(("lookup", 0, 1, 0.5, False), ids=([0, 3],)), "tpu")
@hypothesis.example(STACKED_OUTPUTS, "cpu")
@hypothesis.example(two_by_three(("dynamic_slice", (0, "traced"), (2, 1)), ("whole",), start=-4), "none")
def test_random_programs_equal_the_merged_ones(program, policy):
  """Rules compose in ways that nobody lists: whatever a program does, it computes what it did with merged weights."""
  check(program, "ignore", policy)


@pytest.mark.usefixtures("x64")
@hypothesis.settings(max_examples=hypothesis.settings().max_examples // 3)
@hypothesis.given(programs(strict=True), UNDER_ANY)
def test_random_layouts_stay_factored(program, policy):
  """No layout within roles may cost the factored form: a silent fallback is a failure, not a slow success."""
  check(program, "error", policy)
