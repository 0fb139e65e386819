"""Programs: plain data that hypothesis draws, shrinks and prints.

A program is a tuple of steps such as `("transpose", (1, 0))`. There are three kinds of steps. Layout steps turn the
weight into another array, control-flow steps run all that follows inside of them, and one use ends the program. In a
strict program every step keeps the weight factored.
"""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any, NamedTuple

from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from tests import helpers

MAX_AXES, MAX_SIZE = 6, 400


@dataclasses.dataclass(frozen=True)
class Program:
  """One weight, what is done with it, and the shapes and values of its data."""

  shape: tuple[int, ...]
  roles: str
  rank: int
  alpha: float
  steps: tuple[tuple[Any, ...], ...]
  inputs: tuple[tuple[int, ...], ...]
  ids: tuple[Any, ...]
  start: int
  which: int

  def __call__(self, params: Any, data: Any) -> tuple[jax.Array, ...]:
    return tuple(y.astype(jnp.float64) for y in jax.tree.leaves(run(self.steps, params["w"], data)))

  def tree(self) -> Any:
    base = jax.device_put(1.5 + helpers.normal(0, self.shape, np.float64, 0.3))
    return {"w": helpers.factored(base, self.roles, self.rank, self.alpha, width=0.3)}

  def data(self) -> Any:
    return {
      "inputs": [helpers.array(10 + k, shape, np.float64) for k, shape in enumerate(self.inputs)],
      "ids": [jnp.asarray(ids, jnp.int32) for ids in self.ids],
      "scale": jnp.asarray(0.75, jnp.float64),
      "start": jnp.asarray(self.start, jnp.int32),
      "which": jnp.asarray(self.which, jnp.int32),
    }

  def names(self) -> set[str]:
    return {name for step in self.steps for name in names_in(step)}


def names_in(step: tuple[Any, ...]) -> set[str]:
  """The name of a step and of those inside it."""
  inner = itertools.chain(*step[1:]) if step[0] == "both" else ()
  return {step[0]}.union(*map(names_in, inner))


def run(steps: tuple[tuple[Any, ...], ...], w: Any, data: Any) -> Any:
  """What a program computes: a pytree of arrays."""
  (name, *params), *rest = steps
  step = STEPS[name]
  if step.kind == "use":
    return step.run(w, data, *params)
  following = lambda w, data: run(tuple(rest), w, data)
  if step.kind == "control":
    return step.run(following, w, data, *params)
  return following(step.run(w, data, *params), data)


class Step(NamedTuple):
  """What a step does, when it can be drawn, and how; `draw` gives its parameters and says what becomes of the roles."""

  kind: str
  run: Callable[..., Any]
  fits: Callable[["Drawer"], Any]
  draw: Callable[["Drawer"], tuple[Any, ...]]
  weight: int


STEPS: dict[str, Step] = {}


def step(
  kind: str,
  fits: Callable[..., Any] = lambda d: True,
  draw: Callable[..., tuple[Any, ...]] = lambda d: (),
  weight: int = 1,
):
  def register(fn):
    STEPS[fn.__name__.rstrip("_")] = Step(kind, fn, fits, draw, weight)
    return fn

  return register


class Drawer:
  """The weight's shape and roles so far, as the steps are drawn.

  Roles count in strict programs alone. An axis of size 1 may lie in either factor: its letter says nothing.
  """

  def __init__(self, draw: Callable[[Any], Any], strict: bool):
    self.draw, self.strict = draw, strict
    axes = draw(st.integers(2, 4))
    self.shape = tuple(draw(st.integers(1, 5)) for _ in range(axes))
    self.roles = "".join(draw(st.permutations("io" + "".join(draw(st.sampled_from("ios")) for _ in range(axes - 2)))))
    self.weight = self.shape, self.roles, draw(st.integers(1, 2)), draw(st.sampled_from([1.0, 2.0, 3.0]))
    self.inputs: list[tuple[int, ...]] = []
    self.ids: list[Any] = []
    self.seen: set[str] = set()  # the control flow that the rest is inside of
    self.in_both = self.batched_weight = False

  @property
  def axes(self) -> range:
    return range(len(self.shape))

  def axis(self, of: Any = None) -> int:
    return self.draw(st.sampled_from(list(self.axes if of is None else of)))

  def one_of(self, *choices: Any) -> Any:
    return self.draw(st.sampled_from(choices))

  def sizes(self, low: int, high: int) -> tuple[int, ...]:
    return tuple(self.draw(st.integers(low, high)) for _ in range(self.draw(st.integers(0, 2))))

  def order(self, items: Any) -> tuple[Any, ...]:
    return tuple(self.draw(st.permutations(list(items))))

  def of_role(self, role: str) -> list[int]:
    return [d for d in self.axes if self.roles[d] == role and self.shape[d] != 1]

  def kind(self, d: int) -> str:
    return "1" if self.shape[d] == 1 else self.roles[d]

  def drop(self, *gone: int) -> None:
    self.roles = "".join(self.roles[d] for d in self.axes if d not in gone)
    self.shape = tuple(self.shape[d] for d in self.axes if d not in gone)

  def usable(self, shape: tuple[int, ...], roles: str) -> bool:
    """Whether a strict program can still end in a product."""
    return not self.strict or any(n == 1 or role != "s" for n, role in zip(shape, roles, strict=True))

  def step(self, names: list[str]) -> tuple[Any, ...]:
    name = self.draw(st.sampled_from(names))
    drawn = STEPS[name]
    before = self.shape
    params = drawn.draw(self)
    if drawn.kind == "layout":
      weight = jax.ShapeDtypeStruct(before, jnp.float64)
      data = Program(*self.weight, (), (), tuple(self.ids), 0, 0).data()
      self.shape = jax.eval_shape(lambda w: drawn.run(w, data, *params), weight).shape
    return (name, *params)

  def fitting(self, kind: str) -> list[str]:
    steps = {name: step for name, step in STEPS.items() if step.kind == kind}
    return [name for name, step in steps.items() if step.fits(self) for _ in range(step.weight)]

  def steps(self, most: int, nested: int) -> tuple[tuple[Any, ...], ...]:
    """A chain of layout steps with control flow between them, and a use."""
    count = self.draw(st.integers(0, most))
    places = [self.draw(st.integers(0, count)) for _ in range(self.draw(st.integers(0, nested)))]
    out = []
    for k in range(count + 1):
      for _ in range(places.count(k)):
        out.append(self.step(self.fitting("control")))
        self.seen.add(out[-1][0])
      if k < count:
        out.append(self.step(self.fitting("layout")))
    return (*out, self.step(self.fitting("use")))


@st.composite
def programs(draw: Callable[[Any], Any], strict: bool = False) -> Program:
  d = Drawer(draw, strict)
  steps = d.steps(6, 2)
  start, which = draw(st.integers(-12, 12)), draw(st.integers(0, 2))
  return Program(*d.weight, steps, tuple(d.inputs), tuple(d.ids), start, which)
