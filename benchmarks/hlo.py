"""Figures from the text of optimised HLO, which is what a compiler has made of a program for one chip.

Only what a chip executes is counted: the instructions of the ENTRY computation, and those of the bodies of its loops as
often as they run. What is inside of a fusion belongs to the fusion; products and collectives are looked for there, too.
"""

import collections
from collections.abc import Iterator, Mapping
import math
import re
from typing import NamedTuple

# These move no bytes: names of others' results; and what is counted where it begins, or where its body is.
_NAMES = frozenset({"bitcast", "constant", "get-tuple-element", "parameter", "tuple", "after-all"})
_ELSEWHERE = frozenset({"while", "call", "async-start", "async-update", "async-done", "copy-done"})
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d\w*)\[(?P<shape>[\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?")
_BODY = re.compile(r"\b(?:body|to_apply|calls)=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_BOUND = re.compile(r" constant\((\d+)\)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
_WINDOW = re.compile(r"\b(size|pad|lhs_dilate)=([\dx_]+)")
_SUMMED = re.compile(r"lhs_contracting_dims={([\d,]*)}")
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')


class Instruction(NamedTuple):
  """One line of HLO.

  Attributes:
    name: of its result.
    type: of its result, as text: an array's, or a tuple's.
    opcode: what it does.
    operands: names of its operands.
    text: the whole line.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  text: str


Computation = Mapping[str, Instruction]


class Executed(NamedTuple):
  """An instruction that runs, how often it does in one step, and the computation that its operands are in."""

  instruction: Instruction
  times: int
  computation: Computation


# ----------------------------------------------------------------------------------------------------------------------
# From text to instructions.


def parse(line: str) -> Instruction | None:
  """The instruction of a line, if there is one."""
  line = re.sub(r"/\*.*?\*/", "", line.strip())
  found = _INSTRUCTION.match(line)
  if not found:
    return None
  operands = re.findall(r"%([\w.\-]+)", _until_closed(found["rest"]))
  return Instruction(found["name"], found["type"], found["opcode"], tuple(operands), line)


def _until_closed(text: str) -> str:
  """The text ahead of the parenthesis that closes one opened before it."""
  depth = 1
  for k, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return text[:k]
  return text


def computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  """The computations of a module by name, each with its instructions by name; and the name of ENTRY.

  Raises:
    ValueError: if there is no ENTRY.
  """
  found: dict[str, dict[str, Instruction]] = {}
  inside, entry = None, None
  for line in text.splitlines():
    begin = None if line.startswith(" ") else _COMPUTATION.match(line)
    if begin:
      inside = found.setdefault(begin["name"], {})
      entry = begin["name"] if begin["entry"] else entry
    elif line.startswith("}"):
      inside = None
    elif inside is not None and (instruction := parse(line)):
      inside[instruction.name] = instruction
  if entry is None:
    raise ValueError("this text has no ENTRY computation: it is not an HLO module")
  return found, entry


def executed(text: str, trips: int) -> Iterator[Executed]:
  """All instructions that run.

  Args:
    text: of the optimised HLO.
    trips: how often a loop runs of which neither its own line nor its condition says so.
  """
  found, entry = computations(text)

  def walk(name: str, times: int) -> Iterator[Executed]:
    for instruction in found[name].values():
      yield Executed(instruction, times, found[name])
      if instruction.opcode in ("while", "call", "async-start") and (body := _BODY.search(instruction.text)):
        again = 1 if instruction.opcode != "while" else _times(instruction, found, trips)
        # the estimate of what is called may stand at the call already
        if body[1] in found and not _CYCLES.search(instruction.text):
          yield from walk(body[1], times * again)

  return walk(entry, 1)


def _times(loop: Instruction, found: Mapping[str, Computation], trips: int) -> int:
  """How often a loop runs: as it says, or the one number that its condition compares with, or `trips`."""
  if known := _TRIPS.search(loop.text):
    return int(known[1])
  condition = found.get(name[1], {}) if (name := _CONDITION.search(loop.text)) else {}
  less = any("direction=LT" in one.text for one in condition.values())
  bounds = [int(bound[1]) for one in condition.values() if (bound := _BOUND.search(one.text))]
  return bounds[0] if less and len(bounds) == 1 else trips


def inside(text: str, trips: int) -> Iterator[Executed]:
  """All instructions that run, those inside of fusions in the place of the fusions."""
  found, _ = computations(text)

  def walk(one: Executed) -> Iterator[Executed]:
    body = _BODY.search(one.instruction.text) if one.instruction.opcode == "fusion" else None
    if body is None or body[1] not in found:
      yield one
      return
    for instruction in found[body[1]].values():
      yield from walk(Executed(instruction, one.times, found[body[1]]))

  for one in executed(text, trips):
    yield from walk(one)


# ----------------------------------------------------------------------------------------------------------------------
# Figures.


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
  """Dtype and shape of each array in a type."""
  return [
    (found["dtype"], tuple(int(size) for size in found["shape"].split(",") if size)) for found in _ARRAY.finditer(type_)
  ]


def bytes_of(type_: str) -> int:
  """Bytes of a type's arrays, without padding."""
  total = 0
  for dtype, shape in arrays(type_):
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    total += math.ceil(bits * math.prod(shape) / 8)
  return total


def cycles(text: str, trips: int) -> int:
  """The TPU compiler's own estimate of a step. Asynchronous copies, collectives and Pallas's kernels have none."""
  total = 0
  for one in executed(text, trips):
    found = _CYCLES.search(one.instruction.text)
    total += one.times * int(found[1]) if found else 0
  return total


def communicated(text: str, trips: int) -> collections.Counter[str]:
  """Bytes of the results of collectives on one device, by kind; those inside of fusions, too, each channel once."""
  total: collections.Counter[str] = collections.Counter()
  seen = set()
  for one in inside(text, trips):
    found = _COLLECTIVE.fullmatch(one.instruction.opcode)
    channel = _CHANNEL.search(one.instruction.text)
    if found and (channel is None or channel[1] not in seen):
      seen.add(channel and channel[1])
      total[found[1]] += one.times * bytes_of(one.instruction.type)
  return total


def product_flops(text: str, trips: int) -> int:
  """FLOPs of all matrix products: two for each number of a result and of its contracted axes.

  On a TPU products are convolutions. An axis of their windows that is dilated or padded stands for a batch, of which
  each number of the result meets one place; any other is summed over.
  """
  total = 0
  for one in inside(text, trips):
    summed = {"dot": _summed_by_dot, "convolution": _summed_by_convolution}.get(one.instruction.opcode)
    if summed is not None:
      (_, result), *_ = arrays(one.instruction.type)
      total += one.times * 2 * math.prod(result) * summed(one)
  return total


def _operand_shape(one: Executed, k: int) -> tuple[int, ...]:
  (_, shape), *_ = arrays(one.computation[one.instruction.operands[k]].type)
  return shape


def _summed_by_dot(one: Executed) -> int:
  axes = _SUMMED.search(one.instruction.text)
  left = _operand_shape(one, 0)
  return math.prod(left[int(axis)] for axis in axes[1].split(",") if axis) if axes else 1


def _summed_by_convolution(one: Executed) -> int:
  labels = _LABELS.search(one.instruction.text)
  features = _operand_shape(one, 1)[labels[1].index("i")] if labels else 1
  window = {name: value.split("x") for name, value in _WINDOW.findall(one.instruction.text)}
  sizes = [int(size) for size in window.get("size", [])]
  pads, dilated = window.get("pad", ["0_0"] * len(sizes)), window.get("lhs_dilate", ["1"] * len(sizes))
  summed = [size for size, pad, by in zip(sizes, pads, dilated, strict=True) if (pad, by) == ("0_0", "1")]
  return features * math.prod(summed)


def is_gemm(instruction: Instruction) -> bool:
  """Whether an instruction calls cuBLAS."""
  return instruction.opcode == "custom-call" and 'custom_call_target="__cublas' in instruction.text


def moved_bytes(one: Executed) -> int:
  """Bytes of an instruction's results and operands: what it would move if nothing were cached."""
  here = [one.computation[name].type for name in one.instruction.operands if name in one.computation]
  return one.times * sum(map(bytes_of, [one.instruction.type, *here]))


def gemm_flops(one: Executed) -> int:
  """FLOPs of a call to cuBLAS: two for each number of the result and of the contracted axes."""
  (_, result), *_ = arrays(one.instruction.type)
  (_, left), *_ = arrays(one.computation[one.instruction.operands[0]].type)
  contracted = _CONTRACTED.search(one.instruction.text)
  axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])] if contracted else []
  return one.times * 2 * math.prod(result) * math.prod(left[axis] for axis in axes)


class Gemms(NamedTuple):
  """A GPU's step as calls to cuBLAS and what runs between them.

  Attributes:
    calls, flops, bytes: of the calls.
    bytes_outside: of fusions, copies and other calls. In a loop, a fusion that reads a slice counts as if it read the
      whole array, so that only the figure of a step without loops is exact.
  """

  calls: int
  flops: int
  bytes: int
  bytes_outside: int


def gemms(text: str, trips: int) -> Gemms:
  """Calls to cuBLAS in a GPU's step, and what runs between them."""
  everything = [one for one in executed(text, trips) if one.instruction.opcode not in _NAMES | _ELSEWHERE]
  calls = [one for one in everything if is_gemm(one.instruction)]
  others = [one for one in everything if not is_gemm(one.instruction)]
  return Gemms(
    sum(one.times for one in calls),
    sum(map(gemm_flops, calls)),
    sum(map(moved_bytes, calls)),
    sum(map(moved_bytes, others)),
  )
