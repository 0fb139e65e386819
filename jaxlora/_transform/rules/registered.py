"""Products that users have registered: the function itself on the base, and beside it on the factors."""

from collections.abc import Sequence
from typing import Any

from jaxlora._jax.marked_call import NAME
from jaxlora._transform.factored import Factored, TracedWeight, Unfactorable, dropped, weights_in
from jaxlora._transform.pairing import matched_roles
from jaxlora._transform.registered import Meeting, Registered, ThinProducts
from jaxlora._transform.rule import Op, rule


@rule(NAME)
def _registered(op: Op, args: Sequence[Any]) -> list[Any]:
  registered: Registered = op.params["mark"]
  if len(weights_in(args)) > 1 or not weights_in(args[:2]):
    raise Unfactorable(f"{registered.name} has several adapted weights, or one in no place of a weight's")
  meeting = registered.spec.meeting(0 if isinstance(args[0], TracedWeight) else 1)
  w = _met(args[meeting.place], meeting, registered)
  x, rest = args[1 - meeting.place], args[2:]
  if w.gain is not None:
    raise Unfactorable(
      f"the weight's variant scales it, and the rule of {registered.name} does not tell which rows meet it"
    )
  op.note(registered.name)
  base = op.bind(*meeting.in_order(x, w.base), *rest)[0]
  u, _ = dropped(x, w, op.use, None)
  thin = ThinProducts(registered, meeting)
  try:
    h = op.shrink(thin.shrink, u, w.a, None, *rest)
    delta = thin.expand(h, w.b, u.dtype, *rest)
  except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
    raise Unfactorable(
      f"{registered.name} does not take a weight that is a rank wide ({type(error).__name__}: {error}); say which"
      " function does: register_product(..., thin=)"
    ) from error
  if delta.shape != base.shape:
    raise Unfactorable(f"the thin products of {registered.name} give shape {delta.shape}, expected {base.shape}")
  return [op.policy.sum(base, delta.astype(base.dtype), op.looping)]


def _met(w: Factored, meeting: Meeting, registered: Registered) -> Factored:
  """The weight as the product meets it: what is summed has role `i`, and stacks are stacks."""
  wanted, sides = meeting.roles, (meeting.contracted, meeting.free)
  if not meeting.has_thin:
    raise Unfactorable(f"{registered.spec.text!r} leaves no room for a low-rank update")
  summed = {w.roles[d] for d in meeting.contracted if w.shape[d] != 1}
  flips = summed == {"o"}
  groups = [*zip(sides, "oi" if flips else "io", strict=True), (meeting.shared, "s")]
  roles = matched_roles(w.shape, w.roles, groups)
  turned = wanted.translate(str.maketrans("io", "oi")) if flips else wanted
  if roles != turned:
    raise Unfactorable(f"roles {w.roles!r} where {registered.name} has {turned!r}")
  w = w.with_roles(roles)
  return w.flipped() if flips else w
