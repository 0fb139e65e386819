"""`register_product`: tells the transform that a function of one's own is a product.

Reading order: the registered function -> its checks.
"""

from collections.abc import Callable, Sequence
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._jax.marked_call import marked_call
from jaxlora._transform.registered import Registered, Spec, ThinProducts
from jaxlora._weight.roles import factor_shape, low_rank_delta

# ----------------------------------------------------------------------------------------------------------------------
# The registered function.


def register_product(
  fn: Callable[..., jax.Array],
  rule: str,
  *,
  thin: Callable[..., jax.Array] | None = None,
  example: Sequence[Any] | None = None,
) -> Callable[..., jax.Array]:
  """Tells the transform that a function is a product: `fn(x, W + A B) = fn(x, W) + fn(fn(x, A), B)`.

  A kernel with a derivative of its own, a `jax.custom_vjp` or a Pallas kernel, hides its product: `wrap` would form an
  adapted weight ahead of it. What this returns is to be called in the kernel's place. Under `wrap` the kernel is then
  called on the base as it is, and beside it twice with the factors.

  Args:
    fn: of arrays by position, and of options by keyword, with one array as its result. Its first two arguments are the
      input and the weight, in either order; what follows says which rows meet what, such as the sizes of groups.
    rule: one letter for each axis, as in `einsum`: `"mk,gkn,g->mn"` for a grouped product of rows (m, k), experts
      (g, k, n) and sizes (g,). A letter of the weight that neither the input nor the result has is a stack, which must
      be one in its roles, too (`"sio"`).
    thin: of the same arrays, without the options: computes the products with the factors, of which one side is a rank
      wide, where the kernel does not take such shapes. `jax.lax.ragged_dot`, say. By default `fn` itself.
    example: operands to try the rule on, now: `fn` is run on small updates of the weight, and must agree with the two
      thin products.

  Returns:
    A function of the same arguments.

  Raises:
    TypeError, ValueError: on a rule that describes no product; on an example that the function does not agree with; and
      when called, on arrays that the rule does not fit.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> @jax.custom_vjp
    ... def kernel(x, w):
    ...   return x @ w
    >>> kernel.defvjp(lambda x, w: (x @ w, (x, w)), lambda xw, dy: (dy @ xw[1].T, xw[0].T @ dy))
    >>> product = jaxlora.register_product(kernel, "mk,kn->mn", example=(jnp.ones((2, 3)), jnp.ones((3, 4))))
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((3, 4))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> fn = lambda p, x: product(x, p["kernel"])
    >>> jaxlora.wrap(fn, on_materialize="error")(tree, jnp.ones((2, 3))).shape
    (2, 4)

  Source: Hu et al. 2021, arXiv:2106.09685: the update beside the product, not in the weight.
  """
  name = getattr(fn, "__name__", type(fn).__name__)
  for value, field in ((fn, "fn"), *(((thin, "thin"),) if thin is not None else ())):
    if not callable(value):
      raise TypeError(f"register_product: {field} is {value!r}, expected a function.")
  spec = _spec(rule, name)

  @functools.wraps(fn)
  def product(*args: Any, **options: Any) -> jax.Array:
    if any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(options)):
      raise TypeError(f"{name}: an array is passed by keyword, expected arrays by position, as {spec.text!r} has them.")
    whole = functools.partial(fn, **options)
    arrays = [jnp.asarray(arg) for arg in args]
    sizes = _sizes(name, spec, arrays)
    y = marked_call(whole, Registered(name, spec, whole if thin is None else thin), *arrays)
    _check_shape(name, spec, "the result", y, spec.out, sizes)
    return y

  if example is not None:
    _try_out(product, Registered(name, spec, fn if thin is None else thin), [jnp.asarray(x) for x in example])
  return product


# ----------------------------------------------------------------------------------------------------------------------
# Its checks.

_RULE = re.compile(r"[a-zA-Z]+(?:,[a-zA-Z]*)+->[a-zA-Z]+")


def _spec(rule: Any, name: str) -> Spec:
  where = f"register_product: the rule of {name} is {rule!r}"
  if not isinstance(rule, str) or not _RULE.fullmatch(text := rule.replace(" ", "")):
    raise ValueError(
      f"{where}, expected one letter for each axis, input and weight first, such as 'mk,kn->mn', or 'mk,gkn,g->mn' with"
      " the sizes of groups."
    )
  terms, out = text.split("->")
  operands = tuple(terms.split(","))
  for term in (*operands, out):
    if len({*term}) < len(term):
      raise ValueError(f"{where}: {term!r} has a letter twice, expected another one for each axis.")
  first, second, *rest = operands
  if unknown := {*out} - {*first, *second}:
    raise ValueError(f"{where}: neither input nor weight has {', '.join(sorted(unknown))} of the result.")
  if not {*first} & {*second} - {*out}:
    raise ValueError(f"{where}: nothing is summed; expected a letter of input and weight that the result lacks.")
  lost = ({*first} ^ {*second}) - {*out} - {*"".join(rest)}
  if lost:
    raise ValueError(
      f"{where}: {', '.join(sorted(lost))} goes nowhere; expected it in the result, or in an operand that picks from"
      " it."
    )
  return Spec(text, operands, out)


def _sizes(name: str, spec: Spec, args: Sequence[jax.Array]) -> dict[str, int]:
  """The size of each letter in a call; raises unless the arrays are as the rule says."""
  if len(args) != len(spec.operands):
    raise TypeError(f"{name}: found {len(args)} arrays, expected {len(spec.operands)}, as {spec.text!r} has them.")
  sizes: dict[str, int] = {}
  for k, (arg, letters) in enumerate(zip(args, spec.operands, strict=True)):
    _check_shape(name, spec, f"argument {k}", arg, letters, sizes)
  return sizes


def _check_shape(name: str, spec: Spec, what: str, array: jax.Array, letters: str, sizes: dict[str, int]) -> None:
  """Raises unless an array has the sizes that are known; adds those that were not."""
  fits = array.ndim == len(letters)
  if not fits or any(sizes.setdefault(letter, n) != n for letter, n in zip(letters, array.shape, strict=True)):
    raise ValueError(f"{name}: {what} has shape {array.shape}, expected {letters!r} of {spec.text!r}, where {sizes}.")


def _try_out(product: Callable[..., jax.Array], registered: Registered, args: Sequence[jax.Array]) -> None:
  """Raises unless a function is the product that its rule says, on an example."""
  y = product(*args)
  x, w, *rest = args
  meeting = registered.spec.meeting(1)
  if not meeting.has_thin:
    raise ValueError(f"register_product: {registered.spec.text!r} leaves no room for a low-rank update of the weight.")
  keys = jax.random.split(jax.random.key(0))
  shapes = (factor_shape(w.shape, meeting.roles, own, 2) for own in "io")
  a, b = (jax.random.normal(key, shape, w.dtype) for key, shape in zip(keys, shapes, strict=True))
  thin = ThinProducts(registered, meeting)
  found = y + thin.expand(thin.shrink(x, a, *rest), b, x.dtype, *rest).astype(y.dtype)
  expected = product(x, (w + low_rank_delta(a, b, meeting.roles)).astype(w.dtype), *rest)
  error = float(jnp.abs(found - expected).max() / jnp.maximum(jnp.abs(expected).max(), 1e-30))
  if not error < 4 * float(jnp.finfo(w.dtype).eps) ** 0.5:
    raise ValueError(
      f"register_product: {registered.name} is no product as {registered.spec.text!r} says: on the example"
      f" fn(x, W + A B) and fn(x, W) + fn(fn(x, A), B) differ by {error:.1e} of the largest element. Check the rule;"
      " what the function adds, scales or rounds beside the product belongs outside of it."
    )
