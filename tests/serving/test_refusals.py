"""Adapters, bases and calls that do not fit a bank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests.helpers import array
from tests.helpers.adapters import trained
from tests.serving.banks import IDS, adapter, adapters, bank_of, close, data, mlp, one_by_one, other_base, params_of


def test_a_gain_over_outputs_has_no_place_in_a_bank():
  with pytest.raises(ValueError, match="'adapter 0': down/kernel: the variant 'dora' scales the outputs"):
    bank_of([adapter(10, variant="dora")])
  with pytest.raises(ValueError, match="the variant 'dora' scales the outputs"):
    bank_of(adapters()).put("x", adapter(10, variant="dora"))


def test_a_bank_knows_its_base_by_its_values():
  bank, other = bank_of(adapters(), capacity=5), jax.tree.map(jnp.sin, params_of())
  with pytest.raises(ValueError, match=r"bank.put: 'x': the base is another one than the bank's, in .*up/kernel"):
    bank.put("x", adapter(4, params=other))
  with pytest.raises(ValueError, match=r"route: frozen: the base is another one than the bank's, in .*up/kernel"):
    jaxlora.route(mlp)(other, bank, np.asarray(IDS), data())
  assert bank.put("x", adapter(4)).names[-1] == "x"
  half = bank_of([jaxlora.split(tree)[1] for tree in adapters()])  # came without a base: shapes are all there is
  jaxlora.route(mlp)(other, half, np.asarray(IDS), data())


BAD_STACKS = {
  "no adapters": (lambda: {}, {}, ValueError, "no adapters"),
  "name": (lambda: {3: adapter(0)}, {}, TypeError, "name is a string"),
  "capacity": (lambda: {"x": adapter(0), "y": adapter(1)}, {"capacity": 1}, ValueError, "2 adapters, .* capacity of 1"),
  "rank": (lambda: {"x": adapter(0, 3)}, {"rank": 2}, ValueError, "'x': (up|down)/kernel: rank 3 is above .* 2"),
  "not a rank": (lambda: {"x": adapter(0)}, {"rank": 0}, ValueError, "rank is 0"),
  "frozen half": (lambda: {"x": jaxlora.split(adapter(0))[0]}, {}, ValueError, "frozen half"),
  "plain": (lambda: {"x": params_of()}, {}, ValueError, "no adapted leaf"),
  "other shapes": (
    lambda: {"x": adapter(0), "y": adapter(1, params=other_base())}, {}, ValueError, "'y': up/kernel: factor a "
  ),
  "other values": (
    lambda: {"x": adapter(0), "y": adapter(1, params=jax.tree.map(jnp.sin, params_of()))},
    {},
    ValueError,
    "'y': the base is another one than the bank's, in .*up/kernel",
  ),
  "other nesting": (
    lambda: {"x": adapter(0), "y": adapter(1, params=params_of()["up"])}, {}, ValueError, "'y': the tree is nested"
  ),
  "other roles": (
    lambda: {"x": adapter(0), "y": adapter(1, axes={"up/kernel": "oi"})}, {}, ValueError, "'y': up/kernel: roles 'oi'"
  ),
  "whole and not": (
    lambda: {"x": adapter(0), "y": adapter(1, targets="up/kernel", train=["down/kernel"])},
    {},
    ValueError,
    "'y': down/kernel is trained whole",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STACKS)
def test_bad_stacks(case):
  make, options, error, message = BAD_STACKS[case]
  with pytest.raises(error, match=message):
    jaxlora.stack(make(), **options)


BAD_PUTS = {
  "full": (lambda: ("new", adapter(1)), {"capacity": 1}, "the bank is full: 1 adapters"),
  "rank": (lambda: ("new", adapter(1, 3)), {"capacity": 2}, "rank 3 is above the bank's, 2"),
  "leaf": (lambda: ("new", adapter(1, train=["up/bias"])), {"capacity": 2}, "up/bias, for which the bank has no room"),
  "base": (lambda: ("new", adapter(1, params=other_base())), {"capacity": 2}, "up/kernel: factor a has shape"),
}


@pytest.mark.parametrize("case", BAD_PUTS)
def test_bad_puts_leave_the_bank_as_it_was(case):
  make, options, message = BAD_PUTS[case]
  bank = bank_of([adapter(0)], **options)
  before = jax.tree.map(np.array, bank.factors)
  with pytest.raises(ValueError, match=message):
    bank.put(*make(), donate=True)
  assert bank.names == ("adapter 0",)
  jax.tree.map(np.testing.assert_array_equal, bank.factors, before)


def test_unknown_names():
  bank = bank_of([adapter(0)])
  for call in (bank.take, bank.remove, lambda name: bank.ids([name])):
    with pytest.raises(ValueError, match=r"no adapter 'else'; the bank holds 'adapter 0'"):
      call("else")


BAD_ROUTES = {
  "via": (lambda: jaxlora.route(mlp, via="magic"), ValueError, "via is 'magic'"),
  "on_materialize": (lambda: jaxlora.route(mlp, on_materialize="no"), ValueError, "on_materialize is 'no'"),
  "id above": (lambda: routed(ids=[0, 7]), ValueError, r"ids\[1\] is 7, expected -1 .* 0 to 2"),
  "id below": (lambda: routed(ids=[-2, 0]), ValueError, r"ids\[0\] is -2"),
  "empty slot": (lambda: routed(ids=[0, 2]), ValueError, r"ids\[1\] is 2, a slot of the bank that no adapter is in"),
  "id kind": (lambda: routed(ids=[0.0, 1.0]), TypeError, "expected integers"),
  "names": (lambda: routed(ids=["adapter 0", "adapter 1"]), TypeError, r"bank.ids\(names\)"),
  "id axes": (lambda: routed(ids=[[0, 1]]), ValueError, r"ids have shape \(1, 2\)"),
  "rows": (lambda: routed(ids=[0, 1, 1]), ValueError, "expected 3 rows along axis 0"),
  "no bank": (lambda: routed(bank={}), TypeError, "found dict for the bank"),
  "whole tree": (lambda: routed(frozen=adapter(0)), ValueError, "expected the base alone"),
  "trainable half": (lambda: routed(frozen=jaxlora.split(adapter(0))[1]), ValueError, "found a trainable half"),
  "other base": (lambda: routed(frozen=other_base()), ValueError, "up/kernel: the base has shape"),
  "other nesting": (lambda: routed(frozen={"up": params_of()["up"]}), ValueError, "nested otherwise"),
  "axes": (lambda: routed(in_axes=(0, 0)), ValueError, "in_axes"),
  "axis": (lambda: routed(in_axes="rows"), ValueError, "in_axes"),
  "no rows in the result": (lambda: routed(fn=lambda p, x: mlp(p, x)[0]), ValueError, "the result root .* size 1"),
  "differs": (lambda: routed(out_axes=None), ValueError, "differs from row to row"),
}


@functools.cache
def two_of_three():
  """A bank with an empty slot."""
  return bank_of([adapter(0), adapter(1)], capacity=3)


def routed(fn=mlp, frozen=None, bank=None, ids=(0, 1), **options):
  frozen = params_of() if frozen is None else frozen
  bank = two_of_three() if bank is None else bank
  return jaxlora.route(fn, **options)(frozen, bank, np.asarray(ids), data(2))


@pytest.mark.parametrize("case", BAD_ROUTES)
def test_bad_routes(case):
  call, error, message = BAD_ROUTES[case]
  with pytest.raises(error, match=message):
    call()


def test_a_product_that_contradicts_uncertain_roles_is_an_error_and_its_remedies_work():
  """As in `wrap`: an adapter of a bank may be exported."""
  params = {"q": {"kernel": array(1, (8, 8), jnp.float32)}}
  fn = lambda p, x: x @ p["q"]["kernel"].T
  x, ids = array(2, (3, 8), jnp.float32), np.asarray((1, -1, 0))
  make = lambda seed, **known: adapter(seed, params=params, **known)
  bank = bank_of([make(0), make(1)])
  for routed in (jaxlora.route(fn), jax.jit(jaxlora.route(fn))):
    with pytest.raises(ValueError, match=r"q/kernel: roles 'io' of shape .* contracts the axes that they call free"):
      routed(params, bank, ids, x)
  for known in ({"axes": {"q/kernel": "oi"}}, {"axes": {"q/kernel": "io"}}, {"probe": lambda p: fn(p, x)}):
    trees = [make(0, **known), make(1, **known)]
    close(jaxlora.route(fn)(params, bank_of(trees), ids, x), one_by_one(fn, params, trees, ids, x))


def test_an_adapter_of_uncertain_roles_makes_no_bank_surer():
  params = {"q": {"kernel": array(1, (8, 8), jnp.float32)}}
  sure, unsure = adapter(0, params=params, axes={"q/kernel": "io"}), adapter(1, params=params)
  first = bank_of([sure], capacity=2)
  second = first.put("x", unsure)
  assert [bank.factors["q/kernel"].sure for bank in (first, second, second.remove("x"))] == [True, False, False]
  assert first.put("y", sure).factors["q/kernel"].sure
  assert jax.tree.structure(first) == jax.tree.structure(second)


def test_rows_of_a_mixed_batch_that_meet_grouped_experts():
  """JAX does not batch a `ragged_dot` whose experts are shared; one adapter at a time is the way."""
  params, x = {"w": array(1, (3, 5, 7), jnp.float32)}, array(2, (2, 4, 5), jnp.float32)
  config = jaxlora.LoraConfig(rank=2, axes={"w": "sio"})
  tree = trained(jaxlora.adapt(params, config, jax.random.key(0)))
  bank = jaxlora.stack({"one": tree})
  fn = lambda p, x: jax.lax.ragged_dot(x.reshape(-1, 5), p["w"], jnp.array([2, 0, 2]))
  with pytest.raises(
    NotImplementedError, match=r"route: w meets the rows of a mixed batch in .*jaxlora.join\(frozen, bank.take\(name\)"
  ):
    jaxlora.route(fn)(params, bank, bank.ids(["one", None]), x)
  alone = jaxlora.wrap(fn)(jaxlora.join(jaxlora.split(tree)[0], bank.take("one")), x[0])
  close(alone, fn(jaxlora.merge(tree), x[0]))
