"""`merge_and_requantize`: updates folded into weights that stay codes."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._adapt.merge import merge
from jaxlora._base.checks import is_known
from jaxlora._base.coded import decoded, is_coded
from jaxlora._base.dtypes import wide
from jaxlora._base.memory import on_device
from jaxlora._base.paths import flatten
from jaxlora._base.sizes import bytes_of
from jaxlora._quant.again import cannot_rewrite, encoded_as
from jaxlora._weight.checks import check_parts
from jaxlora._weight.weight import is_adapted, is_leaf_node
from jaxlora.quant._report import LeafQuantization, Quantization, leaf_report


def merge_and_requantize(tree: Any) -> tuple[Any, Quantization]:
  """Folds every update into its weight, and writes what was codes as codes again: plain parameters of the base's size.

      W' = q(value(codes) * scales + scale * A B)

  Each base keeps its format, its blocks, its levels of scales, and where it lies; one with an update of zero is the
  same. Rounding to 4 bits takes much of a small update: the report says how much. `jaxlora.merge` gives floats.

  Args:
    tree: what `adapt` returned on a quantised base, trained or not. One leaf after the other is formed in floats.

  Returns:
    Parameters of the original nesting, and a report on the leaves that were written again: `error` is relative to the
    merged weight, `update_error` to its update. Adapted leaves whose base is floats are merged as `merge` does; all
    other leaves are the same.

  Raises:
    ValueError: naming the leaf: as `merge`; where no update lies on codes, or where codes are only read here.

  Example:
    >>> import dataclasses, jax, jaxlora
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (128, 32))}
    >>> config = jaxlora.LoraConfig(rank=2)
    >>> tree = jaxlora.adapt(jaxlora.quantize(params, "int8"), config, jax.random.key(0))
    >>> tree["kernel"] = dataclasses.replace(tree["kernel"], b=jax.numpy.ones((2, 32)))  # as if it were trained
    >>> merged, report = jaxlora.quant.merge_and_requantize(tree)
    >>> merged["kernel"], report.leaves[0].update_error < 0.2
    (QuantizedArray(128x32 float32 as int8, blocks 64x1, double), True)

  Source: Dettmers et al., "QLoRA", arXiv:2305.14314; as PEFT merges into layers of bitsandbytes.
  """
  nodes, treedef = flatten(tree, is_leaf=is_leaf_node)
  leaves = dict(nodes)
  coded = [path for path, node in nodes if is_adapted(node) and _on_codes(path, node)]
  if not coded:
    raise ValueError(
      "merge_and_requantize: found no adapted weight whose base is codes, expected an adapted tree of a quantised base."
      " Merge a tree of floats with jaxlora.merge, and quantise what that gives (jaxlora.quantize)."
    )
  reports = []
  for path in coded:
    leaves[path], report = _again(path, leaves[path])
    reports.append(report)
  merged = merge(jax.tree.unflatten(treedef, leaves.values()))
  return merged, Quantization(tuple(reports), bytes_of(tree), bytes_of(merged), None)


def _on_codes(path: str, node: Any) -> bool:
  """Whether the base of an adapted leaf is codes, which can be written again."""
  check_parts(node, f"merge_and_requantize: {path}", ("base",))
  if not is_coded(node.base):
    return False
  if (why := cannot_rewrite(node.base)) is not None:
    raise ValueError(f"merge_and_requantize: {path}: {why}. Merge it in floats: jaxlora.merge(tree).")
  return True


def _again(path: str, node: Any) -> tuple[Any, LeafQuantization]:
  whole = on_device(merge({path: node}, dtype=wide(node.base))[path])
  unchanged = is_known(whole) and bool(jnp.array_equal(whole, decoded(on_device(node.base)).astype(whole.dtype)))
  new = node.base if unchanged else encoded_as(whole, node.base)
  return new, leaf_report(path, whole, new, node.base)
