"""The observer of a probe: what each equation shows about the parameters that it takes.

What an equation unknown here does to a value is forgotten, never guessed.

Reading order: elementwise -> layout -> choices -> products, where roles come from -> which primitive is what.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from jaxlora._adapt.evidence import NONE, Evidence, Label, Seen, unknown
from jaxlora._base.reshape import reshape_groups
from jaxlora._jax import marked_call, primitives


class Observer:
  """Gathers evidence, equation by equation.

  Attributes:
    evidence: of each parameter.
  """

  def __init__(self, evidence: list[Evidence]):
    self.evidence = evidence
    self._indirect: set[int] = set()  # leaves known only by what is made of them

  def observe(self, eqn: Any, values: Sequence[Seen]) -> list[Seen]:
    """What is known of the results of an equation; notes what it shows of parameters among its operands."""
    method = METHODS.get(eqn.primitive.name)
    if method is not None:
      try:
        return method(self, eqn, list(values))
      except KeyError:  # parameters of an unknown form: forget instead of guessing
        pass
    return self.elementwise(eqn, list(values))

  # Anything without a handler: a value of the same shape keeps its axes, everything else is forgotten.

  def elementwise(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    last = frozenset().union(*(value.last for value in values)) if values else NONE
    shapes = [getattr(atom.aval, "shape", ()) for atom in eqn.invars]
    for value in values:
      if value.leaf is not None and not value.picked:
        self.evidence[value.leaf].used.append(eqn.primitive.name)
    out = []
    for var in eqn.outvars:
      alike = [v.axes for v, shape in zip(values, shapes, strict=True) if shape == getattr(var.aval, "shape", ())]
      axes = tuple(frozenset().union(*group) for group in zip(*alike, strict=True)) if alike else None
      out.append(Seen(None, axes, last) if axes is not None else unknown(var.aval, last))
    return out

  # Layout: the parameter stays the parameter.

  def same(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    return [dataclasses.replace(value) for value in values]

  def scaled(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    """A product or quotient by a scalar leaves a parameter one; any other is elementwise."""
    arrays = [v for v, atom in zip(values, eqn.invars, strict=True) if getattr(atom.aval, "shape", ())]
    if len(arrays) == 1 and arrays[0].leaf is not None:
      return arrays
    return self.elementwise(eqn, values)

  def transpose(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    (value,) = values
    return [dataclasses.replace(value, axes=tuple(value.axes[d] for d in eqn.params["permutation"]))]

  def reshape(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    value, shape, new = values[0], eqn.invars[0].aval.shape, eqn.params["new_sizes"]
    order = eqn.params.get("dimensions") or range(len(shape))  # some reshapes transpose first
    axes: list[frozenset[Label]] = [NONE] * len(new)
    if 0 not in shape:
      for left, right in reshape_groups([shape[d] for d in order], new):
        labels = frozenset().union(*(value.axes[order[d]] for d in left))
        alone = frozenset().union(*(value.axes[order[d]] for d in left if shape[order[d]] == 1))
        for d in right:
          axes[d] = labels if new[d] != 1 else alone  # a new axis of size 1 runs over nothing
    return [dataclasses.replace(value, axes=tuple(axes))]

  def squeeze(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    (value,) = values
    gone = set(eqn.params["dimensions"])
    return [dataclasses.replace(value, axes=tuple(labels for d, labels in enumerate(value.axes) if d not in gone))]

  def broadcast(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    value = values[0]
    axes: list[frozenset[Label]] = [NONE] * len(eqn.params["shape"])
    for d, out in enumerate(eqn.params["broadcast_dimensions"]):
      axes[int(out)] = value.axes[d]
    return [dataclasses.replace(value, axes=tuple(axes))]

  def first(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    return [dataclasses.replace(values[0]) for _ in eqn.outvars]

  def shards(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    """Shards put together along an axis; stacked along a new one, that is none of the parameter's."""
    (value,) = values
    axis = eqn.params["all_gather_dimension"]
    axes = value.axes if eqn.params["tiled"] else (*value.axes[:axis], NONE, *value.axes[axis:])
    return [dataclasses.replace(value, axes=axes)]

  def reduce(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    value, gone = values[0], set(eqn.params["axes"])
    if value.leaf is not None and not value.picked:
      self.evidence[value.leaf].used.append(eqn.primitive.name)
    axes = tuple(labels for d, labels in enumerate(value.axes) if d not in gone)
    return [Seen(None, axes, value.last) for _ in eqn.outvars]

  # Choices: of experts, by what a router gives for each.

  def choice(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    """The largest along an axis, or an order of it: notes whose outputs lie along it."""
    if eqn.primitive.name != "sort" or len(values) > 1:  # values alone are sorted for their own sake
      params = eqn.params
      axes = params.get("axes", (params.get("dimension", params.get("reduction_dimension", params.get("axis", -1))),))
      for leaf, axis in {label for d in axes for label in values[0].axes[d]} if values[0].axes else ():
        evidence = self.evidence[leaf]
        evidence.chooses |= leaf in values[0].last and axis not in (evidence.contracted or (axis,))
    return (self.reduce if eqn.primitive.name in primitives.REDUCTIONS else self.elementwise)(eqn, values)

  # Products: this is where roles come from.

  def product(self, weight: Seen, contracted: set[Label], batched: set[Label], data: frozenset[Any]) -> frozenset[Any]:
    """Notes one product of a parameter; returns what the result was last multiplied by."""
    leaf = weight.leaf
    assert leaf is not None
    evidence = self.evidence[leaf]
    for other in data:
      if isinstance(other, int) and other != leaf:
        self.evidence[other].feeds = True
    own = {axis for owner, axis in contracted if owner == leaf}
    stacked = {axis for owner, axis in batched if owner == leaf}
    present = {axis for labels in weight.axes for owner, axis in labels if owner == leaf}
    absent = set(range(evidence.ndim)) - present  # sliced or scanned away before the product
    if evidence.contracted is None and own:
      evidence.contracted = frozenset(own - stacked - absent)
      evidence.stacked |= stacked | absent
    return frozenset({leaf})

  def dot_general(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    lhs, rhs = values
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    free = [
      [d for d in range(len(value.axes)) if d not in (*contract, *batch)]
      for value, contract, batch in ((lhs, lhs_contract, lhs_batch), (rhs, rhs_contract, rhs_batch))
    ]
    last = lhs.last | rhs.last
    sides = ((lhs, rhs, lhs_contract, lhs_batch, free[0]), (rhs, lhs, rhs_contract, rhs_batch, free[1]))
    weights = [side for side in sides if self._is_weight(side[0], side[3], side[4])]
    if weights:
      last = NONE
    for made, other, contract, _, _ in sides:
      self._made_of_parameters(made, other, contract)
    for weight, other, contract, batch, _ in weights:
      contracted = {label for d in contract for label in weight.axes[d]}
      batched = {label for d in batch for label in weight.axes[d]}
      last |= self._weighed(weight, contracted, batched, other.last)
      self._stack_of_activations(weight, other, batch, lhs_batch if other is lhs else rhs_batch)
    axes = (
      *(lhs.axes[i] | rhs.axes[j] for i, j in zip(lhs_batch, rhs_batch, strict=True)),
      *(lhs.axes[d] for d in free[0]),
      *(rhs.axes[d] for d in free[1]),
    )
    return [Seen(None, axes, last)]

  def ragged_dot(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    """A grouped product: the axis of the groups is a stack of experts; what decides on their sizes is a router."""
    rows, weight, sizes = values
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), (x_batch, w_batch) = numbers.dot_dimension_numbers
    batched = (*w_batch, *numbers.rhs_group_dimensions)
    self._decides(sizes)
    free = [d for d in range(len(weight.axes)) if d not in (*w_contract, *batched)]
    if not numbers.rhs_group_dimensions or not self._is_weight(weight, batched, free):
      return self.elementwise(eqn, values)
    if rows.leaf is not None and not rows.picked:
      self.evidence[rows.leaf].used.append(eqn.primitive.name)
    labels = lambda axes: {label for d in axes for label in weight.axes[d]}
    last = self._weighed(weight, labels(w_contract), labels(batched), rows.last)
    own = [d for d in range(len(rows.axes)) if d not in (*x_contract, *x_batch)]
    shared = [rows.axes[i] | weight.axes[j] for i, j in zip(x_batch, w_batch, strict=True)]
    return [Seen(None, (*shared, *(rows.axes[d] for d in own), *(weight.axes[d] for d in free)), last)]

  def registered(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    """A product of a function that a user has registered, by the letters of its rule."""
    spec, last, sides = eqn.params["mark"].spec, NONE, []
    for value in values[2:]:
      self._decides(value)
    for meeting, weight, other in (
      (spec.meeting(place), values[place], values[1 - place]) for place in (1, 0) if values[place].leaf is not None
    ):
      if self._is_weight(weight, meeting.shared, meeting.free):
        sides.append((meeting, weight, other))
    if not sides:
      return self.elementwise(eqn, values)
    for meeting, weight, other in sides:
      labels = lambda axes, weight=weight: {label for d in axes for label in weight.axes[d]}
      last |= self._weighed(weight, labels(meeting.contracted), labels(meeting.shared), other.last)
    runs = dict.fromkeys(spec.out, NONE)
    for value, letters in zip(values[:2], spec.operands, strict=False):
      runs |= {letter: runs[letter] | axes for letter, axes in zip(letters, value.axes, strict=True) if letter in runs}
    return [Seen(None, tuple(runs[letter] for letter in spec.out), last)]

  def _decides(self, sizes: Seen) -> None:
    """What the sizes of groups were last multiplied by is a router."""
    for leaf in sizes.last:
      if isinstance(leaf, int):
        self.evidence[leaf].chooses = True

  def _weighed(self, weight: Seen, contracted: set[Label], batched: set[Label], data: frozenset[Any]) -> frozenset[Any]:
    """`product`, of a parameter or of experts that were looked up: those are a stack, and no table."""
    if weight.picked and weight.leaf is not None:
      evidence = self.evidence[weight.leaf]
      evidence.looked_up, evidence.stacked = None, evidence.stacked | {axis for _, axis in batched}
    return self.product(weight, contracted, batched, data)

  def _made_of_parameters(self, made: Seen, other: Seen, contract: Sequence[int]) -> None:
    """A kernel computed from parameters (concatenated gates, a normalised weight) says what is contracted of each."""
    if made.leaf is not None or made.last or not other.last:
      return
    for leaf, axis in {label for d in contract for label in made.axes[d]}:
      evidence = self.evidence[leaf]
      if evidence.contracted is None or leaf in self._indirect:
        self._indirect.add(leaf)
        evidence.contracted = (evidence.contracted or frozenset()) | {axis}

  def concatenate(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    """Axis by axis, whatever lies side by side there."""
    for value in values:
      if value.leaf is not None and not value.picked:
        self.evidence[value.leaf].used.append(eqn.primitive.name)
    axes = tuple(frozenset().union(*group) for group in zip(*(value.axes for value in values), strict=True))
    return [Seen(None, axes, frozenset().union(*(value.last for value in values)))]

  def _is_weight(self, value: Seen, batch: Sequence[int], free: Sequence[int]) -> bool:
    """A parameter; or looked-up parts of one that meet their inputs row by row, and still have an output axis."""
    if value.leaf is None or not value.picked:
      return value.leaf is not None
    row = self.evidence[value.leaf].looked_up
    batched = any((value.leaf, row) in value.axes[d] for d in batch)
    return batched and any(value.axes[d] for d in free)

  def _stack_of_activations(self, weight: Seen, other: Seen, batch: Sequence[int], other_batch: Sequence[int]) -> None:
    """Experts: an output axis of one parameter that is the batch axis of the next is a stack of both.

    Only where it leads that parameter, before what it contracts; heads, in the middle of a kernel, are no stack.
    """
    for _, k in zip(batch, other_batch, strict=True):
      for leaf, axis in other.axes[k]:
        evidence = self.evidence[leaf]
        if evidence.contracted and leaf != weight.leaf and axis < min(evidence.contracted):
          evidence.stacked.add(axis)

  def conv(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    data, weight = values
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    if weight.leaf is None:
      return self.elementwise(eqn, values)
    if self.evidence[weight.leaf].contracted is None:
      self.evidence[weight.leaf].convolved = True
    contracted = {label for d, labels in enumerate(weight.axes) if d != out_axis for label in labels}
    evidence = self.evidence[weight.leaf]
    before = set(evidence.stacked)
    last = self.product(weight, contracted, set(), data.last)
    evidence.stacked -= evidence.single - before  # a kernel for each channel, (h, w, channels, 1), loses its last axis
    return [unknown(eqn.outvars[0].aval, last)]

  def gather(self, eqn: Any, values: list[Seen]) -> list[Seen]:
    table, numbers = values[0], eqn.params["dimension_numbers"]
    index_map = tuple(numbers.start_index_map)
    if table.leaf is None or len(index_map) != 1 or tuple(numbers.collapsed_slice_dims) != index_map:
      return self.elementwise(eqn, values)
    evidence, batching = self.evidence[table.leaf], tuple(numbers.operand_batching_dims)
    row = table.axes[index_map[0]]
    if not table.picked and evidence.looked_up is None and evidence.contracted is None and len(row) == 1:
      evidence.looked_up = next(iter(row))[1]
      present = {axis for labels in table.axes for _, axis in labels}
      evidence.stacked |= set(range(evidence.ndim)) - present
      evidence.stacked |= {axis for d in batching for _, axis in table.axes[d]}
    whole = [d for d in range(len(table.axes)) if d not in index_map and d not in batching]
    offsets = dict(zip(numbers.offset_dims, whole, strict=True))
    axes = tuple(table.axes[offsets[k]] if k in offsets else row for k in range(len(eqn.outvars[0].aval.shape)))
    return [Seen(table.leaf, axes, frozenset({table.leaf}), picked=True)]


_KEEPS = (
  *primitives.CASTS, *primitives.NEGATIONS, *primitives.REVERSALS, *primitives.IDENTITIES, *primitives.PLACEMENTS,
  *primitives.BARRIERS, *primitives.RESHARDS, *primitives.TRANSFERS, *primitives.PERMUTATIONS,
)  # fmt: skip

METHODS: dict[str, Callable[[Observer, Any, list[Seen]], list[Seen]]] = {
  "transpose": Observer.transpose,
  "reshape": Observer.reshape,
  "squeeze": Observer.squeeze,
  "broadcast_in_dim": Observer.broadcast,
  "dot_general": Observer.dot_general,
  "conv_general_dilated": Observer.conv,
  "ragged_dot_general": Observer.ragged_dot,
  marked_call.NAME: Observer.registered,
  "gather": Observer.gather,
  "concatenate": Observer.concatenate,
  **dict.fromkeys(primitives.SLICES, Observer.first),
  **dict.fromkeys(primitives.GATHERS_OF_SHARDS, Observer.shards),
  **dict.fromkeys(primitives.SCALINGS, Observer.scaled),
  **dict.fromkeys(_KEEPS, Observer.same),
  **dict.fromkeys(primitives.REDUCTIONS, Observer.reduce),
  **dict.fromkeys(primitives.CHOICES, Observer.choice),
}
