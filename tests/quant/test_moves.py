"""Rearranged by its parts, a quantised array is the rearranged array; what its parts cannot do is put off."""

import re

import hypothesis
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora._quant.blocks import reshaped
from tests import helpers
from tests.helpers import profiles

KEY = jax.random.key(0)
SHAPE = (4, 8, 12)
MOVES = {
  "transpose": lambda x: jnp.transpose(x, (2, 0, 1)),
  "swap": lambda x: jnp.swapaxes(x, 0, 1),
  "split axes": lambda x: x.reshape(*x.shape[:1], 2, x.shape[1] // 2, x.shape[2]).transpose(1, 0, 2, 3)[1],
  "merge axes": lambda x: x.reshape(x.shape[0] * x.shape[1], x.shape[2]).reshape(x.shape),
  "merge other axes": lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2]).reshape(x.shape),
  "even": lambda x: x[:, ::2],
  "inner": lambda x: x[:, 1:, :-1],
  "blocks": lambda x: x[:, : max(4, x.shape[1] // 8 * 4)],
  "later blocks": lambda x: x[:, x.shape[1] // 8 * 4 :],
  "back": lambda x: lax.rev(x, (1, 2)),
  "piece": lambda x: jnp.split(x, 2, axis=0)[1] if x.shape[0] % 2 == 0 else x,
  "inner piece": lambda x: jnp.split(x, 2, axis=1)[0] if x.shape[1] % 2 == 0 else x,
  "at": lambda x: lax.dynamic_slice_in_dim(x, jnp.int32(1), max(1, x.shape[0] - 1), axis=0),
  "at inner": lambda x: lax.dynamic_slice_in_dim(x, jnp.int32(1), max(1, x.shape[1] - 1), axis=1),
  "squeeze": lambda x: x[:, None].squeeze(1),
  "spread": lambda x: jnp.broadcast_to(x[None], (2, *x.shape))[1],
  "cast": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
  "scaled": lambda x: -x * 0.5 / 3.0,
}


def in_codes(roles="sio", **options):
  """An array in codes, blocks of 4 along its inputs."""
  weight = {"w": jax.random.normal(KEY, SHAPE)}
  return jaxlora.quantize(weight, "nf4", targets="w", axes={"w": roles}, block_size=4, **options)


def test_each_move():
  """All of them in one program: with blocks that are cut, and with second-level scales."""
  tree = in_codes()
  x = jax.random.normal(KEY, (12, 12))
  use = lambda move: lambda p: jnp.tensordot(x[: move(p["w"]).shape[0], : move(p["w"]).shape[1]], move(p["w"]), 2)
  fns = {name: use(move) for name, move in MOVES.items()}
  wrapped = {name: jaxlora.wrap(fn, on_materialize="error") for name, fn in fns.items()}
  plain = jaxlora.dequantize(tree)
  got, want = jax.jit(
    lambda: [{name: fn(p) for name, fn in each.items()} for each, p in ((wrapped, tree), (fns, plain))]
  )()
  for name in MOVES:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)


@hypothesis.given(
  names=st.lists(st.sampled_from(sorted(MOVES)), min_size=1, max_size=4),
  roles=st.sampled_from(["sio", "oio", "iio", "ois"]),
  double=st.booleans(),
)
@hypothesis.settings(
  max_examples=profiles.count(6, 1000), phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
)
def test_any_moves(names, roles, double):
  tree = in_codes(roles, double=double)

  def fn(p, x):
    w = p["w"]
    for name in names:
      w = MOVES[name](w)
    return jnp.tensordot(x[: w.shape[0], : w.shape[1]], w, 2)

  x = jax.random.normal(KEY, (12, 12))
  both = jax.jit(lambda tree: (jaxlora.wrap(fn, on_materialize="error")(tree, x), fn(jaxlora.dequantize(tree), x)))
  got, want = both(tree)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("part", "old", "new", "found"),
  [
    ((2, 6), (128, 6), (2, 64, 6), (2, 1, 6)),
    ((2, 6), (128, 6), (4, 32, 6), (2, 1, 6)),
    ((3, 6), (96, 6), (2, 48, 6), None),
    ((8, 1, 6), (8, 64, 6), (512, 6), (8, 6)),
    ((1, 8, 6), (8, 8, 6), (64, 6), None),
    ((2, 1, 6), (8, 16, 6), (128, 6), (2, 6)),
    ((1, 1), (8, 6), (2, 4, 6), (1, 1, 1)),
    ((8, 6), (8, 6), (8, 1, 6), (8, 1, 6)),
  ],
)
def test_reshaped_parts(part, old, new, found):
  assert reshaped(part, old, new) == found


def test_from_qwix():
  """Codes and scales are those of qwix' arrays, and so are the values, in every type of code that has a format."""
  qarray = pytest.importorskip("qwix._src.core.qarray")
  w = jax.random.normal(KEY, (64, 12))
  for qtype in ("nf4", "int8", "int4", "float8_e4m3fn"):
    how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=(1,), tiled_axes={0: 32}, calibration_method="absmax")
    theirs = qarray.quantize(w, how)
    ours = jaxlora.quant.from_qwix({"w": theirs})["w"]
    np.testing.assert_allclose(ours.dequantize(), qarray.dequantize(theirs), rtol=1e-6, atol=1e-7)
    assert ours.codes is theirs.qvalue
    got = jaxlora.wrap(lambda p, x: x @ p["w"])({"w": ours}, jnp.ones((2, 64)))
    np.testing.assert_allclose(got, jnp.ones((2, 64)) @ qarray.dequantize(theirs), rtol=1e-4, atol=1e-4)
  other = qarray.quantize(w, qarray.HowToQuantize(qtype="int2", channelwise_axes=(1,), calibration_method="absmax"))
  with pytest.raises(ValueError, match=r"from_qwix: w: codes of int2, expected one of .*jaxlora.quantize"):
    jaxlora.quant.from_qwix({"w": other})
  assert jaxlora.quantize({"w": qarray.dequantize(other)}, "int4", targets="w") is not None
  with pytest.raises(ValueError, match="from_qwix: the tree holds no QArray"):
    jaxlora.quant.from_qwix({"w": w})


def test_transposed_codes_are_decoded_as_they_lie_on_cpus():
  """Read across rows, codes are read one by one: on CPUs floats are transposed, elsewhere codes are."""
  w = jaxlora.quantize({"w": jax.random.normal(KEY, (64, 96))}, "int8", targets="w", axes={"w": "oi"}, double=False)
  fn, x = (lambda p, x: jnp.tanh(x @ p["w"].T) * 2.0), jnp.ones((2, 96))
  step = jax.grad(lambda x, p: jnp.sum(jaxlora.wrap(fn, on_materialize="error")(p, x)))
  for program in (jax.jit(jaxlora.wrap(fn)).lower(w, x), jax.jit(step).lower(x, w)):
    assert re.search(r"stablehlo.transpose.*xf32>", program.as_text())
    assert not re.search(r"stablehlo.transpose.*xi8>", program.as_text())
  elsewhere = jax.jit(jaxlora.wrap(fn, platform="tpu")).lower(w, x)
  assert re.search(r"stablehlo.transpose.*xi8>", elsewhere.as_text())


def test_transpositions_that_are_put_off():
  """They meet loops, branches, look-ups and shapes."""
  tree = jaxlora.quantize(
    {"w": jax.random.normal(KEY, (3, 8, 12))}, "nf4", targets="w", axes={"w": "sio"}, block_size=4
  )

  def fn(p, x):
    turned = p["w"].transpose(0, 2, 1)
    _, stacked = lax.scan(lambda c, w: (c, w.T), 0, p["w"])
    _, sums = lax.scan(lambda c, w: (c, jnp.sum(jnp.sin(x @ w))), 0, turned)
    either = lax.cond(x[0, 0] > 0, lambda w: x @ w[0], lambda w: x @ w[1], turned)
    rows = jnp.take(p["w"].transpose(2, 1, 0), jnp.array([1, 3]), axis=0) * 2.0
    return jnp.einsum("bi,sio->sbo", x, stacked), sums, either, rows, x @ turned.reshape(36, 8)[:12]

  both = jax.jit(lambda tree, x: (jaxlora.wrap(fn, on_materialize="ignore")(tree, x), fn(jaxlora.dequantize(tree), x)))
  helpers.assert_close(*both(tree, jax.random.normal(KEY, (4, 12))), 1e-5)
