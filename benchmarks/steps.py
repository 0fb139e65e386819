"""Compiles, checks and times the contestants' training steps."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from contestants import FLOOR, Contestant, Program
import harness
import jax
import jax.numpy as jnp
import numpy as np
from settings import Base, Batch, loss_of


class Compiled(NamedTuple):
  """A compiled step, and XLA's figures of it.

  Attributes:
    program: the program it was compiled from.
    call: the compiled step.
    flops: None for a scanned model, since XLA counts the body of a loop once.
    bytes: of temporaries, arguments, results, and results that alias an argument.
  """

  program: Program
  call: Callable[..., Any]
  flops: float | None
  bytes: dict[str, int]


def compile_step(program: Program, base: Base) -> Compiled:
  """Compiles ahead of time: check, timing and A/A control run the same program."""
  compiled = jax.jit(program.step, donate_argnums=0).lower(program.state, program.frozen, base.batch).compile()
  flops = None if base.settings.scan else compiled.cost_analysis()["flops"]
  memory = compiled.memory_analysis()
  sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("temp", "argument", "output", "alias")}
  return Compiled(program, compiled, flops, sizes)


def runner(compiled: Compiled, batch: Batch) -> Callable[[], Any]:
  """A training loop: each call takes the next step, starting from a copy of the program's state."""
  state = jax.tree.map(jnp.copy, compiled.program.state)

  def run() -> Any:
    nonlocal state
    state, loss = compiled.call(state, compiled.program.frozen, batch)
    return state, loss

  return run


def check_trains(contestant: Contestant, compiled: Compiled, base: Base, steps: int = 5) -> dict[str, Any]:
  """Trains for a few steps on one batch, and returns the losses and counts.

  Raises:
    RuntimeError: if it does not start at the base's loss, its loss does not fall, its base changes, or the number of
      parameters that it trains is wrong.
  """
  program = compiled.program
  before = program.base and jax.tree.map(np.array, program.base(program.state, program.frozen))
  first = float(
    jax.jit(lambda params, batch: loss_of(base.model.apply({"params": params}, batch.x), batch.y))(
      base.params, base.batch
    )
  )
  run = runner(compiled, base.batch)
  losses = []
  for _ in range(steps):
    state, loss = run()
    losses.append(float(loss))
  unchanged = None
  if before is not None:
    unchanged = jax.tree.all(jax.tree.map(np.array_equal, before, program.base(state, program.frozen)))
  check = {
    "losses": losses,
    "base_unchanged": unchanged,
    "starts_at_base": abs(losses[0] - first) < (2e-2 if base.model.dtype == jnp.bfloat16 else 1e-4) * first,
    "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(program.trained(program.state))),
  }
  faults = {
    "its loss does not fall": not losses[-1] < losses[0],
    "its base moves": unchanged is False,
    "it does not start where the base is": not check["starts_at_base"],
    "it does not train the parameters that it should": check["trainable_parameters"] != contestant.trainable(base),
  }
  if any(faults.values()):
    raise RuntimeError(f"{contestant.name}: {', '.join(fault for fault, found in faults.items() if found)}: {check}")
  return check


class Entry(NamedTuple):
  """A compiled contestant, and the result of its check; the floor has none."""

  compiled: Compiled
  check: dict[str, Any] | None


def prepare(base: Base, here: Sequence[Contestant], tick: Callable[[str], Any]) -> dict[str, Entry]:
  """Compiles and checks all contestants; `tick` is called with the next one's name."""
  entries = {}
  for contestant in here:
    tick(f"compiling {contestant.name}")
    compiled = compile_step(contestant.build(base), base)
    check = None if contestant.name == FLOOR else check_trains(contestant, compiled, base)
    entries[contestant.name] = Entry(compiled, check)
  return entries


def time_steps(
  base: Base, entries: dict[str, Entry], rounds: int, tick: Callable[[int], Any]
) -> dict[str, list[float]]:
  """Seconds per step, round by round, with the floor again as the A/A control; `tick` is called after every turn."""
  runs = {name: runner(entry.compiled, base.batch) for name, entry in entries.items()}
  runs = harness.with_control(runs, FLOOR, runner(entries[FLOOR].compiled, base.batch))
  return harness.interleave(runs, rounds, harness.calls_per_turn(runs), lambda calls: tick(1))


def turns(entries: int, rounds: int) -> int:
  """How often `prepare` and `time_steps` tick, for the progress bar."""
  return entries + (entries + 1) * (rounds + 1)
