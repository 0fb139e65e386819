"""Folders for certain readers: what of their rules is broken, and adapters made so that the rules hold."""

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from jaxlora._base.text import listed
from jaxlora.peft._records import Adapter, Module, PeftError, raise_problems
from jaxlora.peft._serve import READERS, RULES, Rule
from jaxlora.peft._serve_checks import Folder, partners

Serve = str | Sequence[str]  # readers, as `save` takes them


@dataclasses.dataclass(frozen=True)
class Finding:
  """A rule that does not hold.

  Attributes:
    reader: whose rule it is.
    rule: the rule.
    found: what breaks it.
  """

  reader: str
  rule: Rule
  found: tuple[str, ...]

  def __str__(self) -> str:
    return (
      f"{self.reader}, {self.rule.name}: expected that {self.rule.requires}; found {listed(self.found)}."
      f" Otherwise {self.rule.otherwise}. {self.remedy[0].upper()}{self.remedy[1:]}. (Source: {self.rule.source})"
    )

  @property
  def remedy(self) -> str:
    return self.rule.remedy.replace("{reader}", self.reader)


def findings(
  adapter: Adapter, keys: Iterable[str], readers: Sequence[str], known: Collection[str] | None = None
) -> list[Finding]:
  """The rules that an adapter with tensors of these keys breaks; `known` are the names of all modules of its model."""
  folder = Folder(adapter, tuple(keys), known)
  return [
    Finding(reader, rule, tuple(sorted(found)))
    for reader in readers
    for rule in RULES
    if reader in rule.readers and (found := rule.broken(folder))
  ]


def readers_of(serve: Serve) -> tuple[str, ...]:
  """The readers that `serve=` names."""
  readers = (serve,) if isinstance(serve, str) else tuple(serve)
  if unknown := [reader for reader in readers if reader not in READERS]:
    raise ValueError(f"serve: found {unknown[0]!r}, expected one or several of {', '.join(map(repr, READERS))}.")
  return readers


def served(
  adapter: Adapter,
  keys: Iterable[str] | None,
  readers: Sequence[str],
  subject: str,
  known: Mapping[str, int] | None = None,
) -> Adapter:
  """The adapter itself where no rule is broken; else one of the same function with one rank and one scale.

  Args:
    adapter: with the configuration that belongs to its tensors.
    keys: of its tensors in a file; `None` for those that `write` writes, which are as they should be.
    readers: whose rules must hold.
    subject: what errors begin with.
    known: the sizes of all modules' weights, by name; `None` if they are not known.

  Raises:
    PeftError: listing the rules that cannot be made to hold.
  """
  if "sglang" in readers and known is not None:
    adapter = with_partners(adapter, known)
  found = findings(adapter, () if keys is None else keys, readers, known)
  made = {finding.reader for finding in found if finding.rule.made}
  if made:
    patterns = {field: adapter.config.get(field) or {} for field in ("rank_pattern", "alpha_pattern")}
    adapter = dataclasses.replace(adapter, config=adapter.config | patterns, form="PEFT")
    adapter = uniform(adapter) if made != {"peft"} and not adapter.packed else adapter
    found = findings(adapter, (), readers, known)
  problems = [str(finding) for finding in found if not finding.rule.note]
  raise_problems(subject, [*adapter.unsupported, *problems])
  return adapter


def with_partners(adapter: Adapter, sizes: Mapping[str, int]) -> Adapter:
  """The adapter with zero factors for the modules that SGLang has in one matrix with adapted ones; itself without any.

  Args:
    adapter: of linear modules.
    sizes: how many elements the weights of the model's modules have, by name.
  """
  added: dict[str, Module] = {}
  for name, partner in partners(adapter.modules):
    beside = adapter.modules[partner]
    out, rest = divmod(sizes.get(name, 0), beside.a.shape[1])
    if beside.kind == "linear" and out and not rest:
      b = np.zeros((out, beside.rank), beside.b.dtype)
      added[name] = dataclasses.replace(beside, name=name, a=np.zeros_like(beside.a), b=b, magnitude=None)
  return uniform(dataclasses.replace(adapter, modules=adapter.modules | added)) if added else adapter


_MOST_ADDED = 1 << 28  # numbers: a file may have one module of a rank that all others would be padded to


def uniform(adapter: Adapter) -> Adapter:
  """The same adapter with the highest of its ranks and one alpha for all modules, as rank_pattern is not read.

  A -> [A; 0],   B -> [B scale / common, 0],   r = the highest rank,   lora_alpha = common * r
  """
  modules = adapter.modules.values()
  rank = max((module.rank for module in modules), default=int(adapter.config.get("r", 8)))
  held = sum(module.a.size + module.b.size for module in modules)
  padded_size = sum(rank * (module.a.size + module.b.size) // module.rank for module in modules)
  if padded_size > max(_MOST_ADDED, 100 * held):
    raise PeftError(
      f"one rank for all modules, the highest, is {rank}, and {padded_size:,} numbers instead of {held:,}. Bring the"
      " high ranks down first: jaxlora.compress(tree, rank=...)."
    )
  scales = collections.Counter(module.scale for module in modules if module.scale)
  tied = next((module.scale for module in modules if module.kind == "embedding"), 0.0)
  if not (adapter.config.get("ensure_weight_tying") and tied):  # whose head's B is the embedding's A: neither changes
    tied = 0.0
  common = tied or max(scales, key=lambda scale: scales[scale], default=1.0)
  alpha = common * rank
  settings: dict[str, Any] = {
    "r": rank,
    "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": sorted(adapter.modules),
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
  }
  padded = {name: _padded(module, rank, common) for name, module in adapter.modules.items()}
  return dataclasses.replace(adapter, modules=padded, config=adapter.config | settings)


def _padded(module: Module, rank: int, scale: float) -> Module:
  """A module at a higher rank and another scale; B becomes float32 where half precision would round what it is now."""
  missing, ratio = rank - module.rank, module.scale / scale
  wide = np.promote_types(module.b.dtype, np.float32)
  exact = module.b.astype(wide) * wide.type(ratio)
  narrow = exact.astype(module.b.dtype)
  b = narrow if np.array_equal(narrow.astype(wide), exact) else exact
  return dataclasses.replace(
    module,
    a=np.pad(module.a, [(0, missing)] + [(0, 0)] * (module.a.ndim - 1)),
    b=np.pad(b, [(0, 0), (0, missing)] + [(0, 0)] * (b.ndim - 2)),
    alpha=scale * rank,
    scaling="standard",
  )
