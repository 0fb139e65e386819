"""Policies: how each compiler likes an adapted program written. A policy changes how, never what.

Reading order: the record -> one policy for each platform -> which one a call gets.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax

from jaxlora._base.labelled import Labelled, Result, contract
from jaxlora._jax.by_platform import EVERYWHERE, Form, by_platform
from jaxlora._jax.linear_call import Transposes
from jaxlora._platform.codes import LookUp, by_selects, look_up_by_compiler
from jaxlora._platform.expand import expand
from jaxlora._platform.kept_sum import kept_sum, plain_sum, sum_once
from jaxlora._platform.regions import Region, find_regions
from jaxlora._platform.wait import Wait, at_once, by_barrier, by_compiler, codes_by_compiler, on_cpus, on_gpus


class Forms(NamedTuple):
  """The ways to write one function, or one transpose.

  Attributes:
    default: for any number of devices; `None` where it is known already.
    flat: with groups of axes flattened to one, for programs of one device.
    in_tiles: where the platform lays arrays out in tiles, as TPUs do.
    joined: the same for programs of one device: what is joined to a weight makes devices between which that is split
      send it to each other.
    merged: where the platform's compiler merges products of one input.
    split: in the place of those for one device, where a compiler splits the program between several.
  """

  default: Any = None
  flat: Any = None
  in_tiles: Any = None
  joined: Any = None
  merged: Any = None
  split: Any = None


@dataclasses.dataclass(frozen=True)
class Banks:
  """How a mixed batch meets the factors of many adapters.

  Attributes:
    spare_terms: a product with the factors of all adapters does `adapters - 1` times more work than needed, per token,
      and reads no factor twice. Up to this many superfluous terms that costs less than picking factors.
    loops: whether rows of few tokens are computed one after the other, each factor read where it lies; else their
      factors are gathered.
  """

  spare_terms: int
  loops: bool


def _on_one_device(fn: Callable[..., Any]) -> Form:
  """A form that flattens axes, or lays weights side by side: not for devices between which they may be split."""
  return Form(fn, single_device=True)


def no_regions(jaxpr: Any) -> Mapping[int, Region]:
  """Every equation is differentiated by itself."""
  del jaxpr
  return {}


@dataclasses.dataclass(frozen=True)
class Policy:
  """The choices for one compiler.

  Attributes:
    name: of the platform.
    add: `(x W, h B) -> x W + h B`, outside of loops; inside of them the sum is plain.
    add_once: the same where it is differentiated: the sum is one array.
    expand: the second thin product `h B`, by labels.
    wait: how what is rematerialised waits for its cotangent.
    wait_softmax: how the derivative of a softmax waits, which is made of its kept result.
    wait_codes: how the codes of a quantised weight wait, of which a product forms the weight once more.
    look_up: how codes become the values that a format's book has for them.
    turns: the platforms whose programs are given a transposed weight of codes decoded first and turned then: codes
      that are read across rows are read one by one.
    regions: from a jaxpr to the norms, softmaxes and activations that are differentiated as one.
    rematerialises: whether the inputs of adapted products are made again in the backward pass, where that is cheap.
    widens_bases: whether the compiler makes a wider copy of a half-precision weight for its product. Such a copy is
      made again in the backward pass, and not kept.
    flattens: whether programs of one device have groups of axes flattened to one: a weight's, and a product's tokens.
      Of an array that is split over devices along two of these, the compiler would gather the whole.
    shares_traces: whether layers that are alike are traced and lowered once.
    banks: see there.
    banks_in_tiles: the same for programs that are given the forms for arrays in tiles.
    joins: whether an adapted product is one operation, with a derivative of its own; else it is left to JAX.
    few_tokens: up to this many tokens the forms for arrays in tiles compute it as two products and a sum.
    keeps_rows: whether the forms for arrays in tiles say that a norm's input lies along its rows in the backward pass.
    tiled: the platforms whose programs are given the forms for arrays in tiles; `EVERYWHERE` where the policy is for
      one of them alone.
    merges: the platforms whose programs are given the forms that merge the products of one input.
    reason: why it was chosen, for `explain`.
  """

  name: str
  add: Callable[[jax.Array, jax.Array], jax.Array]
  add_once: Callable[[jax.Array, jax.Array], jax.Array]
  expand: Callable[[Labelled, Labelled, Sequence[Hashable], Result], Labelled]
  wait: Wait
  wait_softmax: Wait
  regions: Callable[[Any], Mapping[int, Region]]
  rematerialises: bool
  widens_bases: bool
  flattens: bool
  shares_traces: bool
  banks: Banks
  banks_in_tiles: Banks
  wait_codes: Wait = by_barrier
  look_up: LookUp = by_selects
  turns: tuple[str, ...] = ()
  joins: bool = True
  few_tokens: int = 1024
  keeps_rows: bool = True
  tiled: tuple[str, ...] = ()
  merges: tuple[str, ...] = ()
  reason: str = dataclasses.field(default="", compare=False)

  def lowered(self, forms: Forms, *args: Any, shared: Sequence[int] = ()) -> Any:
    """`forms.default(*args)`, or the form for the program that is lowered.

    Args:
      forms: of pytrees of arrays.
      *args: their arguments.
      shared: numbers of the flat operands that `jax.vmap` may not map in the form for tiles.
    """
    others = self._others(forms, lambda fn: Form(fn, shared=tuple(shared)))
    return by_platform(forms.default, others, *args) if others else forms.default(*args)

  def transposes(self, forms: Forms) -> Transposes:
    """The `transposes` of a linear call, whose default is the transpose of the call itself."""
    return self._others(forms, Form)

  def lowered_turned(self, default: Callable[..., Any], decoded_first: Callable[..., Any], node: Any) -> Any:
    """`default(node)`; `decoded_first(node)`, the same, where that is to be."""
    return by_platform(default, dict.fromkeys(self.turns, Form(decoded_first)), node) if self.turns else default(node)

  def _others(self, forms: Forms, for_tiles: Callable[[Any], Form]) -> dict[str, Form]:
    """The forms for platforms, those for one device alone behind the others."""
    found = {} if forms.in_tiles is None else {name: for_tiles(forms.in_tiles) for name in self.tiled}
    if forms.joined is not None:
      joined = for_tiles(forms.joined)._replace(single_device=True, split=forms.split)
      found |= dict.fromkeys(self.tiled, joined)
    found |= {} if forms.merged is None else dict.fromkeys(self.merges, _on_one_device(forms.merged))
    if forms.flat is not None and self.flattens:
      found.setdefault(EVERYWHERE, _on_one_device(forms.flat)._replace(split=forms.split))
    return found

  def sum(self, base: jax.Array, delta: jax.Array, looping: bool) -> jax.Array:
    """The base's product plus the low-rank part, in the base product's dtype."""
    return plain_sum(base, delta) if looping else self.add(base, delta)

  def in_remat(self) -> "Policy":
    """The policy inside of `jax.checkpoint`, where a norm's input is no residual: it has just been made again."""
    return dataclasses.replace(self, keeps_rows=False)

  def without_recompute(self) -> "Policy":
    """The policy of `recompute=False`: what differentiation keeps is kept, and nothing is made again."""
    return dataclasses.replace(self, regions=no_regions, rematerialises=False, widens_bases=False)


# ----------------------------------------------------------------------------------------------------------------------
# One policy for each platform.

# Arithmetic is cheaper by far than memory: more superfluous terms, and no loops over rows.
_ACCELERATED = Banks(spare_terms=128, loops=False)

CPU = Policy(
  name="cpu",
  add=kept_sum,
  add_once=sum_once,
  expand=expand,
  wait=by_compiler,
  wait_softmax=on_cpus,
  regions=find_regions,
  rematerialises=True,
  widens_bases=True,
  flattens=True,
  shares_traces=True,
  banks=Banks(spare_terms=8, loops=True),
  banks_in_tiles=_ACCELERATED,
  wait_codes=codes_by_compiler,
  look_up=look_up_by_compiler,
  turns=("cpu",),
  tiled=("tpu",),
  merges=("cuda", "rocm"),
)
GPU = dataclasses.replace(
  CPU,
  name="gpu",
  wait_codes=by_barrier,
  look_up=by_selects,
  turns=(),
  add=plain_sum,
  add_once=plain_sum,
  expand=contract,
  wait=on_gpus,
  wait_softmax=at_once,
  widens_bases=False,
  banks=_ACCELERATED,
  tiled=(),
  merges=(EVERYWHERE,),
)
TPU = dataclasses.replace(GPU, name="tpu", wait=by_barrier, merges=(), tiled=(EVERYWHERE,))
# The plain form everywhere: `x W + (x A) B`, and JAX's own differentiation.
NONE = Policy(
  name="none",
  add=plain_sum,
  add_once=plain_sum,
  expand=contract,
  wait=by_barrier,
  wait_softmax=at_once,
  regions=no_regions,
  rematerialises=False,
  widens_bases=False,
  flattens=False,
  shares_traces=False,
  banks=Banks(spare_terms=0, loops=False),
  banks_in_tiles=Banks(spare_terms=0, loops=False),
  joins=False,
)
PLATFORMS = {"cpu": CPU, "gpu": GPU, "cuda": GPU, "rocm": GPU, "tpu": TPU}
TUNINGS = ("auto", "none")


# ----------------------------------------------------------------------------------------------------------------------
# Which one a call gets.


def check_tuning(tuning: Any, platform: Any, what: str) -> None:
  """Raises unless there is such a tuning, and such a platform."""
  if tuning not in TUNINGS:
    raise ValueError(f"{what}: tuning is {tuning!r}, expected one of {', '.join(map(repr, TUNINGS))}.")
  if platform is not None and platform not in PLATFORMS:
    raise ValueError(f"{what}: platform is {platform!r}, expected None or one of {', '.join(map(repr, PLATFORMS))}.")


def choose_policy(tuning: str, platform: str | None, recompute: bool, values: Iterable[Any]) -> Policy:
  """The policy of one call.

  The platform is what the user said; else that of the mesh or the devices of the arguments; else that of
  `jax.default_device`; else the default backend's. An unknown one gets the policy of GPUs, which has no form that is
  for one compiler alone.

  Args:
    tuning: `"auto"` or `"none"`.
    platform: what the user said, or `None`.
    recompute: whether the backward pass may make anything again.
    values: the call's arguments.
  """
  if tuning == "none":
    return dataclasses.replace(NONE, reason='tuning="none"')
  found, reason = (platform, f"platform={platform!r}") if platform else _platform_of(values)
  policy = dataclasses.replace(PLATFORMS.get(found, GPU), reason=reason)
  return policy if recompute else policy.without_recompute()


def _platform_of(values: Iterable[Any]) -> tuple[str, str]:
  """The platform of a call that was not told its own, and what says so."""
  for value in values:
    if isinstance(value, jax.Array) and (found := _platform_of_array(value)):
      return found, "the devices of the arguments"
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and (found := _platform_of_mesh(mesh)):
    return found, "the mesh"
  default = getattr(jax.config, "jax_default_device", None)  # within `jax.default_device(...)`, too
  if default is not None:
    return default if isinstance(default, str) else default.platform, "jax.default_device"
  return jax.default_backend(), "the default backend"


def _platform_of_array(value: jax.Array) -> str | None:
  """The platform of an array's devices; of one that is traced, that of the mesh in its type, if there is one."""
  if not isinstance(value, jax.core.Tracer):
    return next(iter(value.devices())).platform
  return _platform_of_mesh(getattr(getattr(jax.typeof(value), "sharding", None), "mesh", None))


def _platform_of_mesh(mesh: Any) -> str | None:
  return getattr(getattr(mesh, "abstract_device", None), "platform", None)
