"""What is in a bank: adapters are put, removed and taken, and nothing compiles twice."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests.serving.banks import IDS, WAYS, adapter, adapters, bank_of, close, data, forms, mlp, one_by_one, params_of


def test_a_hundred_swaps_compile_nothing():
  params, x = params_of(), data()
  frozen, _ = jaxlora.split(adapter(0))
  trees = [adapter(k, rank=1 + k % 3, alpha=1.0 + k) for k in range(4)]
  routed = jax.jit(chex.assert_max_traces(jaxlora.route(mlp), 1))
  joined = jax.jit(chex.assert_max_traces(lambda frozen, half, x: jaxlora.wrap(mlp)(jaxlora.join(frozen, half), x), 1))
  bank = jaxlora.stack({"first": trees[0]}, capacity=3, rank=3)
  ids = np.random.default_rng(0)
  for k in range(100):
    half = jaxlora.pad(jaxlora.split(trees[k % 4])[1], 3)
    bank = bank.put(f"number {k}", trees[k % 4], donate=True)
    row = int(bank.ids([f"number {k}"])[0])
    mix = ids.choice([row, int(bank.ids(["first"])[0]), -1], 6)
    out = routed(params, bank, mix, x)
    alone = joined(frozen, half, x)
    if row in mix and k % 25 == 0:
      close(out[mix == row], alone[mix == row])
    bank = bank.remove(f"number {k}", donate=True)
  assert bank.names == ("first",)
  again = jaxlora.stack({"other": trees[3]}, capacity=3, rank=3)
  routed(params, again, np.asarray([0] * 6), x)
  joined(frozen, again.take("other"), x)


def test_writing_in_place_takes_the_old_bank():
  bank = bank_of(adapters(), capacity=5)
  old = bank.factors["up/kernel"].a
  new = bank.put("new", adapter(1), donate=True)
  assert old.is_deleted()
  assert new.put("newer", adapter(2)).remove("new").names == ("adapter 0", "adapter 1", "adapter 2", "newer")
  assert not new.factors["up/kernel"].a.is_deleted()


def test_put_remove_take():
  trees, params, x = adapters(), params_of(), data(2)
  bank = bank_of(trees, capacity=4)
  assert bank.names == ("adapter 0", "adapter 1", "adapter 2")
  assert (len(bank), bank.capacity, "adapter 1" in bank, "else" in bank, None in bank) == (3, 4, True, False, False)
  np.testing.assert_array_equal(bank.ids(["adapter 2", None, "adapter 0"]), [2, -1, 0])
  for k, tree in enumerate(trees):
    frozen, half = jaxlora.split(tree)
    taken = bank.take(f"adapter {k}")
    close(jaxlora.wrap(mlp)(jaxlora.join(frozen, taken), x), jaxlora.wrap(mlp)(tree, x))
    assert jax.tree.structure(taken) == jax.tree.structure(jaxlora.pad(half, 3))
  without = bank.remove("adapter 1")
  assert without.names == ("adapter 0", "adapter 2")
  assert bank.names == ("adapter 0", "adapter 1", "adapter 2")
  routed = jax.jit(jaxlora.route(mlp))
  close(routed(params, without, jnp.asarray([1, 1]), x), mlp(params, x))
  new = adapter(9)
  replaced = without.put("adapter 0", new).put("fourth", trees[1])
  assert replaced.names == ("adapter 0", "fourth", "adapter 2")
  close(
    routed(params, replaced, replaced.ids(["adapter 0", "fourth"]), x),
    one_by_one(mlp, params, [new, trees[1]], (0, 1), x),
  )
  assert forms(replaced) == forms(bank)


def test_halves_and_whole_trees_make_one_bank():
  trees = adapters()
  halves = bank_of([jaxlora.split(tree)[1] for tree in trees])
  jax.tree.map(np.testing.assert_array_equal, halves.factors, bank_of(trees).factors)


def test_memory_is_the_adapters_own():
  bank = bank_of([adapter(k) for k in range(4)])
  own = sum(leaf.nbytes for leaf in jax.tree.leaves(jaxlora.split(adapter(0))[1]))
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(bank)) == 4 * (own + 2 * 4)  # and who has each of two leaves
  assert f"{4 * (own + 8):,} bytes" in repr(bank)


def test_half_precision_bases_keep_finer_factors():
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of())
  trees = [adapter(k, params=params, dtype="float32") for k in range(2)]
  bank, x = bank_of(trees, capacity=50), data(3, jnp.bfloat16)
  got = jax.jit(jaxlora.route(mlp))(params, bank, jnp.asarray([1, -1, 0]), x)
  assert got.dtype == jnp.bfloat16
  want = one_by_one(mlp, params, trees, (1, -1, 0), x)
  np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=0.1, rtol=0.05)


def test_a_diverged_adapter_does_not_get_in_and_harms_nobody_else():
  trees, params, x = adapters(), params_of(), data()
  bank = bank_of(trees, capacity=9)
  diverged = jax.tree.map(lambda leaf: leaf * jnp.asarray(jnp.inf, leaf.dtype), jaxlora.split(trees[0])[1])
  with pytest.raises(ValueError, match=r"'adapter 0': (up|down)/kernel: found NaN or infinite values in a, b"):
    bank.put("adapter 0", diverged)
  with pytest.raises(ValueError, match="found NaN or infinite"):
    jaxlora.stack({"x": diverged})
  bank = jax.tree.map(lambda leaf: leaf if leaf.ndim < 3 else leaf.at[0].set(jnp.nan), bank)  # as training may leave it
  for via in WAYS[:2]:  # a wide product sums over everybody
    out = jaxlora.route(mlp, via=via)(params, bank, np.asarray(IDS), x)
    assert np.array_equal(np.isnan(out).any((1, 2)), np.asarray(IDS) == 0)


def test_names_stay_outside():
  bank = bank_of(adapters())
  out = jax.jit(lambda bank: bank)(bank)
  with pytest.raises(ValueError, match=r"named_as"):
    out.ids(["adapter 0"])
  assert out.named_as(bank).names == bank.names
  assert "names unknown" in repr(out)
  with pytest.raises(ValueError, match="3 slots, this one 5"):
    bank_of(adapters(), capacity=5).named_as(bank)
  assert jax.tree.map(lambda leaf: leaf, bank).names == bank.names


def test_pad():
  trees = adapters()
  padded = [jaxlora.pad(jaxlora.split(tree)[1], 4) for tree in (trees[0], adapter(3, 4, 9))]
  assert jax.tree.structure(padded[0]) == jax.tree.structure(padded[1])
  x = data(2)
  for tree in trees:
    close(jaxlora.wrap(mlp)(jaxlora.pad(tree, 5), x), jaxlora.wrap(mlp)(tree, x))
    close(jaxlora.wrap(mlp)(jaxlora.pad(tree), x), jaxlora.wrap(mlp)(tree, x))
  with pytest.raises(ValueError, match="kernel: rank 3 is above 2"):
    jaxlora.pad(trees[2], 2)
  with pytest.raises(ValueError, match="rank is 0"):
    jaxlora.pad(trees[2], 0)
