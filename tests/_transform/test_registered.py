"""`register_product`: kernels with derivatives of their own, on adapted weights."""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import pytest

import jaxlora
from tests import helpers
from tests.helpers import profiles
from tests.helpers.adapters import trained
from tests.helpers.compiled import traced

KEY = jax.random.key(0)
SIZES = jnp.array([2, 0, 1])
array = functools.partial(helpers.array, dtype=jnp.float32)


def adapted(shape, roles, **fields):
  config = jaxlora.LoraConfig(rank=2, alpha=3, targets="w", axes={"w": roles}, **fields)
  return trained(jaxlora.adapt({"w": array(1, shape)}, config, KEY))


def own(fn):
  """A kernel with a derivative of its own, which the transform cannot see into."""

  @functools.wraps(fn)
  @jax.custom_vjp
  def kernel(x, w, *rest):
    return fn(x, w, *rest)

  def forward(x, w, *rest):
    return fn(x, w, *rest), (x, w, rest)

  def backward(kept, dy):
    x, w, rest = kept
    dx, dw = jax.vjp(lambda x, w: fn(x, w, *rest), x, w)[1](dy)
    return dx, dw, *(None for _ in rest)

  kernel.defvjp(forward, backward)
  return kernel


@own
def grouped(x, w, sizes):
  ends = jnp.cumsum(sizes)
  row = jnp.arange(x.shape[0])[:, None]
  of = [jnp.where((row >= ends[k] - sizes[k]) & (row < ends[k]), x, 0) @ w[k] for k in range(w.shape[0])]
  return functools.reduce(jnp.add, of)


def einsum(spec):
  def product(x, w):
    return jnp.einsum(spec, x, w)

  return own(product)


CASES = {
  "grouped": (grouped, "mk,gkn,g->mn", (4, 5), (3, 5, 7), "sio", (SIZES,)),
  "matrices": (einsum("bmk,kn->bmn"), "bmk,kn->bmn", (2, 4, 5), (5, 7), "io", ()),
  "turned": (einsum("mk,nk->mn"), "mk,nk->mn", (4, 5), (7, 5), "oi", ()),
  "the other way round": (einsum("mk,kn->mn"), "mk,kn->mn", (4, 5), (5, 7), "oi", ()),
  "heads out": (einsum("mk,khd->hmd"), "mk,khd->hmd", (4, 5), (5, 2, 7), "ioo", ()),
  "heads in": (einsum("mhd,hdn->mn"), "mhd,hdn->mn", (4, 2, 5), (2, 5, 7), "iio", ()),
  "batches": (einsum("bmk,bkn->bmn"), "bmk,bkn->bmn", (3, 4, 5), (3, 5, 7), "sio", ()),
}


@pytest.mark.parametrize("name", profiles.some(CASES, "grouped", "heads in"))
def test_registered_products_stay_factored(name):
  kernel, rule, data, weight, roles, rest = CASES[name]
  product = jaxlora.register_product(kernel, rule)
  helpers.check(lambda p, x: product(x, p["w"], *rest), adapted(weight, roles), (array(2, data),), 1e-5)


@pytest.mark.nightly
def test_the_weight_may_come_first_and_be_used_backwards():
  """`W x`, and a weight of which the free axes are summed."""
  product = jaxlora.register_product(einsum("nk,km->nm"), "nk,km->nm")
  tree = adapted((7, 5), "oi")
  helpers.check(lambda p, x: product(p["w"], product(p["w"].T, x)), tree, (array(2, (7, 4)),), 1e-5)


@pytest.mark.nightly
def test_inside_of_control_flow():
  product = jaxlora.register_product(grouped, "mk,gkn,g->mn")
  body = jax.checkpoint(lambda x, w: (jnp.tanh(product(x, w, SIZES)), None))
  fn = lambda p, x: lax.scan(body, x, p["w"])[0]
  helpers.check(fn, adapted((2, 3, 5, 5), "ssio"), (array(2, (4, 5)),), 1e-5)


def test_the_kernel_is_called_as_it_is_and_twice_beside():
  product = jaxlora.register_product(grouped, "mk,gkn,g->mn")
  fn, tree, x = lambda p, x: product(x, p["w"], SIZES), adapted((3, 5, 7), "sio"), array(2, (4, 5))
  kernels = [eqn for eqn in traced(jaxlora.wrap(fn), tree, x) if eqn.primitive.name.startswith("custom_vjp_call")]
  assert sorted(eqn.invars[1].aval.shape for eqn in kernels) == [(3, 2, 7), (3, 5, 2), (3, 5, 7)]
  assert not helpers.weight_shaped_products(jaxlora.wrap(fn), tree, (x,))
  (use,) = jaxlora.explain(fn, tree, x).uses
  assert (use.factored, use.way, use.met) == (True, "grouped", "i")


def test_a_kernel_that_is_not_registered_is_right_and_says_what_would_help():
  tree, x = adapted((3, 5, 7), "sio"), array(2, (4, 5))
  with pytest.warns(jaxlora.MaterializeWarning, match="derivative or batching rule of its own.*register_product"):
    jaxlora.wrap(lambda p, x: grouped(x, p["w"], SIZES))(tree, x)


@pytest.mark.nightly
def test_a_derivative_of_its_own_is_the_one_that_is_used():
  """A kernel that gives a third of the gradient gives a third at each of the products."""

  @jax.custom_vjp
  def third(x, w):
    return x @ w

  third.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, dy: (dy @ kept[1].T / 3, kept[0].T @ dy / 3))
  product = jaxlora.register_product(third, "mk,kn->mn")
  tree, x = adapted((5, 7), "io"), array(2, (4, 5))
  grads = [
    jaxlora.grad(lambda tree, fn=fn: jnp.sum(jnp.sin(jaxlora.wrap(fn)(tree, x))))(tree)["w"]
    for fn in (lambda p, x: product(x, p["w"]), lambda p, x: x @ p["w"])
  ]
  helpers.assert_close(9 * grads[0].a, grads[1].a, 1e-5)
  helpers.assert_close(3 * grads[0].b, grads[1].b, 1e-5)


@jax.custom_vjp
def tiles(x, w):
  """A Pallas kernel for whole tiles of 8 columns."""
  if w.shape[1] % 8:
    raise ValueError(f"columns in tiles of 8, found {w.shape[1]}")

  def kernel(x, w, out):
    out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

  shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32)
  specs = [pl.BlockSpec(x.shape, lambda j: (0, 0)), pl.BlockSpec((w.shape[0], 8), lambda j: (0, j))]
  out = pl.BlockSpec((x.shape[0], 8), lambda j: (0, j))
  return pl.pallas_call(kernel, shape, grid=(w.shape[1] // 8,), in_specs=specs, out_specs=out, interpret=True)(x, w)


tiles.defvjp(lambda x, w: (tiles(x, w), (x, w)), lambda kept, dy: (dy @ kept[1].T, kept[0].T @ dy))


def test_a_pallas_kernel_with_another_function_for_its_thin_products():
  """In interpret mode. The kernel takes no weight that is a rank wide: right and reported, and `thin=` helps."""
  tree, x = adapted((5, 16), "io"), array(2, (4, 5))
  alone = jaxlora.register_product(tiles, "mk,kn->mn")
  with pytest.warns(jaxlora.MaterializeWarning, match=r"tiles does not take .*tiles of 8, found 2.*thin="):
    got = jaxlora.wrap(lambda p, x: alone(x, p["w"]))(tree, x)
  helpers.assert_close(got, x @ jaxlora.merge(tree)["w"], 1e-5)
  product = jaxlora.register_product(tiles, "mk,kn->mn", thin=jnp.matmul)
  helpers.check(lambda p, x: product(x, p["w"]), tree, (x,), 1e-5)


@pytest.mark.parametrize("made", profiles.some(["variant", "codes", "roles", "vmap"], "roles"))
def test_what_the_rule_does_not_tell_is_formed_and_right(made):
  product = jaxlora.register_product(grouped, "mk,gkn,g->mn")
  fn, x = lambda p, x: product(x, p["w"], SIZES), array(2, (4, 32))
  tree = adapted((3, 32, 64), "oio" if made == "roles" else "sio", variant="dora" if made == "variant" else "lora")
  if made == "codes":
    params = jaxlora.quantize({"w": array(1, (3, 32, 64))}, "int8", axes={"w": "sio"})
    tree = trained(jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, axes={"w": "sio"}), KEY))
  if made == "vmap":
    fn = lambda p, x: jax.vmap(lambda row: product(row[None], p["w"], SIZES)[0])(x)
  with pytest.warns(jaxlora.MaterializeWarning, match="w: "):
    got = jaxlora.wrap(fn)(tree, x)
  helpers.assert_close(got, helpers.oracle(fn)(tree, x), 1e-5)


def test_the_probe_learns_roles_and_routers_from_the_rule():
  product = jaxlora.register_product(grouped, "mk,gkn,g->mn")
  params = {"choice": array(0, (5, 3)), "up": array(1, (3, 5, 7)), "down": array(2, (3, 5, 7)), "out": array(3, (5, 5))}

  def fn(p, x):
    sizes = (x @ p["choice"] > 0).sum(0)
    return product(product(x, p["up"], sizes), p["down"].mT, sizes) @ p["out"]

  with pytest.warns(UserWarning, match="leaves out choice"):
    tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), KEY, probe=lambda p: fn(p, array(3, (4, 5))))
  assert {leaf.path: leaf.roles for leaf in jaxlora.summary(tree).leaves} == {"up": "sio", "down": "soi"}


RULES = {
  "mk,kn": "expected one letter for each axis",
  "m k->mn": "expected one letter for each axis",
  3: "expected one letter for each axis",
  "mk,kk->mk": "'kk' has a letter twice",
  "mk,kn->mq": "neither input nor weight has q",
  "mn,mn->mn": "nothing is summed",
  "mk,gkn->mn": "g goes nowhere",
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_that_describe_no_product(rule):
  with pytest.raises(ValueError, match=f"register_product: the rule of grouped is .*{RULES[rule]}"):
    jaxlora.register_product(grouped, rule)


def biased(x, w):
  return x @ w + 1


def scaled(x, w):
  return 2 * (x @ w)


def rectified(x, w):
  return jax.nn.relu(x) @ w


@pytest.mark.parametrize("fn", profiles.some([biased, scaled, rectified], biased))
def test_an_example_finds_out_what_is_no_product(fn):
  example = array(1, (4, 5)), array(2, (5, 7))
  with pytest.raises(
    ValueError, match=f"register_product: {fn.__name__} is no product as 'mk,kn->mn' says: .*differ by"
  ):
    jaxlora.register_product(fn, "mk,kn->mn", example=example)


@pytest.mark.nightly
def test_an_example_agrees_with_a_product():
  example = array(1, (4, 5)), array(2, (5, 7))
  jaxlora.register_product(jnp.matmul, "mk,kn->mn", example=example)
  jaxlora.register_product(grouped, "mk,gkn,g->mn", example=(array(1, (4, 5)), array(2, (3, 5, 7)), SIZES))


def pair(x, w):
  return x @ w, x


def turned(x, w):
  return (x @ w).T


def test_calls_that_the_rule_does_not_fit():
  product = jaxlora.register_product(grouped, "mk,gkn,g->mn")
  x, w = array(1, (4, 5)), array(2, (3, 5, 7))
  with pytest.raises(TypeError, match=r"grouped: found 2 arrays, expected 3, as 'mk,gkn,g->mn'"):
    product(x, w)
  with pytest.raises(ValueError, match=r"grouped: argument 2 has shape \(2,\), expected 'g' of .*'g': 3"):
    product(x, w, SIZES[:2])
  with pytest.raises(TypeError, match="grouped: an array is passed by keyword"):
    product(x, w, sizes=SIZES)
  with pytest.raises(TypeError, match=r"pair: returns .*expected one array"):
    jaxlora.register_product(pair, "mk,kn->mn")(x, w[0])
  with pytest.raises(ValueError, match="turned: the result has shape"):
    jaxlora.register_product(turned, "mk,kn->mn")(x, w[0])
  with pytest.raises(TypeError, match="register_product: fn is 3, expected a function"):
    jaxlora.register_product(3, "mk,kn->mn")
  with pytest.raises(ValueError, match="<lambda>: closes over an array of the trace"):
    jax.grad(lambda s: jaxlora.register_product(lambda x, w: s * (x @ w), "mk,kn->mn")(x, w[0]).sum())(1.0)
