"""The axes of a batch, what is reported of it, and what it costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora._platform import policy
from tests import helpers
from tests.serving.banks import IDS, WAYS, adapter, adapters, bank_of, close, data, mlp, one_by_one, params_of


def test_rows_along_other_axes_and_results_of_all_kinds():
  def fn(params, x, table, scale, flag):
    y = mlp(params, x[..., 0] * scale)
    return {"y": y.T, "loss": jnp.sum(y), "table": table * 2, "static": flag, "count": jnp.asarray(3)}

  params, trees, x = params_of(), adapters(), helpers.array(5, (1, 6, 3), jnp.float32)  # rows last
  routed = jaxlora.route(
    fn, in_axes=(2, None, 0, 0), out_axes={"y": 1, "loss": 0, "table": None, "static": 0, "count": 0}
  )
  out = jax.jit(lambda *args: {k: v for k, v in routed(*args, "yes").items() if k != "static"})(
    params, bank_of(trees), jnp.asarray([0, -1, 2]), x, jnp.arange(4.0), 0.5
  )
  want = one_by_one(mlp, params, trees, (0, -1, 2), x[0].T * 0.5)
  close(out, {"y": want.T, "loss": want.sum(1), "table": 2 * jnp.arange(4.0), "count": jnp.asarray(3)}, 1e-5)
  assert routed(params, bank_of(trees), np.asarray([0, -1, 2]), x, jnp.arange(4.0), 0.5, "yes")["static"] == "yes"


def test_explain_reports_the_way():
  params, x = params_of(), data()
  report = lambda capacity, x: {
    use.way for use in jaxlora.explain(jaxlora.route(mlp), params, bank_of(adapters(), capacity=capacity), IDS, x).uses
  }
  few_tokens, many = x[:, :1], jnp.tile(x, (1, 30, 1))
  assert report(4, few_tokens) == {"wide"}
  assert report(40, few_tokens) == {"row by row"}
  assert report(40, many) == {"gathered"}
  for via in WAYS:
    explanation = jaxlora.explain(jaxlora.route(mlp, via=via), params, bank_of(adapters()), np.asarray(IDS), x)
    assert f"factored, {via}" in str(explanation)
    assert explanation.unused == ()


@pytest.mark.parametrize("capacity", [40, 200])  # of which a TPU is given all adapters' factors, or those of the rows
def test_a_program_for_a_tpu_has_ways_of_its_own(capacity, monkeypatch):
  """Its forms, chosen where a program is lowered, here compiled for CPUs: values, and derivatives of both ways."""
  params, trees, x = params_of(), adapters(), data()[:, :1]
  bank, ids = bank_of(trees, capacity=capacity), jnp.asarray(IDS)
  at_home = str(jax.jit(jaxlora.route(mlp)).lower(params, bank, ids, x).as_text())
  monkeypatch.setitem(policy.PLATFORMS, "cpu", dataclasses.replace(policy.CPU, tiled=("cpu",)))
  routed = jax.jit(jaxlora.route(mlp))
  assert "while" in at_home
  assert "while" not in routed.lower(params, bank, ids, x).as_text()
  close(routed(params, bank, ids, x), one_by_one(mlp, params, trees, IDS, x), 1e-5)
  loss = lambda bank, via: jnp.sum(jaxlora.route(mlp, via=via)(params, bank, ids, x) ** 2)
  by_auto, by_gathers = (jax.jit(jax.grad(functools.partial(loss, via=via)))(bank) for via in ("auto", "gathered"))
  close(by_auto, by_gathers, 1e-4)
  inside = lambda p, x: jax.lax.scan(lambda c, _: (c + jnp.sum(mlp(p, x)), mlp(p, x)), 0.0, length=2)[1][0]
  close(jax.jit(jaxlora.route(inside))(params, bank, ids, x), one_by_one(mlp, params, trees, IDS, x), 1e-5)


def test_a_whole_weight_is_reported():
  fn = lambda p, x: x @ jnp.sin(p["up"]["kernel"])
  params, trees, x = params_of(), adapters(), data()
  with pytest.warns(jaxlora.MaterializeWarning, match="up/kernel"):
    got = jaxlora.route(fn)(params, bank_of(trees), np.asarray(IDS), x)
  close(
    got, jnp.concatenate([fn(jaxlora.merge(trees[k]) if k >= 0 else params, x[i : i + 1]) for i, k in enumerate(IDS)])
  )
  with pytest.raises(jaxlora.MaterializeError):
    jaxlora.route(fn, on_materialize="error")(params, bank_of(trees), np.asarray(IDS), x)


def test_base_products_are_flat():
  """One product of all rows' tokens with the base, as for a plain batch; no row has a base of its own."""
  params, x = params_of(), data()
  bank = bank_of(adapters(), capacity=50)
  compiled = jax.jit(jaxlora.route(mlp, via="gathered")).lower(params, bank, jnp.asarray(IDS), x).compile()
  flops = compiled.cost_analysis()["flops"]
  plain = jax.jit(mlp).lower(params, x).compile().cost_analysis()["flops"]
  factors = 2 * x.shape[0] * x.shape[1] * sum(3 * (i + o) for i, o in ((6, 8), (8, 5)))
  assert flops <= plain + 2.5 * factors


@pytest.mark.parametrize("variant", ["lora_fa", "vera", "adalora", "loha", "lokr"])
def test_variants_are_served_as_the_factors_that_they_come_to(variant):
  trees, params = [adapter(10, variant=variant), adapter(20, 3)], params_of()
  x = data()
  want = one_by_one(mlp, params, trees, (0, 1, -1, 0, 1, -1), x)
  close(jax.jit(jaxlora.route(mlp))(params, bank_of(trees), jnp.asarray([0, 1, -1, 0, 1, -1]), x), want, 3e-6)
  with pytest.raises(ValueError, match="has parts that are frozen, in the other half"):
    bank_of([jaxlora.split(trees[0])[1]])


def test_an_initialiser_that_starts_away_from_zero_is_served():
  trees, params, x = [adapter(10, init="pissa"), adapter(20, 3)], params_of(), data()
  want = one_by_one(mlp, params, trees, (0, 1, -1, 0, 1, -1), x)
  close(jax.jit(jaxlora.route(mlp))(params, bank_of(trees), jnp.asarray([0, 1, -1, 0, 1, -1]), x), want, 3e-6)
