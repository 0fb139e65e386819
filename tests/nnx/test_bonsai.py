"""A decoder as bonsai writes them, in miniature and with its names: an adapted one is called as it is.

What it has that a textbook module has not: einsums as layers, attributes that are read off kernels' shapes, an
embedding that is indexed with `.at[].get`, caches that are modules among the arguments, shardings that each call says.
"""

import contextlib

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import jaxlora
import jaxlora.nnx
from tests import helpers
from tests.nnx.models import moved

pytestmark = [pytest.mark.usefixtures("lenient"), pytest.mark.filterwarnings("default")]
Trainable = jaxlora.nnx.Trainable
VOCABULARY, WIDTH, INNER, HEADS, KV_HEADS, SIZE, LENGTH = 32, 16, 24, 4, 2, 4, 8
TOKENS = jnp.arange(10).reshape(2, 5) % VOCABULARY
NOWHERE: dict[str, P | None] = dict.fromkeys(("tokens", "heads", "inner", "in_out", "out_in", "in_heads", "heads_out"))
EVERYWHERE = {
  "tokens": P("fsdp", None, "tp"),
  "heads": P("fsdp", None, "tp", None),
  "inner": P("fsdp", None, "tp"),
  "in_out": P("fsdp", "tp"),
  "out_in": P("tp", "fsdp"),
  "in_heads": P("tp", "fsdp", None),
  "heads_out": P("tp", None, "fsdp"),
}
KERNELS = {"attn/q_proj/kernel": "ioo", "attn/k_proj/kernel": "ioo", "attn/v_proj/kernel": "ioo"}
KERNELS |= {"attn/o_proj/kernel": "iio", **{f"mlp/{name}_proj/kernel": "io" for name in ("gate", "up", "down")}}


class LayerCache(nnx.Module):
  def __init__(self, spec):
    shape = len(TOKENS), LENGTH, KV_HEADS, SIZE
    self.k_cache = nnx.Cache(jnp.zeros(shape, out_sharding=spec["heads"]))
    self.v_cache = nnx.Cache(jnp.zeros(shape, out_sharding=spec["heads"]))
    self.cur_ind = nnx.Variable(jnp.zeros((), jnp.int32))


class Attention(nnx.Module):
  def __init__(self, spec, rngs):
    self.spec = spec
    into, out = {"out_sharding": spec["in_heads"]}, {"out_sharding": spec["heads_out"]}
    self.q_proj = nnx.Einsum("BTD,DNH->BTNH", (WIDTH, HEADS, SIZE), kernel_metadata=into, rngs=rngs)
    self.k_proj = nnx.Einsum("BSD,DKH->BSKH", (WIDTH, KV_HEADS, SIZE), kernel_metadata=into, rngs=rngs)
    self.v_proj = nnx.Einsum("BSD,DKH->BSKH", (WIDTH, KV_HEADS, SIZE), kernel_metadata=into, rngs=rngs)
    self.o_proj = nnx.Einsum("BTNH,NHD->BTD", (HEADS, SIZE, WIDTH), kernel_metadata=out, rngs=rngs)

  @property
  def head_dim(self):
    return self.o_proj.kernel.shape[1]

  @property
  def num_kv_heads(self):
    return self.k_proj.kernel.shape[1]

  def __call__(self, x, cache):
    q, k, v = (part(x, out_sharding=self.spec["heads"]) for part in (self.q_proj, self.k_proj, self.v_proj))
    start = cache.cur_ind[...]
    cache.k_cache.set_value(jax.lax.dynamic_update_slice(cache.k_cache[...], k, (0, start, 0, 0)))
    cache.v_cache.set_value(jax.lax.dynamic_update_slice(cache.v_cache[...], v, (0, start, 0, 0)))
    grouped = q.reshape(*q.shape[:2], self.num_kv_heads, -1, self.head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BTSKG", grouped, cache.k_cache[...]) * self.head_dim**-0.5
    seen = jnp.arange(LENGTH) <= start + jnp.arange(x.shape[1])[:, None]
    weights = jax.nn.softmax(jnp.where(seen[None, :, :, None, None], scores, -1e9), axis=2)
    mixed = jnp.einsum("BTSKG,BSKH->BTKGH", weights, cache.v_cache[...])
    cache.cur_ind.set_value(start + x.shape[1])
    return self.o_proj(mixed.reshape(q.shape), out_sharding=self.spec["tokens"])


class MLP(nnx.Module):
  def __init__(self, spec, rngs):
    self.spec = spec
    into, out = {"out_sharding": spec["in_out"]}, {"out_sharding": spec["out_in"]}
    self.gate_proj = nnx.Linear(WIDTH, INNER, use_bias=False, kernel_metadata=into, rngs=rngs)
    self.up_proj = nnx.Linear(WIDTH, INNER, use_bias=False, kernel_metadata=into, rngs=rngs)
    self.down_proj = nnx.Linear(INNER, WIDTH, use_bias=False, kernel_metadata=out, rngs=rngs)

  def __call__(self, x):
    gate = nnx.silu(self.gate_proj(x, out_sharding=self.spec["inner"]))
    return self.down_proj(gate * self.up_proj(x, out_sharding=self.spec["inner"]), out_sharding=self.spec["tokens"])


class DecoderLayer(nnx.Module):
  def __init__(self, spec, rngs):
    self.attn, self.mlp = Attention(spec, rngs), MLP(spec, rngs)

  def __call__(self, x, cache):
    x = x + self.attn(x, cache)
    return x + self.mlp(x)


class Decoder(nnx.Module):
  def __init__(self, spec, rngs):
    self.spec = spec
    self.embedder = nnx.Embed(VOCABULARY, WIDTH, embedding_metadata={"out_sharding": spec["out_in"]}, rngs=rngs)
    self.layers = nnx.List([DecoderLayer(spec, rngs) for _ in range(2)])
    head = {"out_sharding": spec["in_out"]}
    self.lm_head = nnx.Einsum("BTD,DV->BTV", (WIDTH, VOCABULARY), kernel_metadata=head, rngs=rngs)

  def __call__(self, tokens, *, cache):
    x = self.embedder.embedding[...].at[(tokens,)].get(out_sharding=self.spec["tokens"])
    for layer, held in zip(self.layers, cache, strict=True):
      x = layer(x, held)
    return self.lm_head(x, out_sharding=self.spec["tokens"])


def caches(spec):
  return [LayerCache(spec) for _ in range(2)]


@jax.jit
def forward(model, cache, tokens):
  """How bonsai takes a step of decoding: plain `jax.jit`, modules in and modules out."""
  logits = model(tokens, cache=cache)
  return logits[:, -1], cache


def loss(model):
  return jnp.square(model(TOKENS, cache=caches(model.spec))).mean()


@pytest.fixture(params=[pytest.param("one device", marks=pytest.mark.nightly), "an Explicit mesh"])
def spec(request):
  """How all lies; on a mesh, within it."""
  mesh = helpers.mesh_of(AxisType.Explicit, fsdp=2, tp=2) if request.param != "one device" else None
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    yield NOWHERE if mesh is None else EVERYWHERE


def test_a_decoder_is_adapted_decodes_and_is_differentiated_as_it_is(spec):
  config = jaxlora.LoraConfig(rank=2, targets=".*_proj/kernel|lm_head/kernel|embedder/embedding")
  probe = lambda model: model(TOKENS, cache=caches(spec))
  plain = Decoder(spec, nnx.Rngs(0))
  model = jaxlora.nnx.adapt(plain, config, jax.random.key(0), probe=probe, on_materialize="error")
  moved(model)
  roles = {leaf.path: leaf.roles for leaf in jaxlora.summary(model).leaves}
  expected = {f"layers/{k}/{path}": of for k in range(2) for path, of in KERNELS.items()}
  assert roles == expected | {"lm_head/kernel": "io", "embedder/embedding": "io"}
  assert (model.layers[0].attn.head_dim, model.layers[1].attn.num_kv_heads) == (SIZE, KV_HEADS)

  merged = jaxlora.merge(model)
  mine, theirs = caches(spec), caches(spec)
  for tokens in (TOKENS, TOKENS[:, :1], TOKENS[:, 1:2]):
    ours, mine = forward(model, mine, tokens)
    wanted, theirs = forward(merged, theirs, tokens)
    helpers.assert_close(ours, wanted, 1e-5)
  assert int(mine[1].cur_ind[...]) == 7
  np.testing.assert_allclose(mine[1].v_cache[...], theirs[1].v_cache[...], rtol=1e-4, atol=1e-5)

  grads = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, Trainable)))(model)
  oracle = jax.jit(jaxlora.grad(lambda tree: loss(jaxlora.merge(tree))))(jaxlora.nnx.to_tree(model))
  got, want = (sorted(jax.tree.leaves(jax.tree.map(jnp.sum, tree))) for tree in (nnx.to_pure_dict(grads), oracle))
  helpers.assert_close(jnp.stack(got), jnp.stack(want), 1e-4)
  if spec is EVERYWHERE:
    held = nnx.to_pure_dict(nnx.state(model, Trainable))["layers"][0]["attn"]["q_proj"]["jaxlora"]["kernel"]
    assert (jax.typeof(held["a"]).sharding.spec, jax.typeof(held["b"]).sharding.spec) == (
      P(None, "tp"),
      P(None, "fsdp", None),
    )
