"""Which leaves a config picks: patterns, presets, and the evidence on the tree."""

from collections.abc import Collection, Iterable
import re
from typing import Any
import warnings

import jax.numpy as jnp
import numpy as np

from jaxlora._adapt.config import LoraConfig
from jaxlora._adapt.fields import ALL_LINEAR, ATTENTION
from jaxlora._adapt.layouts import Layouts
from jaxlora._adapt.routers import routers
from jaxlora._base.checks import is_foreign
from jaxlora._base.paths import components
from jaxlora._base.patterns import Pattern, name_matches, no_match_error
from jaxlora._base.text import listed

LeavesByPath = dict[str, Any]

# Without a probe the presets go by names: components of paths, matched whole.
_NOT_KERNELS = {"bias", "scale", "mean", "var", "gamma", "beta", "b"}

_HEADS = {"head", "heads", "lm_head", "classifier", "score", "logits", "output_projection", "qa_outputs"}

# A module that holds a query projection is an attention layer; and its other projections go by these names.
_QUERY = re.compile(r"(?:to_|w)?(?:query|q|qkv)(?:_?proj)?|c_attn")

_PROJECTION = re.compile(r"(?:to_|w)?(?:query|key|value|out|q|k|v|o|kv|qkv)(?:_?proj)?|c_attn")

_ATTENTION_MODULE = re.compile(r".*(?:attn|attention).*", re.IGNORECASE)


def select(
  config: LoraConfig, leaves: LeavesByPath, layouts: Layouts, tables: Collection[str] = ()
) -> tuple[set[str], set[str]]:
  """The paths to adapt and the paths to train whole; `tables` are those of which rows train.

  Raises:
    ValueError: if nothing is left to do, or if a pattern of the config picks nothing.
  """
  whole = _pick(config.train, "train", leaves, layouts, kernels_only=False) if config.train is not None else set()
  targets = _targets(config, leaves, layouts, whole) - whole
  if config.targets in (ALL_LINEAR, ATTENTION):
    targets -= {*tables}
  if config.exclude is not None:
    targets -= _pick(config.exclude, "exclude", leaves, layouts, kernels_only=False)
  if twice := sorted({*tables} & (targets | whole)):
    field, remedy = ("train", "") if twice[0] in whole else ("targets", f" (exclude={re.escape(twice[0])!r})")
    raise ValueError(
      f"LoraConfig.tokens: {listed(twice)}: rows of it train, and {field} picks it, too. Leave it out of one of"
      f" them{remedy}."
    )
  if not targets and config.targets != () and not tables:
    raise ValueError(
      f"LoraConfig.targets: {config.targets!r} leaves nothing to adapt after exclude={config.exclude!r} and"
      f" train={config.train!r}. Widen targets, or narrow exclude or train; targets=[] adapts none and trains whole"
      f" leaves alone. Leaves: {listed(list(leaves))}."
    )
  for field in ("overrides", "axes"):
    for pattern in getattr(config, field) or {}:
      if not any(re.fullmatch(pattern, path) for path in targets | ({*tables} if field == "axes" else set())):
        raise no_match_error(
          f"LoraConfig.{field}[{pattern!r}]", pattern, sorted(targets), "adapted leaves", _left_out(pattern, leaves)
        )
  return targets, whole


def _left_out(pattern: str, leaves: LeavesByPath) -> str:
  """For an error message: the leaves that a pattern matches, where it has to match adapted ones and does not."""
  others = [path for path in leaves if re.fullmatch(pattern, path)]
  if not others:
    return ""
  return f" It matches {listed(others)}, which targets do not pick: widen targets, or drop this entry."


def _targets(config: LoraConfig, leaves: LeavesByPath, layouts: Layouts, whole: set[str]) -> set[str]:
  if not (isinstance(config.targets, str) and config.targets in (ALL_LINEAR, ATTENTION)):
    return _pick(config.targets, "targets", leaves, layouts, kernels_only=True)
  kernels = {path for path, leaf in leaves.items() if _is_kernel(path, leaf, layouts)}
  if config.targets == ATTENTION:
    picked = _attention(kernels)
  else:
    picked, choosing = _all_linear(kernels, leaves, layouts)
    excluded = (
      set() if config.exclude is None else _pick(config.exclude, "exclude", leaves, layouts, kernels_only=False)
    )
    _warn_of_routers(choosing - whole - excluded)
    _warn_of_unknown_products(picked | whole | excluded | choosing, leaves, layouts)
  if not picked:
    raise _preset_finds_nothing(config.targets, leaves, layouts)
  return picked


def _preset_finds_nothing(preset: str, leaves: LeavesByPath, layouts: Layouts) -> ValueError:
  """The error for a preset without a leaf: what could be none, and what else tells."""
  said = f"LoraConfig.targets: the preset {preset!r} finds nothing among {listed(list(leaves))}."
  if codes := _codes(leaves, leaves):
    return ValueError(f"{said} {listed(codes)}: integers are no kernels. {_SCALES_BESIDE}")
  if foreign := [f"{path} (a {type(leaf).__name__})" for path, leaf in leaves.items() if is_foreign(leaf)]:
    return ValueError(
      f"{said} JAX cannot trace {listed(foreign)}: expected arrays of JAX or NumPy. Convert them (jax.numpy.asarray)."
    )
  if layouts.seen is None:
    return ValueError(f"{said} Name the leaves by a regex over whole paths, or pass probe= so that their use tells.")
  return ValueError(f"{said} The probe multiplies by none of them. Name the leaves by a regex over whole paths.")


def _all_linear(kernels: set[str], leaves: LeavesByPath, layouts: Layouts) -> tuple[set[str], set[str]]:
  """Every contracted kernel but routers and the last classifier, which the probe finds, or names; and the routers."""
  if layouts.seen is None:
    heads = {path for path in kernels if _HEADS & set(components(path))}
  else:
    heads = {path for path in kernels if layouts.seen[path].is_classifier}
  picked = kernels - heads or kernels
  choosing = routers(picked, leaves, layouts.seen)
  return (picked - choosing, choosing) if picked > choosing else (picked, set())


# Primitives that contract what they take, and whose roles no evidence tells.
_CONTRACTS = re.compile(r".*(?:dot|matmul|gemm|conv).*|.*_call")


def _warn_of_routers(choosing: set[str]) -> None:
  """Says which routers the preset leaves out."""
  if choosing:
    warnings.warn(
      f"LoraConfig.targets: {ALL_LINEAR!r} leaves out {listed(sorted(choosing))}: what experts are chosen by (a router)"
      " adapts only where it is named. Name it in targets to adapt it, or in exclude to leave it out.",
      UserWarning,
      stacklevel=6,
    )


def _warn_of_unknown_products(picked: set[str], leaves: LeavesByPath, layouts: Layouts) -> None:
  """Says which weights the probe multiplies by and the preset leaves out, as nothing tells what they contract."""
  if layouts.seen is None:
    return
  left_out = {
    path: sorted(primitives)
    for path in leaves
    if path not in picked and layouts.seen[path].ndim > 1 and layouts.seen[path].looked_up is None
    if (primitives := set(filter(_CONTRACTS.fullmatch, layouts.seen[path].used)))
  }
  if left_out:
    shown = [f"{path} (in `{'`, `'.join(primitives)}`)" for path, primitives in left_out.items()]
    warnings.warn(
      f"LoraConfig.targets: {ALL_LINEAR!r} leaves out {listed(shown)}: the probe multiplies by them where it does not"
      f" tell which axes are contracted. Name them in targets and say axes={{pattern: roles}} to adapt them, or in"
      " exclude to leave them out.",
      UserWarning,
      stacklevel=6,
    )


def _attention(kernels: set[str]) -> set[str]:
  parts = {path: components(path) for path in kernels}
  layers = {tuple(names[:k]) for names in parts.values() for k, name in enumerate(names) if _QUERY.fullmatch(name)}

  def in_attention(path: str) -> bool:
    names = parts[path]
    return any(_ATTENTION_MODULE.fullmatch(name) for name in names[:-1]) or any(
      _PROJECTION.fullmatch(name) and tuple(names[:k]) in layers for k, name in enumerate(names)
    )

  return {path for path in kernels if in_attention(path)}


def _is_kernel(path: str, leaf: Any, layouts: Layouts) -> bool:
  """Whether a leaf can be a kernel for the presets and for names of modules."""
  if np.ndim(leaf) < 2 or not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.inexact):
    return False
  seen = None if layouts.seen is None else layouts.seen[path]
  if seen is not None and (seen.contracted is not None or seen.looked_up is not None):
    return seen.is_kernel
  *modules, name = components(path)
  if layouts.is_no_kernel(path) or (seen is not None and seen.used):
    return False
  return name not in _NOT_KERNELS and not any("embed" in part.lower() for part in (*modules[-1:], name))


def _pick(pattern: Pattern, field: str, leaves: LeavesByPath, layouts: Layouts, *, kernels_only: bool) -> set[str]:
  """The paths that a pattern picks; every pattern, and every name in a list, must pick at least one."""
  if callable(pattern):
    picked = {path for path, leaf in leaves.items() if pattern(path, leaf)}
    if not picked:
      raise no_match_error(f"LoraConfig.{field}", pattern, list(leaves))
  elif isinstance(pattern, str):
    picked = {path for path in leaves if re.fullmatch(pattern, path)}
    if not picked:
      raise no_match_error(f"LoraConfig.{field}", pattern, list(leaves))
  else:
    picked = set()
    for name in pattern:
      found = {path for path in leaves if _named(name, path, leaves[path], layouts, kernels_only)}
      if not found:
        raise _no_kernel_error(field, name, leaves)
      picked |= found
  return picked


def _no_kernel_error(field: str, name: str, leaves: LeavesByPath) -> ValueError:
  """The error for a name that picks nothing: it matches no path, or no kernel."""
  others = [path for path in leaves if name_matches(name, path)[0]]
  if not others:
    return no_match_error(
      f"LoraConfig.{field}", name, list(leaves), rule="a name matches a run of whole path components"
    )
  if codes := _codes(others, leaves):
    return ValueError(f"LoraConfig.{field}: {name!r} names no kernel of floats, only {listed(codes)}. {_SCALES_BESIDE}")
  return ValueError(
    f"LoraConfig.{field}: {name!r} names no kernel, only {listed(others)}. Name a leaf itself to adapt it all the same,"
    " or train them whole (LoraConfig.train)."
  )


def _codes(paths: Iterable[str], leaves: LeavesByPath) -> list[str]:
  """The matrices of integers among some leaves, with their dtypes."""
  matrices = [path for path in paths if np.ndim(leaves[path]) > 1 and hasattr(leaves[path], "dtype")]
  return [f"{path} ({leaves[path].dtype})" for path in matrices if jnp.issubdtype(leaves[path].dtype, jnp.integer)]


_SCALES_BESIDE = (
  "Codes are a base with their scales beside them: quantise the floats (jaxlora.quantize), or take a file's codes"
  " (jaxlora.quant.from_tensors, jaxlora.quant.from_gguf)."
)


def _named(name: str, path: str, leaf: Any, layouts: Layouts, kernels_only: bool) -> bool:
  """A name picks the leaf it names, and the kernels (for `train`, all leaves) under a module it names."""
  matches, is_leaf = name_matches(name, path)
  if not matches:
    return False
  looked_up = layouts.seen is not None and layouts.seen[path].looked_up is not None
  named_table = name.split("/")[-1] in components(path)[-2:] and _is_table(path, leaf)
  return not kernels_only or is_leaf or looked_up or named_table or _is_kernel(path, leaf, layouts)


def _is_table(path: str, leaf: Any) -> bool:
  return np.ndim(leaf) == 2 and components(path)[-1] == "embedding"
