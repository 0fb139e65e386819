"""`summary` and `explain` say what is so, in exact figures."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora._base.text import folded

KEY = jax.random.key(0)


@pytest.mark.parametrize(
  ("params", "axes"),
  [({"kernel": jnp.zeros((64, 512))}, None), ({"kernel": jnp.zeros((512, 64))}, {"kernel": "oi"})],
  ids=["as flax stores it", "as the paper writes it"],
)
def test_the_papers_own_example(params, axes):
  """A 512 x 64 weight: 32,768 parameters; at rank 8, A has 512, B 4,096, together 4,608: 86 % fewer."""
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=8, targets="kernel", axes=axes), KEY)
  report = jaxlora.summary(tree)
  (leaf,) = report.leaves
  assert (leaf.a_parameters, leaf.b_parameters, leaf.trainable_parameters) == (512, 4096, 4608)
  assert (leaf.base_parameters, report.adapted_parameters, report.total_parameters) == (32768, 32768, 32768)
  text = str(report)
  for figure in ("512", "4,096", "4,608", "32,768", "86%"):
    assert figure in text
  assert tree["kernel"].a.shape == (8, 64)
  assert tree["kernel"].b.shape == (8, 512)


def test_summary_counts_whole_leaves_and_bytes():
  params = {"w": jnp.zeros((10, 6), jnp.bfloat16), "bias": jnp.zeros((6,)), "frozen": jnp.zeros((7,), jnp.int8)}
  config = jaxlora.LoraConfig(rank=2, alpha=8, targets="w", train="bias", dtype="float32")
  report = jaxlora.summary(jaxlora.adapt(params, config, KEY))
  assert report.total_parameters == 60 + 6 + 7
  assert report.trainable_parameters == 2 * 10 + 2 * 6 + 6
  assert report.base_bytes == 120 + 24 + 7
  assert report.trainable_bytes == 4 * report.trainable_parameters
  assert report.optimizer_bytes == 2 * report.trainable_bytes
  assert report.full_optimizer_bytes == 2 * report.base_bytes
  assert {leaf.path: leaf.scale for leaf in report.leaves} == {"w": 4, "bias": None}
  assert "whole" in str(report)


def test_summary_prints_what_saves_nothing():
  params = {"w": jnp.ones((4, 4)), "none": jnp.ones((0, 4))}
  report = jaxlora.summary(jaxlora.adapt(params, jaxlora.LoraConfig(rank=4, targets="w", train="none"), KEY))
  assert report.saved == -1
  rows = str(report).splitlines()
  assert rows[2].endswith("0% fewer")
  assert rows[3].endswith("100% more")
  assert "32 of 16 parameters (200.00%); 100% more than the 16 of the leaves above" in rows[4]
  nothing = jaxlora.FullWeight(jnp.ones(0), jnp.ones(0))
  assert "0 of 0 parameters (100.00%); 0% fewer" in str(jaxlora.summary(nothing))


def test_explain_tells_the_path_of_each_weight_and_why():
  params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 4))}
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets=".*"), KEY)

  def fn(p, x):
    return x @ p["a"] + jnp.sin(p["b"])

  report = jaxlora.explain(fn, tree, jnp.ones((4, 4)))
  assert [(use.path, use.primitive, use.factored) for use in report.uses] == [
    ("a", "dot_general", True),
    ("b", "sin", False),
  ]
  assert report.unused == ("c",)
  assert "test_report.py" in report.uses[1].source
  assert "no rule keeps a weight factored through `sin`" in str(report)
  assert "MATERIALISED" in str(report)
  assert report.materialized == report.uses[1:]


def test_explain_runs_nothing_and_takes_shapes():
  model = nn.Dense(5)
  shapes = jax.eval_shape(model.init, KEY, jnp.ones((2, 3)))
  tree = jax.eval_shape(lambda p: jaxlora.adapt(p, jaxlora.LoraConfig(rank=2, targets=["kernel"]), KEY), shapes)
  report = jaxlora.explain(model.apply, tree, jax.ShapeDtypeStruct((2, 3), jnp.float32))
  assert [use.path for use in report.uses] == ["params/kernel"]


def test_layers_that_are_alike_are_one_row():
  layer = lambda width: {name: {"kernel": jnp.ones((4, width))} for name in ("q", "k")}
  params = {f"layers_{k}": layer(4 if k != 2 else 5) for k in range(6)} | {"head": {"kernel": jnp.ones((4, 4))}}
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets=".*kernel"), KEY)

  def fn(tree, x):
    return [x @ tree[f"layers_{k}"][name]["kernel"] for k in range(6) for name in ("q", "k")]

  for report, paths in (
    (jaxlora.summary(tree), ["head", "layers_{0-1,3-5}/k", "layers_{0-1,3-5}/q", "layers_2/k", "layers_2/q"]),
    (jaxlora.explain(fn, tree, jnp.ones(4)), ["layers_{0-5}/q", "layers_{0-5}/k", "head"]),
  ):
    rows = [line.split()[0] for line in str(report).splitlines()]
    assert [row.removesuffix("/kernel") for row in rows if row.endswith("/kernel")] == paths
    every = report.text(fold=False)
    assert all(f"layers_{k}/{name}/kernel" in every for k in range(6) for name in ("q", "k"))
    assert "{" not in every


def test_rows_fold_by_one_number_after_the_other():
  grid = [(f"stage_{i}/block_{j}/w", "x") for i in range(3) for j in range(3)]
  assert folded(grid) == [("stage_{0-2}/block_{0-2}/w", "x")]
  assert folded(grid[:-1]) == [
    ("stage_{0-2}/block_0/w", "x"), ("stage_{0-2}/block_1/w", "x"), ("stage_0/block_2/w", "x"),
    ("stage_1/block_2/w", "x"),
  ]  # fmt: skip
  assert folded([("w1", "x"), ("w2", "y"), ("w3", "x")]) == [("w1", "x"), ("w3", "x"), ("w2", "y")]
  assert folded([("a", "x")] * 3) == [("a", "x")] * 3
  assert folded([]) == []


def test_arrays_of_numpy_are_said():
  params = {"w": np.ones((6, 4), np.float32)}
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets="w"), KEY)
  assert jaxlora.summary(tree).host_bytes == 96
  assert str(jaxlora.summary(tree)).endswith(
    "96 B are NumPy arrays, copied to the device by every call: jax.device_put(tree)"
  )
  again = jax.device_put(tree)
  assert jaxlora.summary(again).host_bytes == 0
  assert "NumPy" not in str(jaxlora.summary(again))


def test_two_arguments_with_the_same_paths_are_told_apart():
  make = lambda: jaxlora.adapt({"w": jnp.ones((6, 4))}, jaxlora.LoraConfig(rank=2, targets="w"), KEY)
  first, second, x = make(), make(), jnp.ones((2, 6))
  report = jaxlora.explain(lambda p, q, x: x @ p["w"], first, second, x)
  assert ([use.path for use in report.uses], report.unused) == (["0/w"], ("1/w",))
  report = jaxlora.explain(lambda p, x, *, other: x @ other["w"], first, x, other=second)
  assert ([use.path for use in report.uses], report.unused) == (["other/w"], ("0/w",))
  whole = jax.jit(jaxlora.wrap(lambda p, q: jnp.sin(p["w"]) + jnp.sin(q["w"])))
  with pytest.warns(jaxlora.MaterializeWarning) as caught:
    whole(first, second)
  assert [str(warning.message)[:4] for warning in caught] == ["0/w:", "1/w:"]
