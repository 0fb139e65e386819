"""The Variables of an adapted module: what trains, what stays, and the module that holds them beside their base."""

from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora._weight.partitioned import specs_of_parts
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted, parts, trained_parts


class Trainable(nnx.Variable):
  """A Variable that trains: a factor of an adapted weight, or a leaf trained whole. The filter of NNX's loops.

  It is no `nnx.Param`: those are the base, as they were in the module that was adapted. `nnx.state(model, nnx.Param)`
  is the base's state, path by path, and `nnx.state(model, Trainable)` is all that an optimizer sees.

  Example:
    >>> from flax import nnx
    >>> import jax, jaxlora.nnx, optax
    >>> model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    >>> model = jaxlora.nnx.adapt(model, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=jaxlora.nnx.Trainable)
    >>> jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(model, jaxlora.nnx.Trainable)))
    {'jaxlora': {'kernel': {'a': (2, 6), 'b': (2, 5)}}}
  """


class Frozen(nnx.Variable):
  """A Variable that belongs to an adapter and does not train, such as the A of LoRA-FA, or a mask of AdaLoRA's.

  Example:
    >>> from flax import nnx
    >>> import jax, jaxlora.nnx
    >>> config = jaxlora.LoraConfig(rank=2, variant="lora_fa")
    >>> model = jaxlora.nnx.adapt(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), config, jax.random.key(0))
    >>> type(model.jaxlora.kernel.a).__name__, type(model.jaxlora.kernel.b).__name__
    ('Frozen', 'Trainable')
  """


class Options(NamedTuple):
  """How the calls of a module are wrapped: `jaxlora.wrap`'s options."""

  on_materialize: str = "warn"
  recompute: bool = True
  tuning: str = "auto"
  platform: str | None = None


class About(NamedTuple):
  """What is static in a `LoraWeight`."""

  roles: str
  rank: int
  alpha: float
  scaling: str
  dropout: float
  variant: str
  sure: bool


class Factors(nnx.Module):
  """The parts of an adapted weight but its base, each a Variable by its name.

  Attributes:
    about: what is static; `None` for a leaf trained whole.
    deterministic: whether the adapter's dropout rests, as `model.train()` and `model.eval()` set it.
  """

  def __init__(self, node: Any, box: nnx.Variable, options: Options, key: jax.Array | None = None):
    self.options = options
    self.about = About(*(getattr(node, name) for name in About._fields)) if isinstance(node, LoraWeight) else None
    self.names = tuple(name for name in parts(node) if name != "base")
    for name in self.names:
      kind = Trainable if name in trained_parts(node) else Frozen
      setattr(self, name, kind.from_metadata(parts(node)[name], _metadata(box, node, name)))
    if self.about is not None and self.about.dropout > 0:
      self.deterministic = False
      self.rngs = nnx.RngStream(jax.random.key(0) if key is None else key, tag="dropout")


# Functions, and no methods: `nnx.tabulate` runs every method of every module as a part of the model.


def node_of(held: Factors, base: Any) -> Any:
  """The adapted weight, or half of one where the base is `None`."""
  own = {name: getattr(held, name).get_raw_value() for name in held.names}
  if held.about is None:
    return FullWeight(base=base, **own)
  about = held.about._replace(dropout=0.0) if getattr(held, "deterministic", False) else held.about
  return LoraWeight(base, own.pop("a"), own.pop("b"), **about._asdict(), extra=own)


def drops(held: Factors) -> bool:
  """Whether a call draws masks."""
  return not getattr(held, "deterministic", True)


# What names the axes of a Variable, and with that of its optimizer state.
_NAMED = ("out_sharding", "sharding", "sharding_names", "optimizer_sharding")


def _metadata(box: nnx.Variable, node: Any, part: str) -> dict[str, Any]:
  """A part's metadata: that of its base, with the names of the axes that it has; hooks are the base's own."""
  metadata = {name: value for name, value in box.get_metadata().items() if not name.startswith("on_")}
  return {name: _named(value, node, part) if name in _NAMED else value for name, value in metadata.items()}


def _named(names: Any, node: Any, part: str) -> Any:
  if not isinstance(node, LoraWeight) or names is None:
    return names
  if isinstance(names, NamedSharding):
    return NamedSharding(names.mesh, _named(names.spec, node, part))
  spec = specs_of_parts(node, PartitionSpec(*names)).parts()[part]
  entries = (*spec, *[None] * (parts(node)[part].ndim - len(spec)))
  return PartitionSpec(*entries) if isinstance(names, PartitionSpec) else entries


def holds_weight(variable: Any) -> bool:
  """Whether a Variable holds an adapted weight, as `jaxlora.adapt` leaves it in a module."""
  return isinstance(variable, nnx.Variable) and is_adapted(variable.get_raw_value())
