"""`LoraConfig`: which leaves adapt and how, validated when made, and the plan it makes for each leaf."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from jaxlora._adapt.fields import (
  ALL_LINEAR,
  CHECKS,
  OVERRIDABLE,
  check_choice,
  checked_fields,
  checked_mapping,
  checked_pattern,
  checked_roles,
  checked_tokens,
)
from jaxlora._adapt.recommended import rate_for, with_experts
from jaxlora._base.patterns import Pattern, first_match
from jaxlora._weight.start import Initializer


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """What to adapt, and how.

  Patterns: a string is a regex that must match a whole "/"-joined path; a list holds names, each a run of path
  components (`["query", "attn/out"]`), which select the kernels under a module or one leaf; a callable takes
  `(path, leaf)` and returns a bool. Mappings (`overrides`, `axes`) are keyed by regexes; the first that matches
  a leaf counts. The config keeps checked copies of what it is given; it is hashable, and equal by value.

  Args:
    rank: number of terms of each update; at most the smaller of a weight's fan-in and fan-out.
    alpha: numerator of the scale; `None` means `alpha = rank`, a scale of 1.
    targets: the leaves to adapt: a pattern, or a preset. `"all-linear"`: every kernel that is contracted, except
      embeddings and the last classifier (routers, and what the probe multiplies by and cannot read, are left out, with
      a warning).
      `"attention"`: the kernels of attention layers. `[]`: none, only `train` trains (a head alone, or all weights).
    exclude: a pattern of leaves that `targets` matches and that stay frozen all the same.
    overrides: regex -> fields of its own (any of rank, alpha, scaling, init, zero, dropout, dtype, variant).
    axes: regex -> role string, one letter per axis: `i` contracted, `o` free, `s` stacked (`"sio"`: experts).
    tokens: regex -> token ids: of an embedding, tied to the head or not, or of a head, the rows of these tokens train
      and nothing else. The pattern's leaves get no factors; state, moments and files hold those rows alone.
    train: a pattern of leaves trained whole, such as biases, norms or a new head. Wins over `targets`.
    scaling: `"standard"` (alpha / rank) or `"rslora"` (alpha / sqrt(rank), Kalajdzievski 2023, arXiv:2312.03732).
    init: how A starts, where B starts at zero: `"kaiming"`, `"he_uniform"` or `"gaussian"`. Or how both start, with an
      update that is subtracted again, so that the adapted model is the base to rounding: `"orthogonal"`, `"pissa"`
      (the weight's principal part; `"pissa_niter_4"`: by 4 steps of a randomised SVD), `"olora"` (its QR factors).
      Or, on a quantised base, with what its codes lost: `"residual"`, `"loftq"` (5 steps; `"loftq_niter_2"`: 2), for
      which `adapt` wants the floats.
      Or a function `(key, shape, dtype, fan_in, rank) -> A`, where `fan_in` is the product of the contracted axes.
      Factors that start from data: `jaxlora.init_from_data`.
    zero: which factor starts at zero, `"b"` or `"a"`; `init` draws the other: B as it would A, of `rank` inputs. With
      `"a"` Adam's first updates move the model about `fan_in / sqrt(rank fan_out)` times as far at the same rate: tiny
      rates, as of preference training, move it at all.
    dropout: probability in [0, 1) that an element of the adapter's input is dropped while training.
    dtype: dtype of the factors; `None` means the weight's own: those of a bfloat16 base are bfloat16, and so are their
      gradients and Adam's moments, unless the optimizer keeps its own. PEFT's are float32 then: `dtype="float32"`.
    variant: `"lora"`; `"lora_fa"` (A frozen); `"dora"` (a magnitude for every output, its norm a constant for the
      gradient; `"dora_exact"`: not so); `"vera"` (A and B frozen and shared, two trained vectors); `"adalora"`
      (singular values that can be pruned); `"loha"`, `"lokr"` (Hadamard and Kronecker products); or one of your own
      (`jaxlora.register_variant`).

  Raises:
    TypeError, ValueError: naming the field, what was found and what was expected.

  Example:
    >>> LoraConfig(rank=4, alpha=8, targets=["query", "value"], train=r".*/head/.*").rank
    4

    A of one's own, here columns of an identity:

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> config = LoraConfig(rank=2, init=lambda key, shape, dtype, fan_in, rank: jnp.eye(*shape, dtype=dtype))
    >>> jaxlora.adapt({"kernel": jnp.ones((3, 4))}, config, jax.random.key(0))["kernel"].a
    Array([[1., 0., 0.],
           [0., 1., 0.]], dtype=float32)
  """

  rank: int = 8
  alpha: float | None = None
  targets: Pattern = ALL_LINEAR
  exclude: Pattern | None = None
  overrides: Mapping[str, Mapping[str, Any]] | None = None
  axes: Mapping[str, str] | None = None
  train: Pattern | None = None
  scaling: str = "standard"
  init: str | Initializer = "kaiming"
  dropout: float = 0.0
  dtype: Any = None
  variant: str = "lora"
  zero: str = "b"
  tokens: Mapping[str, Sequence[int]] | None = None

  def __post_init__(self):
    checked = {field: CHECKS[field](getattr(self, field), field) for field in OVERRIDABLE}
    for field in ("targets", "exclude", "train"):
      checked[field] = checked_pattern(getattr(self, field), field)
    for field, check in (("axes", checked_roles), ("overrides", checked_fields), ("tokens", checked_tokens)):
      checked[field] = checked_mapping(getattr(self, field), field, check)
    if checked["targets"] == () and checked["train"] is None and not checked["tokens"]:
      raise ValueError(
        "LoraConfig.targets: found an empty list and no train=: nothing would be trained. Name what to adapt, or say"
        " train= to train leaves whole, or tokens= to train rows of a table, and adapt none."
      )
    for field, value in checked.items():
      object.__setattr__(self, field, value)

  @classmethod
  def recommended(cls, *, rank: int = 32, experts: Mapping[str, int] | None = None, **fields: Any) -> "LoraConfig":
    """The settings that have matched full fine-tuning best: every layer, alpha 32 whatever the rank.

        W' = W + (32 / r) A B,    r / k for experts of which a token meets k

    Every kernel is adapted, those of the MLPs and the experts above all: attention alone lost at equal parameters. With
    alpha / rank the best learning rate is nearly the same at every rank. Experts share the rank among those that a
    token meets. Learning rates: `recommended_rate`.

    Args:
      rank: of dense weights; more for more data, which it must have room for.
      experts: regex over paths of experts' weights -> how many of them a token is sent to (top-k).
      **fields: any other field; entries of `overrides` come ahead of the experts'.

    Returns:
      The config.

    Raises:
      TypeError, ValueError: as `LoraConfig`, and where the rank is no multiple of a top-k.

    Example:
      >>> config = LoraConfig.recommended(rank=16, experts={".*/experts/.*": 8})
      >>> config.targets, config.alpha, config.overrides[".*/experts/.*"]["rank"]
      ('all-linear', 32.0, 2)

    Source: Schulman and Thinking Machines Lab, "LoRA Without Regret", 2025. Measured here: `examples/README.md`,
      placements and ranks of `summarize.py` (all layers beat attention and MLP alone at equal parameters).
    """
    return cls(**{"rank": rank, "alpha": 32.0, **fields, "overrides": with_experts(rank, experts, fields)})

  @staticmethod
  def recommended_rate(full: float, steps: int | None = None) -> float:
    """The learning rate for LoRA where `full` is a good one for full fine-tuning: ten times that, fifteen if short.

    Args:
      full: full fine-tuning's peak rate, of Adam.
      steps: updates of the run; below 100 the rate is fifteen times as high. `None` for many.

    Returns:
      The rate; the same for A and B, and for every rank.

    Raises:
      ValueError: unless `full` is finite and above 0, and `steps` a whole number of at least 1.

    Example:
      >>> LoraConfig.recommended_rate(1e-4), LoraConfig.recommended_rate(1e-4, steps=50)
      (0.001, 0.0015)

    Source: Schulman and Thinking Machines Lab, "LoRA Without Regret", 2025. It is where to begin, not a law: in the
      sweep of `examples/summarize.py` (a model of 0.9 million parameters, 160 steps, one seed a rate; its curve is
      `examples/results/summarize/learning_rate.png`) the best rates lie 2.9, 4.0 and 4.3 times above full
      fine-tuning's, at ranks 1, 8 and 64.
    """
    return rate_for(full, steps)

  def to_dict(self) -> dict[str, Any]:
    """The config as JSON-ready values; `from_dict` is its inverse.

    Raises:
      TypeError: where a pattern or an init is a callable, which JSON cannot hold.
    """
    for field in ("targets", "exclude", "train"):
      if callable(getattr(self, field)):
        raise TypeError(f"LoraConfig.{field} is a callable, which to_dict cannot write; use a regex or names.")
    inits: dict[str, Any] = {"init": self.init}
    for pattern, fields in (self.overrides or {}).items():
      inits[f"overrides[{pattern!r}]['init']"] = fields.get("init")
    for field, init in inits.items():
      if callable(init):
        raise TypeError(f"LoraConfig.{field} is a callable, which to_dict cannot write; use the name of an init.")

    def plain(value: Any) -> Any:
      if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
      if isinstance(value, np.dtype):
        return value.name
      return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

    return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "LoraConfig":
    """A config from `to_dict`'s values; fields left out take their defaults.

    Raises:
      TypeError: if `fields` is no mapping.
      ValueError: on a field that does not exist, with the ones that do.
    """
    if not isinstance(fields, Mapping):
      raise TypeError(f"LoraConfig.from_dict: found {fields!r}, expected a mapping of fields, as to_dict returns it.")
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
      check_choice("from_dict", name, known)
    return cls(**fields)


@dataclasses.dataclass(frozen=True)
class LeafPlan:
  """The config's fields for one adapted leaf, with the overrides of its path applied."""

  path: str
  rank: int
  alpha: float
  scaling: str
  init: str | Initializer
  dropout: float
  dtype: Any
  variant: str
  zero: str = "b"


def leaf_plan(config: LoraConfig, path: str) -> LeafPlan:
  """The config's fields for one leaf."""
  fields = {field: getattr(config, field) for field in OVERRIDABLE}
  fields |= first_match(config.overrides, path) or {}
  if fields["alpha"] is None:
    fields["alpha"] = float(fields["rank"])
  return LeafPlan(path=path, **fields)
