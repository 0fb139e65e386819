"""`quantize` and `dequantize`: between trees of floats and trees whose weights are codes and scales."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.checks import all_finite, is_abstract, is_known, positive
from jaxlora._base.coded import decoded, is_coded
from jaxlora._base.memory import moved, on_device, space_of
from jaxlora._base.sizes import bytes_of
from jaxlora._quant.array import QuantizedArray
from jaxlora._quant.blocks import block_shape
from jaxlora._quant.encode import encode
from jaxlora._quant.formats import PUBLIC
from jaxlora._weight.weight import is_adapted, is_leaf_node
from jaxlora.quant._plan import Plan, plan_tree
from jaxlora.quant._report import LeafQuantization, Quantization, leaf_report, output_error
from jaxlora.quant._shards import check_shards, placed, whole_where_types_say_shards


def quantize(
  params: Any,
  format: str,
  *,
  block_size: int | None = 64,
  double: bool = True,
  targets: Any = "all-linear",
  exclude: Any = None,
  axes: Mapping[str, str] | None = None,
  probe: Callable[[Any], Any] | None = None,
) -> Any:
  """Puts a `QuantizedArray` in the place of every targeted leaf: codes, and a scale for each block of them.

      W -> value(codes) * scales

  Blocks run along the contracted axes of a weight, and along the features of an embedding. A block is the largest
  divisor of the axis from half of `block_size` to the whole of it, else the next larger one: none is cut, none padded.
  The tree goes wherever the floats went: `adapt`, `wrap`, `split`, `merge`, checkpoints, banks. Call functions of it
  through `wrap`, with adapters or without. On a mesh codes and scales lie along the axes that the floats do.

  One leaf after the other is moved to the device, written and let go of: of a tree of NumPy arrays (memory-mapped
  files, say) no more than one is on the device in floats.

  Args:
    params: any pytree of arrays; leaves may be `jax.ShapeDtypeStruct`s, whose codes lie as their shardings say.
    format: `"nf4"` (the code book of QLoRA: codes and scales are bitsandbytes' bit for bit), `"int8"`, `"int4"`
      (-7 to 7), `"q4_0"` (-8 to 7, scaled by the element of the largest magnitude), `"fp8"` (e4m3).
    block_size: elements that share a scale; `None` for all along the contracted axes, a scale for each output.
    double: whether scales are written as codes of 8 bits, too, with a scale for 256 of them.
    targets, exclude: which leaves, as in `LoraConfig`. Embeddings have to be named.
    axes: pattern -> roles, as in `LoraConfig`.
    probe: as in `adapt`: tells which axes are contracted.

  Returns:
    A tree of the same nesting.

  Raises:
    ValueError: naming the leaf, what was found and what to do: an unknown format, a pattern without a match, a leaf
      that is adapted, quantised, no float, empty or a vector, NaN or infinite values, kernels of which nothing tells
      the contracted axes, shards that would cut a block.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (128, 32)), "bias": jnp.zeros(32)}}
    >>> tree = quantize(params, "nf4")
    >>> tree["dense"]["kernel"]
    QuantizedArray(128x32 float32 as nf4, blocks 64x1, double)
    >>> jaxlora.wrap(lambda p, x: x @ p["dense"]["kernel"])(tree, jnp.ones((2, 128))).shape
    (2, 32)

  Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, sections 3.1 and 3.2.
  """
  plan = _checked(params, format, block_size, targets, exclude, axes, probe)
  return _tree(plan, format, block_size, double, lambda path, before, after: None)


def quantize_with_report(
  params: Any,
  format: str,
  *,
  block_size: int | None = 64,
  double: bool = True,
  targets: Any = "all-linear",
  exclude: Any = None,
  axes: Mapping[str, str] | None = None,
  probe: Callable[[Any], Any] | None = None,
) -> tuple[Any, Quantization]:
  """`quantize`, and what each leaf lost by it.

  Args:
    params, format, block_size, double, targets, exclude, axes: as for `quantize`.
    probe: as for `quantize`. Here it is run, too, on the floats and on what they became.

  Returns:
    The tree, and a `Quantization`: fields to compute with, a table when printed.

  Raises:
    ValueError: as `quantize`.

  Example:
    >>> import jax, jaxlora
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (128, 32))}
    >>> tree, report = quantize_with_report(params, "nf4", probe=lambda p: jax.numpy.ones((2, 128)) @ p["kernel"])
    >>> [f"{leaf.path}: {leaf.bits:.1f} bits, error {leaf.error:.2f}" for leaf in report.leaves]
    ['kernel: 4.1 bits, error 0.09']
  """
  plan = _checked(params, format, block_size, targets, exclude, axes, probe)
  reports: list[LeafQuantization] = []
  note = lambda path, before, after: reports.append(leaf_report(path, before, after))
  tree = _tree(plan, format, block_size, double, note)
  sizes, values = (bytes_of(params), bytes_of(tree)), plan.leaves.values()
  known = is_known(*values) and not any(map(is_abstract, values))
  outputs = None if probe is None or not known else output_error(probe, params, tree)
  return tree, Quantization(tuple(reports), *sizes, outputs)


def _checked(params: Any, format: Any, block_size: Any, targets: Any, exclude: Any, axes: Any, probe: Any) -> Plan:
  if format not in PUBLIC:
    raise ValueError(f"quantize: format is {format!r}, expected one of {', '.join(map(repr, PUBLIC))}.")
  if block_size is not None:
    positive(block_size, "quantize: block_size")
  return plan_tree(params, targets, exclude, axes, probe)


def _tree(plan: Plan, format: str, block_size: int | None, double: bool, note: Callable[[str, Any, Any], None]) -> Any:
  """The tree with codes, one leaf after the other. `note` is told each path, its floats on the device, its codes."""
  new = {}
  for path, axes in plan.axes.items():
    block = block_shape(plan.leaves[path].shape, axes.along, block_size)
    check_shards("quantize", path, plan.leaves[path], block, _UNCUT)
  for path, axes in plan.axes.items():
    make = functools.partial(
      encode, format=format, axes=axes.along, across=axes.across, block_size=block_size, double=double
    )
    new[path] = _quantized(path, plan.leaves[path], make, note)
  return plan.treedef.unflatten((plan.leaves | new).values())


_UNCUT = "Use block_size={own}, shard the weight along another axis, or quantise it before it is sharded."


def _quantized(
  path: str, leaf: Any, make: Callable[[Any], QuantizedArray], note: Callable[[str, Any, Any], None]
) -> QuantizedArray:
  if is_abstract(leaf):
    plain = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # types of explicit meshes follow no reshape into blocks
    codes = placed(jax.eval_shape(make, plain), leaf)
    note(path, leaf, codes)
    return codes
  resting = jnp.asarray(leaf)
  array = whole_where_types_say_shards(on_device(resting))
  if is_known(array) and not all_finite(array.astype(jnp.float32)):
    raise ValueError(
      f"quantize: {path}: found NaN or infinite values (in float32), expected finite ones: one of them spoils its whole"
      f" block. Repair the weight, or leave it out (exclude=)."
    )
  codes = make(array)
  note(path, array, codes)
  return jax.block_until_ready(placed(moved(codes, space_of(resting)), leaf))


def dequantize(tree: Any) -> Any:
  """Floats again: every quantised leaf, and every quantised base of an adapted one, as the array that it stands for.

  Args:
    tree: what `quantize` returned, adapted or not.

  Returns:
    A tree of the same nesting; leaves that are not quantised are the same.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (128, 32))}
    >>> back = dequantize(jaxlora.quantize(params, "int8"))["kernel"]
    >>> bool(jnp.abs(back - params["kernel"]).max() < 0.02)
    True
  """

  def formed(leaf: Any) -> Any:
    return moved(decoded(on_device(leaf)), space_of(leaf)) if is_coded(leaf) else leaf

  def one(node: Any) -> Any:
    return node.with_parts({"base": formed(node.base)}) if is_adapted(node) else formed(node)

  return jax.tree.map(one, tree, is_leaf=is_leaf_node)
