"""The evidence on the roles of a tree's weights, in one record: what is given, what a probe saw, what the tree tells.

Evidence has ranks: what is given (`axes=`); the probe; the type of the module; the bias of the weight itself, or an
adapter that fits it one way alone; a name that is one framework's; other weights of that name; and last a name that is
a habit. What contradicts a name that is one framework's is no evidence.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any, NamedTuple

from jaxlora._adapt.evidence import Evidence
from jaxlora._adapt.modules import NOT_KERNEL, TABLE, typed_parameters
from jaxlora._base.paths import components
from jaxlora._base.text import listed
from jaxlora._weight.shapes import shape_of_leaf


class Clue(NamedTuple):
  """What the evidence tells of the roles of one weight.

  Attributes:
    roles: one letter per axis.
    why: what tells, as a clause.
    sure: whether nothing else can be meant.
    by_name: whether a name alone tells, which the function may contradict.
  """

  roles: str
  why: str
  sure: bool = True
  by_name: bool = False

  @property
  def proven(self) -> bool:
    """Whether more than names and neighbours tells. What is not proven is checked by `wrap`, at the first trace."""
    return self.sure and not self.by_name


# Leaves of these names are stored so by one framework: Flax's and Keras' kernels are (in, out).
_FRAMEWORKS = {"kernel": "io"}

# Habits: torch, Equinox and their ports have `weight` (out, in); Haiku and many trees of one's own have `w` (in, out).
_HABITS = {"weight": "oi", "w": "io"}

# Modules of GPT-2: torch's transformers stores their `weight` as (in, out), other ports as (out, in).
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")

_TABLES = re.compile(
  r"(?:(?:tok|token|word|position|pos|positional|token_type|segment|input|vocab)_?)?(?:embed|embedder|embeddings?)"
  r"|embed_(?:tokens|positions)|wte|wpe|shared"
)

_BIASES = ("bias", "b")


def names_a_table(path: str) -> bool:
  """Whether a leaf is called as tables of embeddings are: `embed/embedding`, `wte/weight`."""
  *modules, name = components(path)
  return name == "embedding" or (name == "weight" and any(map(_TABLES.fullmatch, modules[-1:])))


@dataclasses.dataclass(frozen=True)
class Layouts:
  """The evidence on a tree.

  Attributes:
    given: path -> roles that the user said.
    seen: path -> what the probe showed; `None` without a probe.
    typed: path -> what the type of its module says: roles, `TABLE` or `NOT_KERNEL`.
    told: path -> `"io"` or `"oi"` of matrices whose own bias, or adapter, fits one way alone.
    biased: the paths in `told` of which the bias told.
    beside_bias: the matrices that are the only weight beside a bias: no tables, which have none.
  """

  given: Mapping[str, str]
  seen: Mapping[str, Evidence] | None
  typed: Mapping[str, str]
  told: Mapping[str, str]
  biased: frozenset[str]
  beside_bias: frozenset[str]

  @classmethod
  def of_tree(
    cls, tree: Any, leaves: Mapping[str, Any], given: Mapping[str, str], seen: Mapping[str, Evidence] | None = None
  ) -> "Layouts":
    """Collects the evidence on a tree, whose leaves are given by path."""
    shapes = {path: shape_of_leaf(leaf) for path, leaf in leaves.items()}
    biases = _own_biases(shapes)
    found = {path: _layout_by_bias(shapes[path], bias) for path, bias in biases.items()}
    # A `b` beside a `w` may be any vector.
    told = {path: way for path, way in found.items() if way and not (way == "oi" and components(path)[-1] == "w")}
    return cls(given, seen, typed_parameters(tree, shapes), told, frozenset(told), frozenset(biases))

  def beside(self, told: Mapping[str, str]) -> "Layouts":
    """The same, with matrices whose adapters fit one way alone."""
    return dataclasses.replace(self, told={**told, **self.told})

  def is_table(self, path: str) -> bool:
    """Whether a leaf is a table that is looked up in, by its module's type or its name."""
    named = names_a_table(path) and path not in self.beside_bias
    return self.typed.get(path) == TABLE or (path not in self.typed and named)

  def is_no_kernel(self, path: str) -> bool:
    """Whether the type of its module says that a leaf is contracted with nothing: tables, norms."""
    return self.typed.get(path) in (TABLE, NOT_KERNEL)

  def clue(self, path: str, ndim: int) -> Clue | None:
    """The evidence of the highest rank on a weight of `ndim` axes; `None` where nothing tells, or two contradict.

    The tree tells of matrices alone, and of more axes where the type of the module does.
    """
    if path in self.given:
      return Clue(self.given[path], "axes says so")
    if self.seen is not None:
      if (found := self.seen[path].roles()) is not None:
        return Clue(found, "the probe shows it")
      if self.seen[path].is_something_else:
        return None
    typed = self.typed.get(path)
    if typed not in (None, TABLE, NOT_KERNEL) and len(typed) <= ndim:
      return Clue("s" * (ndim - len(typed)) + typed, "the type of its module says so")
    if ndim != 2:
      return None
    if path in self.told:
      what = "its bias fits" if path in self.biased else "its adapter fits"
      return Clue(self.told[path], f"{what} that way alone")
    if self.is_table(path):
      return Clue("io", "it is a table of embeddings")
    return self._by_name_and_neighbours(path)

  def _by_name_and_neighbours(self, path: str) -> Clue | None:
    name = components(path)[-1]
    near, others = self._neighbours(path)
    found = set(map(self.told.__getitem__, near or others))
    framework = _FRAMEWORKS.get(name)
    if framework is not None and found <= {framework}:
      return Clue(framework, f"it is called {name!r}", by_name=True)
    if len(found) == 1 and (near or framework is None):
      return Clue(found.pop(), f"{listed(near or others)} are stored so", sure=False)
    if found or framework is not None or (name == "weight" and _module(path) in _CONV1D) or name not in _HABITS:
      return None
    return Clue(_HABITS[name], f"it is called {name!r}", sure=False)

  def _neighbours(self, path: str) -> tuple[list[str], list[str]]:
    """Matrices of the same name whose layout is known: in modules called like this one's, and in all."""
    name = components(path)[-1]
    return self._told_by_name.get((_module(path), name), []), self._told_by_name.get((None, name), [])

  @functools.cached_property
  def _told_by_name(self) -> dict[tuple[str | None, str], list[str]]:
    found: dict[tuple[str | None, str], list[str]] = {}
    for path in self.told:
      for module in (_module(path), None):
        found.setdefault((module, components(path)[-1]), []).append(path)
    return found

  def weighed(self, path: str) -> str:
    """For an error message: what was weighed where nothing tells."""
    name = components(path)[-1]
    near, others = self._neighbours(path)
    if not others:
      return f"the name {name!r} and the shapes beside it do not say how it is stored"
    ways = {"io": "(in, out)", "oi": "(out, in)"}
    shown = [f"{other} as {ways[self.told[other]]}" for other in (near or others)]
    if name in _FRAMEWORKS:
      shown.append(f"leaves called {name!r} as {ways[_FRAMEWORKS[name]]}")
    return f"the evidence is divided: {listed(shown)}"


def _module(path: str) -> str:
  return "/".join(components(path)[-2:-1])


def _own_biases(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  """The bias of each matrix, or stack of them, that is the only weight beside one; an `embedding` is a table still."""
  by_module: dict[str, dict[str, tuple[int, ...]]] = {}
  for path, shape in shapes.items():
    *modules, name = components(path)
    by_module.setdefault("/".join(modules), {})[name] = shape
  found = {}
  for module, beside in by_module.items():
    weights = [name for name, shape in beside.items() if name not in _BIASES and len(shape) >= 2]
    biases = [beside[name] for name in _BIASES if name in beside]
    if len(weights) == len(biases) == 1 and weights[0] != "embedding":
      found["/".join(filter(None, [module, *weights]))] = biases[0]
  return found


def _layout_by_bias(shape: Sequence[int], bias: Sequence[int]) -> str | None:
  """`"io"` or `"oi"` where the bias has the size of one axis of a matrix alone."""
  if len(shape) == 3 and len(bias) == 2:  # a stack, along the same axis of both, as far as that is unambiguous
    found = {
      _layout_by_bias([*shape[:k], *shape[k + 1 :]], [*bias[:k], *bias[k + 1 :]])
      for k in range(2)
      if shape[k] == bias[k]
    }
    return found.pop() if len(found) == 1 else None
  if len(shape) != 2 or len(bias) != 1 or shape[0] == shape[1] or bias[0] not in shape:
    return None
  return "io" if bias[0] == shape[1] else "oi"
