"""Programs compiled ahead of time for one chip, from shapes alone: no array is made, and nothing is run."""

from collections.abc import Callable, Sequence
import re
from typing import Any, NamedTuple

from chips import Chip
from contestants import Contestant
import hlo
import jax
from settings import Base, Settings, base_shapes

MOST = 1 << 14  # sequences per step that are tried


class Target(NamedTuple):
  """A chip, and one device of its topology."""

  chip: Chip
  device: Any


def compile_for(target: Target, contestant: Contestant, base: Base) -> Any:
  """A contestant's step, compiled for a chip from the shapes in `base`."""
  built = None

  def arrays(base_arrays: tuple[Any, Any]) -> tuple[Any, Any]:
    nonlocal built
    built = contestant.build(base._replace(params=base_arrays[0], batch=base_arrays[1]))
    return built.state, built.frozen

  shapes = (*jax.eval_shape(arrays, (base.params, base.batch)), base.batch)
  return compile_shapes(target, built.step, shapes, donated=0)


def compile_shapes(target: Target, fn: Callable[..., Any], shapes: Sequence[Any], donated: int) -> Any:
  """A function compiled for a chip; operand `donated` may be overwritten."""
  placed = jax.sharding.SingleDeviceSharding(target.device)
  args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), tuple(shapes))
  traced = jax.jit(fn, donate_argnums=donated).trace(*args)
  return traced.lower(lowering_platforms=(target.chip.lowered_for,)).compile(compiler_options=target.chip.options)


def figures(compiled: Any, chip: Chip, settings: Settings) -> dict[str, Any]:
  """The compiler's figures of a step; None is what it does not say.

  Bytes and a TPU's FLOPs are left out for a scanned model: the body of a loop is counted once, or with its whole stack.
  """
  text = compiled.as_text()
  if chip.platform == "tpu":
    cost = {} if settings.scan else compiled.cost_analysis()
    found = {
      "cycles": hlo.cycles(text, settings.layers),
      "flops": cost.get("flops"),
      "bytes": cost.get("bytes accessed"),
    }
  else:
    calls = hlo.gemms(text, settings.layers)
    outside = None if settings.scan else calls.bytes_outside
    found = {
      "gemms": calls.calls,
      "flops": calls.flops,
      "bytes_outside": outside,
      "bytes": None if outside is None else outside + calls.bytes,
    }
  return {"temp": compiled.memory_analysis().temp_size_in_bytes, **found}


# ----------------------------------------------------------------------------------------------------------------------
# What fits.


def largest(fits: Callable[[int], bool], begin: int = 1, most: int = MOST) -> int:
  """The largest number that fits, to a sixteenth: by powers of two, then between two of them. 0 if 1 does not.

  Args:
    fits: whether a number does; whatever is larger than one that does not fit, does not.
    begin: a power of two to begin at.
    most: where to stop.
  """
  if fits(begin):
    low = begin
    while low < most and fits(2 * low):
      low *= 2
    high = 2 * low
  else:
    high = begin
    while high > 1 and not fits(high // 2):
      high //= 2
    low = high // 2
  while low < most and high - low > max(1, low // 16):
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


def refused(error: jax.errors.JaxRuntimeError) -> dict[str, Any]:
  """What a TPU's compiler says of a step that is too large: the GiB that it needs where it says them, and its words.

  Raises:
    jax.errors.JaxRuntimeError: the error, if it is another one.
  """
  if "RESOURCE_EXHAUSTED" not in str(error):
    raise error
  said = re.search(r"\(([\d.]+)G\) exceeds|Used ([\d.]+)G of", str(error))
  return {"needs": float(said[1] or said[2]) if said else None, "said": str(error)[:500]}


def step_fits(target: Target, contestant: Contestant, settings: Settings) -> bool:
  """Whether a step fits into the chip's memory; a TPU's compiler says so itself."""
  try:
    compiled = compile_for(target, contestant, base_shapes(settings))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return False
  memory = compiled.memory_analysis()
  needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return target.chip.memory is None or needed + memory.temp_size_in_bytes <= target.chip.memory
