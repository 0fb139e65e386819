"""Leaf paths, the patterns that pick leaves by path, and suggestions for a pattern that picked nothing."""

import collections
from collections.abc import Callable, Iterable, Sequence
import difflib
import re
import sys
from typing import Any

from jax import tree_util

Predicate = Callable[[str, Any], bool]
# What may pick leaves: a regex over the whole path, names of modules or leaves, or a function of (path, leaf).
Pattern = str | Sequence[str] | Predicate


ROOT = "root"  # the path of a tree that is one leaf


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[tuple[str, Any]], Any]:
  """The leaves with their "/"-joined paths, such as `encoder/layer_0/query/kernel`, and the tree's structure.

  Boxes that hold one array in their `value` attribute (`flax.nnx.Param`, `flax.linen.Partitioned`) are not part of
  the path: the same pattern then serves boxed and plain trees. Paths that would be alike, as keys may hold a "/", are
  written as `jax.tree_util.keystr` writes them; no other path changes for it.
  """
  nodes, treedef = tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  boxed = _boxed(tree)
  names = [path_string(path[:-1] if path[:-1] in boxed else path) for path, _ in nodes]
  count = collections.Counter(names)
  return [
    (name if count[name] == 1 else tree_util.keystr(path), leaf)
    for name, (path, leaf) in zip(names, nodes, strict=True)
  ], treedef


def path_string(path: Sequence[Any]) -> str:
  return "/".join(map(_component, path)) or ROOT


def _boxed(tree: Any) -> set[Any]:
  """The places of Flax's boxes. Where Flax is not loaded there are none, so it need not be."""
  kinds = (("flax.core.meta", "AxisMetadata"), ("flax.nnx", "Variable"))
  boxes = tuple(getattr(sys.modules[module], kind) for module, kind in kinds if module in sys.modules)
  if not boxes:
    return set()
  nodes, _ = tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, boxes))
  return {path for path, node in nodes if isinstance(node, boxes)}


def _component(key: Any) -> str:
  for field in ("key", "idx", "name"):
    if hasattr(key, field):
      return str(getattr(key, field))
  return str(key)


def components(path: str) -> list[str]:
  return path.split("/")


def compile_regex(pattern: str, field: str) -> re.Pattern[str]:
  """Compiles a regex, or says which field holds the broken one."""
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f"LoraConfig.{field}: {pattern!r} is not a regular expression ({error}). Patterns match a whole"
      " \"/\"-joined path, such as r'.*/(query|value)/kernel'."
    ) from error


def validate_pattern(pattern: Any, field: str) -> None:
  """Raises unless `pattern` is a regex, a sequence of names or a callable."""
  if callable(pattern):
    return
  if isinstance(pattern, str):
    compile_regex(pattern, field)
    return
  if isinstance(pattern, Sequence) and pattern and all(isinstance(name, str) and name for name in pattern):
    return
  raise TypeError(
    f"LoraConfig.{field}: found {pattern!r}, expected a regex over whole paths, a non-empty list of names, or a"
    " callable (path, leaf) -> bool."
  )


def name_matches(name: str, path: str) -> tuple[bool, bool]:
  """Whether `name` is a run of the path's components, and whether that run ends at the leaf itself."""
  want, have = components(name.strip("/")), components(path)
  starts = [k for k in range(len(have) - len(want) + 1) if have[k : k + len(want)] == want]
  return bool(starts), bool(starts) and starts[-1] + len(want) == len(have)


def nearest(pattern: str, paths: Iterable[str], count: int = 3) -> list[str]:
  """The paths that look most like a pattern that matched none of them."""
  plain = re.sub(r"[^\w/]+", "", pattern.replace(".*", "")).strip("/")
  paths = list(paths)

  def likeness(path: str) -> float:
    parts = components(path)
    tails = ["/".join(parts[k:]) for k in range(len(parts))] + parts
    return max(difflib.SequenceMatcher(None, plain, tail).ratio() for tail in tails)

  return sorted(paths, key=likeness, reverse=True)[:count]


def no_match_error(
  field: str,
  pattern: Any,
  paths: Sequence[str],
  among: str = "leaves",
  hint: str = "",
  rule: str = "a regex must match the whole path",
) -> ValueError:
  """The error for a pattern that picked no leaf."""
  if callable(pattern):
    return ValueError(
      f"LoraConfig.{field}: the callable {pattern!r} matches none of the {len(paths)} {among}; expected True for at"
      f" least one (path, leaf). Paths: {', '.join(paths[:3])}."
    )
  return ValueError(
    f"LoraConfig.{field}: {pattern!r} matches none of the {len(paths)} {among} ({rule})."
    + (hint or f" Nearest: {', '.join(nearest(pattern, paths))}.")
  )
