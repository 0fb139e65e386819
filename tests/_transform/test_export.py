"""`jax.export`: symbolic sizes, several platforms from one trace, and adapted trees as arguments."""

import os
import subprocess
import sys

import flax
import flax.linen as nn
import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers
from tests.helpers.paths import ROOT

PLATFORMS = ["cpu", "tpu", "cuda"]
SIZES = {"b": 3, "t": 5, "h": 4}
EIGHT = {"w": helpers.normal(0, (8, 8), jnp.float32)}


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(nn.LayerNorm()(x))
    return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.RMSNorm()(x))))


def looked_up(p, x):
  ids = (jnp.abs(x[..., 0]) * 3).astype(jnp.int32)
  return jnp.tanh(jnp.take(p["w"], ids, axis=0)) @ p["w"].T


def spread(w, x):
  each = jnp.broadcast_to(w, (x.shape[0], 8, 8)).reshape(-1, 8, 2, 4).reshape(-1, 8, 8)
  return jnp.einsum("bi,bio->bo", x, each)


def convolution(groups):
  dims = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
  fn = lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", **dims)
  return fn, {"w": helpers.normal(1, (3, 3, 4 // groups, 6), jnp.float32)}, "b, h, h, 4"


# Name -> a function, its parameters and the shape of its input.
PROGRAMS = {
  "dense": (lambda p, x: jnp.tanh(x @ p["w"]), EIGHT, "b, 8"),
  "block": (
    lambda p, x: Block().apply({"params": p}, x),
    jax.eval_shape(Block().init, jax.random.key(0), jnp.ones((2, 3, 8)))["params"],
    "b, t, 8",
  ),
  "scan": (
    lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0],
    {"w": helpers.normal(2, (3, 8, 8), jnp.float32)},
    "b, 8",
  ),
  "loop": (lambda p, x: lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ p["w"]), x), EIGHT, "b, t, 8"),
  "branches": (lambda p, x: lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: -x @ p["w"], x), EIGHT, "b, 8"),
  "remat": (lambda p, x: jax.checkpoint(lambda x: jax.nn.silu(x @ p["w"]))(x) @ p["w"], EIGHT, "b, 8"),
  "flattened": (lambda p, x: (x.reshape(-1, 8) @ p["w"].reshape(8, 8)).reshape(x.shape), EIGHT, "b, t, 8"),
  "in_a_batch": (lambda p, x: jax.vmap(lambda row: jnp.tanh(p["w"].T @ row))(x), EIGHT, "b, 8"),
  "spread": (
    lambda p, x: spread(p["w"], x),
    EIGHT,
    "b, 8",
  ),
  "whole": (lambda p, x: jax.nn.softmax(x.reshape(-1)).reshape(x.shape) @ p["w"], EIGHT, "2*b + 4, 8"),
  "lookup": (looked_up, EIGHT, "b, t, 8"),
  "convolution": convolution(1),
  "grouped": convolution(2),
  "gradient": (lambda p, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x), EIGHT, "b, 8"),
}  # fmt: skip


def made(name, variant):
  fn, params, shape = PROGRAMS[name]
  x = helpers.normal(9, tuple(eval(size, dict(SIZES)) for size in shape.split(", ")), jnp.float32)
  params = jax.tree.map(lambda leaf: helpers.normal(leaf.size, leaf.shape, leaf.dtype) * 0.3, params)
  targets = lambda path, leaf: leaf.ndim > 1 and "bias" not in path
  config = jaxlora.LoraConfig(rank=2, targets=targets, variant=variant, init=helpers.drawn)
  tree = helpers.trained(jaxlora.adapt(params, config, jax.random.key(0), probe=lambda p: fn(p, x)))
  return fn, tree, x, jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_trace_serves_every_size_and_platform(name, lenient):
  fn, tree, x, symbolic = made(name, "dora" if len(name) % 2 else "lora")
  wrapped = jaxlora.wrap(fn, on_materialize="error")
  exported = export.export(jax.jit(wrapped), platforms=PLATFORMS)(tree, symbolic)
  helpers.assert_close(exported.call(tree, x), jax.jit(helpers.oracle(fn))(tree, x), 1e-5)
  step = jax.jit(jaxlora.grad(lambda tree, x: jnp.sum(wrapped(tree, x) ** 2)))
  helpers.assert_close(
    jax.tree.leaves(export.export(step, platforms=PLATFORMS)(tree, symbolic).call(tree, x)),
    jax.tree.leaves(step(tree, x)),
    1e-5,
  )


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("name", ["dense", "block"])
def test_every_policy_takes_symbolic_sizes(name, platform, lenient):
  fn, tree, x, symbolic = made(name, "lora")
  want = jax.jit(helpers.oracle(fn))(tree, x)
  for tuning in ("auto", "none"):
    wrapped = jaxlora.wrap(fn, platform=platform, tuning=tuning)
    exported = export.export(jax.jit(lambda x, wrapped=wrapped: wrapped(tree, x)), platforms=PLATFORMS)(symbolic)
    helpers.assert_close(exported.call(x), want, 1e-5)


def test_symbols_of_two_exports_have_nothing_to_do_with_each_other(lenient):
  fn, tree, x, _ = made("block", "lora")
  want = jax.jit(helpers.oracle(fn))(tree, x)
  for _ in range(2):
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape("b, t, 8"), jnp.float32)
    exported = export.export(jax.jit(jaxlora.wrap(fn)))(tree, symbolic)
    helpers.assert_close(exported.call(tree, x), want, 1e-5)


@pytest.mark.parametrize(
  ("adapters", "shape"), [(1, "b, 8"), (9, "b, 8"), (1, "b, t, 8"), (9, "b, t, 8"), (40, "b, t, 8")]
)
def test_mixed_batches_of_symbolic_sizes(adapters, shape, lenient):
  config = jaxlora.LoraConfig(rank=2, targets="w")
  tree = helpers.trained(jaxlora.adapt(EIGHT, config, jax.random.key(0)))
  bank = jaxlora.stack({str(k): tree for k in range(adapters)})
  routed = jax.jit(jaxlora.route(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]))
  sizes = export.symbolic_shape(shape)
  given = jax.ShapeDtypeStruct(sizes[:1], jnp.int32), jax.ShapeDtypeStruct(sizes, jnp.float32)
  exported = export.export(routed, platforms=PLATFORMS)(EIGHT, bank, *given)
  x = helpers.normal(9, tuple(eval(size, dict(SIZES)) for size in shape.split(", ")), jnp.float32)
  ids = np.array([0, -1, adapters - 1], np.int32)
  helpers.assert_close(exported.call(EIGHT, bank, ids, x), routed(EIGHT, bank, ids, x), 1e-5)


def test_weights_of_symbolic_sizes(lenient):
  """A vocabulary that is not known yet: the base and a factor have a symbolic axis."""
  fn = lambda p, x: x @ p["w"].reshape(2, 4, -1).reshape(8, -1)
  tree = helpers.trained(
    jaxlora.adapt({"w": EIGHT["w"][:, :6]}, jaxlora.LoraConfig(rank=2, targets="w"), jax.random.key(0))
  )
  (v,) = export.symbolic_shape("v")
  sized = lambda leaf: jax.ShapeDtypeStruct(tuple(v if size == 6 else size for size in leaf.shape), leaf.dtype)
  x = helpers.normal(3, (4, 8), jnp.float32)
  exported = export.export(jax.jit(jaxlora.wrap(fn, on_materialize="error")))(jax.tree.map(sized, tree), x)
  helpers.assert_close(exported.call(tree, x), fn(jaxlora.merge(tree), x), 1e-5)


READER = """
import sys
from jax import export
import jax
import jaxlora
import numpy as np

params = {"w": np.ones((8, 4), np.float32) / 8, "c": np.ones((4, 4), np.float32), "b": np.ones(4, np.float32)}
fields = {"overrides": {"c": {"variant": "dora", "scaling": "rslora"}}, "dropout": 0.1, "train": "b"}
tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets="w|c", **fields), jax.random.key(0))
other = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets="w|c", train="b"), jax.random.key(1))
bank = jaxlora.stack({"one": other}, capacity=3)
fn = lambda p, x: jax.numpy.tanh(x @ p["w"] + p["b"]) @ p["c"]
x, ids = np.ones((5, 8), np.float32), np.array([0, -1, 0, 0, -1], np.int32)
if __name__ == "__main__":
  forward, step, routed = (export.deserialize(open(f"{sys.argv[1]}/{name}", "rb").read()) for name in "fsr")
  np.testing.assert_allclose(forward.call(tree, x), jaxlora.wrap(fn)(tree, x), rtol=1e-5)
  grads = step.call(tree, x)
  assert jax.tree.structure(grads) == jax.tree.structure(jaxlora.split(tree)[1])
  np.testing.assert_allclose(routed.call(params, bank, ids, x), jaxlora.route(fn)(params, bank, ids, x), rtol=1e-5)
  through = jax.grad(lambda tree: forward.call(tree, x).sum())(tree)
  np.testing.assert_allclose(through["w"].b, grads["w"].b, rtol=1e-4)
"""


def test_a_fresh_process_calls_what_was_written_with_trees_of_its_own(tmp_path, lenient):
  """Adapted trees and banks are arguments and results; the nodes are in the signature by name."""
  pytest.importorskip("flatbuffers")
  held = {"__name__": "held"}
  exec(READER, held)
  (b,) = export.symbolic_shape("b")
  x, ids = jax.ShapeDtypeStruct((b, 8), jnp.float32), jax.ShapeDtypeStruct((b,), jnp.int32)
  wrapped = jaxlora.wrap(held["fn"])
  written = {
    "f": export.export(jax.jit(wrapped))(held["tree"], x).serialize(vjp_order=1),
    "s": export.export(jax.jit(jaxlora.grad(lambda tree, x: wrapped(tree, x).sum())))(held["tree"], x).serialize(),
    "r": export.export(jax.jit(jaxlora.route(held["fn"])))(held["params"], held["bank"], ids, x).serialize(),
  }
  for name, text in written.items():
    (tmp_path / name).write_bytes(text)
  (tmp_path / "reader.py").write_text(READER)
  done = subprocess.run(
    [sys.executable, tmp_path / "reader.py", tmp_path],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    check=False,
  )
  assert done.returncode == 0, done.stderr


def test_a_bank_for_other_containers_says_what_cannot_be_written():
  tree = jaxlora.adapt(flax.core.freeze(EIGHT), jaxlora.LoraConfig(rank=2, targets="w"), jax.random.key(0))
  bank = jaxlora.stack({"one": tree})
  exported = export.export(jax.jit(lambda bank: bank))(bank)
  with pytest.raises(ValueError, match=r"only dicts, lists and tuples can be written\. Close over the bank"):
    exported.serialize()
  closed = export.export(jax.jit(lambda x: x + jax.tree.leaves(bank)[0].sum()))(1.0)
  assert closed.serialize()
