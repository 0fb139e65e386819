"""`chunked_cross_entropy` against optax's loss of whole logits: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora
from jaxlora.losses import chunked_cross_entropy

TOKENS, WIDTH, VOCABULARY = (2, 5), 8, 50


def draw(seed, *shape):
  return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


LABELS = np.random.default_rng(0).integers(0, VOCABULARY, TOKENS, np.int32)
WEIGHTS = np.array([[0, 1, 1, 0.5, 0], [1, 0, 2, 1, 1]], np.float32)


def plain(hidden, head, labels, weights):
  losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, labels)
  return (losses * weights).sum() / weights.sum()


def chunked(chunk):
  return lambda *args: chunked_cross_entropy(*args[:3], chunk=chunk, weights=args[3])[0]


def adapted(head, roles, **fields):
  """An adapted head whose update is not zero."""
  config = jaxlora.LoraConfig(2, targets=["head"], axes={"head": roles}, **fields)
  tree = jaxlora.adapt({"head": head}, config, jax.random.key(0))
  frozen, factors = jaxlora.split(tree)
  return jaxlora.join(frozen, jax.tree.map(lambda x: x + draw(1, *x.shape), factors))


def close(a, b, tolerance=1e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.nightly), 4, 1000])  # 4 does not divide the tokens
def test_values_and_gradients_are_those_of_the_whole_logits(chunk):
  args = draw(2, *TOKENS, WIDTH), draw(3, WIDTH, VOCABULARY), LABELS, WEIGHTS
  close(*(jax.jit(jax.value_and_grad(f, (0, 1)))(*args) for f in (chunked(chunk), plain)))


@pytest.mark.parametrize("trained", [(0,), (0, 1)])
def test_a_head_without_an_adapter_costs_no_product_more(trained):
  """Of the hidden state's gradient alone two, the logits and its own; of the head's as well three."""
  args = draw(2, *TOKENS, WIDTH), draw(3, WIDTH, VOCABULARY), LABELS, WEIGHTS
  text = str(jax.make_jaxpr(jax.grad(chunked(4), trained))(*args))
  assert text.count("dot_general[") == 1 + len(trained)


@pytest.mark.nightly
def test_a_second_derivative_is_that_of_the_whole_logits():
  args = draw(2, *TOKENS, WIDTH), draw(3, WIDTH, VOCABULARY)
  twice = lambda f: jax.grad(lambda h: (jax.grad(lambda h: f(h, args[1], LABELS, WEIGHTS))(h) ** 2).sum())
  close(*(jax.jit(twice(f))(args[0]) for f in (chunked(4), plain)))


def loss_of(loss, turned):
  return lambda tree, hidden: loss(hidden, tree["head"].T if turned else tree["head"], LABELS, WEIGHTS)


@pytest.mark.parametrize(
  ("turned", "fields"), [(False, {}), (True, {}), pytest.param(True, {"variant": "dora"}, marks=pytest.mark.nightly)]
)
def test_an_adapted_head_stays_factored(turned, fields):
  """An untied head, and an embedding's transpose: the oracle is the merged tree's whole logits."""
  shape, roles = ((VOCABULARY, WIDTH), "oi") if turned else ((WIDTH, VOCABULARY), "io")
  tree, hidden = adapted(draw(3, *shape), roles, **fields), draw(2, *TOKENS, WIDTH)
  frozen, factors = jaxlora.split(tree)
  step = jax.jit(
    jax.value_and_grad(
      lambda f, h: jaxlora.wrap(loss_of(chunked(4), turned), on_materialize="error")(jaxlora.join(frozen, f), h), (0, 1)
    )
  )
  merged = lambda f, h: loss_of(plain, turned)(jaxlora.merge(jaxlora.join(frozen, f)), h)
  close(step(factors, hidden), jax.jit(jax.value_and_grad(merged, (0, 1)))(factors, hidden), 1e-5)


def test_a_weight_of_a_tree_is_a_head_by_itself():
  tree, hidden = adapted(draw(3, WIDTH, VOCABULARY), "io"), draw(2, *TOKENS, WIDTH)
  own = jax.jit(lambda head: chunked_cross_entropy(hidden, head, LABELS, chunk=3, weights=WEIGHTS))
  loss, metrics = own(tree["head"])
  whole = hidden @ jaxlora.merge(tree)["head"]
  close(loss, own(jaxlora.merge(tree)["head"])[0], 1e-5)
  close(metrics.total / metrics.weight, loss)
  assert float(metrics.correct) == float(WEIGHTS[whole.argmax(-1) == LABELS].sum())


def test_a_head_of_codes():
  codes, hidden = jaxlora.quantize({"head": draw(3, 64, VOCABULARY)}, "int8", targets=["head"]), draw(4, 3, 64)
  own = jax.jit(lambda head: chunked_cross_entropy(hidden, head, LABELS[0, :3])[0])
  close(own(codes["head"]), own(jaxlora.dequantize(codes)["head"]), 1e-5)


def test_narrow_floats_are_summed_in_float32():
  hidden, head = draw(2, *TOKENS, WIDTH).astype(jnp.bfloat16), draw(3, WIDTH, VOCABULARY).astype(jnp.bfloat16)
  loss = jax.jit(lambda: chunked_cross_entropy(hidden, head, LABELS, chunk=4)[0])()
  assert loss.dtype == jnp.float32
  close(loss, jax.jit(plain)(hidden.astype("float32"), head.astype("float32"), LABELS, jnp.ones(TOKENS)), 1e-5)


def test_labels_that_count_for_nothing_and_those_that_cannot_be():
  hidden, head = draw(2, 3, WIDTH), draw(3, WIDTH, VOCABULARY)
  call = jax.jit(chunked_cross_entropy)
  loss = lambda labels, weights=(1, 1, 1): call(hidden, head, jnp.asarray(labels), weights=jnp.asarray(weights))
  close(loss([1, -100, 7], [True, False, True])[0], loss([1, 0, 7], [1, 0, 1])[0])
  assert np.isnan(loss([1, -100, 7])[0])
  assert np.isnan(loss([1, VOCABULARY, 7])[0])
  nothing = lambda h: chunked_cross_entropy(h, head, jnp.zeros(3, int), weights=jnp.zeros(3))[0]
  value, grads = jax.jit(jax.value_and_grad(nothing))(hidden)
  assert (float(value), float(jnp.abs(grads).max())) == (0, 0)
  assert float(chunked_cross_entropy(hidden[:0], head, jnp.zeros(0, int))[0]) == 0


@pytest.mark.parametrize(
  ("changed", "error", "message"),
  [
    ({"labels": np.zeros(TOKENS, np.float32)}, TypeError, "labels have dtype float32, expected integers"),
    ({"hidden": np.zeros((*TOKENS, WIDTH), np.int32)}, TypeError, "hidden has dtype int32, expected floats"),
    ({"labels": LABELS[:1]}, ValueError, r"labels have shape \(1, 5\), expected \(2, 5\)"),
    ({"weights": WEIGHTS[:, :1]}, ValueError, r"weights have shape \(2, 1\), expected \(2, 5\)"),
    ({"head": jnp.zeros((VOCABULARY, WIDTH))}, ValueError, r"the head \(50, 8\), .*\. That is an embedding's layout"),
    (
      {"head": jnp.zeros((3, VOCABULARY))},
      ValueError,
      r"hidden has shape \(2, 5, 8\) and the head \(3, 50\), expected",
    ),
    ({"chunk": 0}, ValueError, "chunked_cross_entropy: chunk"),
  ],
)
def test_what_does_not_fit_is_refused(changed, error, message):
  args = {"hidden": draw(2, *TOKENS, WIDTH), "head": draw(3, WIDTH, VOCABULARY), "labels": LABELS, "weights": WEIGHTS}
  with pytest.raises(error, match=message):
    chunked_cross_entropy(**args | changed)


@pytest.mark.parametrize("turned", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_an_adapted_head_costs_no_product_more(turned):
  """FLOPs of a step, compiled: the gradients are made while a part's logits are there."""
  shape, roles = ((512, 64), "oi") if turned else ((64, 512), "io")
  spec = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  head = jaxlora.LoraWeight.from_factors(spec(*shape), spec(2, 64), spec(2, 512), roles)
  frozen, factors = jaxlora.split({"head": head})

  def flops(loss):
    of = jnp.zeros(128, int), jnp.ones(128)
    call = jaxlora.wrap(lambda tree, hidden: loss(hidden, tree["head"].T if turned else tree["head"], *of))
    step = jax.value_and_grad(lambda hidden, factors, frozen: call(jaxlora.join(frozen, factors), hidden), (0, 1))
    return jax.jit(step).lower(spec(128, 64), factors, frozen).compile().cost_analysis()["flops"]

  assert flops(chunked(128)) < 1.05 * flops(plain)


@pytest.mark.nightly
def test_rows_of_tokens_and_dropout_of_a_head():
  """Rows of a tied head that train; and with dropout the loss of a mask, whose gradient is the factors' alone."""
  table, hidden = draw(3, VOCABULARY, WIDTH), draw(2, *TOKENS, WIDTH)
  config = jaxlora.LoraConfig(targets=[], tokens={"head": [1, 40]}, axes={"head": "io"})
  frozen, rows = jaxlora.split(jaxlora.adapt({"head": table}, config, jax.random.key(0)))
  rows = jax.tree.map(lambda x: x + draw(5, *x.shape), rows)
  of = lambda loss, whole: lambda rows: loss_of(loss, True)(whole(jaxlora.join(frozen, rows)), hidden)
  step = jax.value_and_grad(lambda rows: jaxlora.wrap(lambda tree: loss_of(chunked(4), True)(tree, hidden))(
    jaxlora.join(frozen, rows)))  # fmt: skip
  close(jax.jit(step)(rows), jax.jit(jax.value_and_grad(of(plain, jaxlora.merge)))(rows), 1e-5)
  frozen, factors = jaxlora.split(adapted(draw(3, WIDTH, VOCABULARY), "io", dropout=0.5))
  masked = jaxlora.wrap(lambda tree: loss_of(chunked(4), False)(tree, hidden), dropout_key=jax.random.key(1))
  value, grads = jax.jit(jax.value_and_grad(lambda f: masked(jaxlora.join(frozen, f))))(factors)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads))


@pytest.mark.nightly
def test_a_second_derivative_by_an_adapted_head():
  frozen, factors = jaxlora.split(adapted(draw(3, WIDTH, VOCABULARY), "io"))
  hidden = draw(2, *TOKENS, WIDTH)

  def twice(loss, whole):
    one = lambda f: loss_of(loss, False)(whole(jaxlora.join(frozen, f)), hidden)
    return jax.grad(lambda f: sum((g**2).sum() for g in jax.tree.leaves(jax.grad(one)(f))))

  wrapped = jaxlora.wrap(loss_of(chunked(4), False))
  mine = jax.grad(lambda f: sum((g**2).sum() for g in jax.tree.leaves(
    jax.grad(lambda f: wrapped(jaxlora.join(frozen, f), hidden))(f))))  # fmt: skip
  close(jax.jit(mine)(factors), jax.jit(twice(plain, jaxlora.merge))(factors), 1e-4)


@pytest.mark.parametrize("rank", [None, 8])
def test_memory_is_below_a_fifth(rank):
  """4 x 1,024 tokens and a vocabulary of 49,152: compiled, not run."""
  spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  head, hidden = spec(49_152, 576), spec(4, 1024, 576)
  if rank:
    head = jaxlora.LoraWeight.from_factors(head, spec(rank, 576), spec(rank, 49_152), "oi")
  frozen, factors = jaxlora.split({"head": head}) if rank else ({"head": head}, {"head": None})

  def temp(loss):
    of = jnp.zeros((4, 1024), int), jnp.ones((4, 1024))
    call = jaxlora.wrap(lambda tree, hidden: loss(hidden, tree["head"].T, *of))
    whole = jaxlora.join if rank else lambda frozen, factors: frozen
    step = jax.jit(jax.grad(lambda hidden, factors, frozen: call(whole(frozen, factors), hidden), (0, 1)))
    return step.lower(hidden, factors, frozen).compile().memory_analysis().temp_size_in_bytes

  assert temp(chunked(256)) < 0.2 * temp(plain)
