"""The TPU's own compiler, ahead of time and without the device: programs are compiled there, and never run.

Needs libtpu, `pip install -e ".[test,compilers]"`.
"""

import collections
import math
import os
import re

import flax.linen as nn
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import pytest

import jaxlora
from tests import helpers

pytest.importorskip("libtpu", reason="the TPU's compiler needs jaxlora[compilers]")

# libtpu asks for these when it is first loaded: no metadata server, no log files, and several processes of a test run.
_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_LOG_DIR": "disabled",
}
WIDTH, HIDDEN = 1024, 4096
REACH = 1.08
VOCABULARY = 2048
BATCH, TOKENS = 8, 512


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    own = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    attention = nn.MultiHeadDotProductAttention(num_heads=16, **own)
    x = x + attention(nn.LayerNorm(**own)(x), mask=nn.make_causal_mask(jnp.ones((1, x.shape[1]))))
    return x + nn.Dense(WIDTH, **own)(nn.gelu(nn.Dense(HIDDEN, **own)(nn.LayerNorm(**own)(x))))


class Blocks(nn.Module):
  """A language model of two blocks; `eps` is added to the embedded tokens."""

  @nn.compact
  def __call__(self, tokens, eps=0):
    own = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    x = nn.Embed(VOCABULARY, WIDTH, name="embed", **own)(tokens) + eps
    for k in range(2):
      x = Block(name=f"block_{k}")(x)
    return nn.Dense(VOCABULARY, name="head", **own)(nn.LayerNorm(name="norm", **own)(x))


@pytest.fixture(autouse=True)
def many_tokens():
  """Tokens are as many as the library says."""


@pytest.fixture(scope="module")
def device():
  """One chip of a TPU v5e that is not here."""
  before = dict(os.environ)
  os.environ.update(_ENVIRONMENT)
  found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
  os.environ.clear()
  os.environ.update(before)
  return found


@pytest.fixture
def compile_for_tpu(device, lenient):
  """A function from a step and its arguments to what a TPU v5e's compiler makes of it."""
  placed = jax.sharding.SingleDeviceSharding(device)

  def compile_step(step, *args):
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), args)
    return jax.jit(step).trace(*abstract).lower(lowering_platforms=("tpu",)).compile()

  return compile_step


@pytest.fixture
def model(lenient):
  """A model's parameters and tokens."""
  module, tokens = Blocks(), jnp.zeros((BATCH, TOKENS), jnp.int32)
  return module, module.init(jax.random.key(0), tokens[:1, :1])["params"], tokens


def loss_of(logits):
  return -jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32))[..., 0])


@pytest.fixture(scope="module")
def steps():
  """The steps that have been compiled, by their options."""
  return {}


@pytest.fixture
def step(model, compile_for_tpu, steps):
  """A function from options of `wrap` to the compiled training step. Compiled, not run."""
  module, params, tokens = model
  fn = lambda p, x: module.apply({"params": p}, x)
  probe = lambda p: fn(p, tokens[:1])
  tree = helpers.adapted(params, rank=8, targets=r"block.*/kernel", seed=None, probe=probe)
  frozen, trainable = jaxlora.split(tree)

  def compiled(**options):
    wrapped = jaxlora.wrap(fn, on_materialize="error", **options)
    loss = lambda trainable, frozen, x: loss_of(wrapped(jaxlora.join(frozen, trainable), x))
    key = tuple(sorted(options.items()))
    if key not in steps:
      steps[key] = compile_for_tpu(jax.value_and_grad(loss), trainable, frozen, tokens)
    return steps[key]

  return compiled


@pytest.fixture
def floor(model, compile_for_tpu, steps):
  """The frozen floor: forward pass and input gradient."""
  module, params, tokens = model
  loss = lambda eps, p, x: loss_of(module.apply({"params": p}, x, eps))
  if "floor" not in steps:
    eps = jnp.zeros((BATCH, TOKENS, WIDTH), jnp.bfloat16)
    steps["floor"] = compile_for_tpu(jax.value_and_grad(loss), eps, params, tokens)
  return steps["floor"]


def cycles(compiled):
  """The compiler's own estimate."""
  return sum(int(count) for count in re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text()))


def instructions(compiled):
  """How often each kind of instruction is in the optimised program."""
  return collections.Counter(re.findall(r"^ *(?:ROOT )?%\S+ = .*? ([a-z][a-z-]*)\(", compiled.as_text(), re.MULTILINE))


def test_a_step_for_a_tpu_has_nothing_that_is_for_cpus(step):
  """Traced as on a CPU host: forms for CPUs are chosen where a program is lowered."""
  text = step().as_text()
  assert "shift-right-logical" not in text  # how CPUs wait for a cotangent
  assert "inlineable" not in text  # how they keep a sum apart
  assert not re.findall(rf"= (?:bf16|f32)\[(?:{WIDTH},{HIDDEN}|{HIDDEN},{WIDTH})\]\S* (?:dot|convolution)\(", text)


def test_traced_on_a_cpu_host_is_traced_for_a_tpu(step):
  host, told = step(), step(platform="tpu")
  assert instructions(host) == instructions(told)
  assert cycles(host) == cycles(told) > 0
  assert host.memory_analysis().temp_size_in_bytes == told.memory_analysis().temp_size_in_bytes


def test_a_step_is_near_the_frozen_floor(step, floor):
  ours, plain, least = (cycles(compiled) for compiled in (step(), step(tuning="none"), floor))
  assert ours <= REACH * least
  assert ours < 0.95 * plain


def test_a_step_lays_neither_tokens_nor_weights_out_anew(step, floor):
  copied = re.compile(r"= (?:bf16|f32)\[([\d,]+)\]\S* copy\(", re.MULTILINE)
  sizes = lambda compiled: [math.prod(map(int, shape.split(","))) for shape in copied.findall(compiled.as_text())]
  large = lambda compiled: [size for size in sizes(compiled) if size >= min(BATCH * TOKENS * WIDTH, WIDTH * HIDDEN)]
  assert sizes(step())  # which are of thin arrays, and of the small weights whose axes are flattened
  assert not large(step())
  assert not large(floor)


def test_few_tokens_meet_a_weight_that_is_not_laid_out_anew(model, compile_for_tpu):
  """With few tokens the joined product would first write `[W; B]`, which is more than all else."""
  module, params, _ = model
  tokens = jnp.zeros((32, 1), jnp.int32)
  fn = lambda p, x: module.apply({"params": p}, x)
  tree = helpers.adapted(params, rank=8, targets=r"block.*/kernel", seed=None, probe=lambda p: fn(p, tokens))
  base, adapted = compile_for_tpu(fn, params, tokens), compile_for_tpu(jaxlora.wrap(fn), tree, tokens)
  assert not re.search(rf"= bf16\[(?:{WIDTH + 8},|{HIDDEN + 8},)", adapted.as_text())
  assert cycles(adapted) < 1.6 * cycles(base)  # each of twelve products has two more, at 1.8 k cycles at least


def test_a_mixed_batch_traced_on_a_cpu_host_has_no_loop_over_rows(compile_for_tpu):
  params = {"kernel": jnp.zeros((WIDTH, WIDTH), jnp.bfloat16)}
  tree = helpers.adapted(params, rank=8, targets=".*", seed=None)
  bank = jaxlora.stack({str(k): tree for k in range(12)})
  routed = jaxlora.route(lambda p, x: x @ p["kernel"])
  args = params, bank, jnp.zeros(32, jnp.int32), jnp.zeros((32, 1, WIDTH), jnp.bfloat16)
  assert {use.way for use in jaxlora.explain(routed, *args).uses} == {"row by row"}  # which this host would be given
  assert " while(" not in compile_for_tpu(routed, *args).as_text()


class Scanned(nn.Module):
  """Two blocks, as one that is scanned."""

  remat: bool = False

  @nn.compact
  def __call__(self, x):
    scanned = nn.scan(
      lambda block, x, _: (block(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    return scanned(block(name="blocks"), x, None)[0]


@pytest.fixture
def scanned_step(compile_for_tpu):
  """A function from a scanned module and a rank to the compiled training step, and to the frozen floor without one."""
  x = jnp.zeros((4, TOKENS, WIDTH), jnp.bfloat16)
  squared = lambda y: jnp.sum(jnp.square(y.astype(jnp.float32)))

  def compiled(module, rank=None):
    params = module.init(jax.random.key(0), x[:1, :1])["params"]
    fn = lambda p, x: module.apply({"params": p}, x)
    if rank is None:
      return compile_for_tpu(jax.value_and_grad(lambda x, p: squared(fn(p, x))), x, params)
    tree = helpers.adapted(params, rank=rank, targets=".*/kernel", seed=None, probe=lambda p: fn(p, x[:1]))
    frozen, trainable = jaxlora.split(tree)
    wrapped = jaxlora.wrap(fn, on_materialize="error")
    loss = lambda half, frozen, x: squared(wrapped(jaxlora.join(frozen, half), x))
    return compile_for_tpu(jax.value_and_grad(loss), trainable, frozen, x)

  return compiled


def test_a_scanned_step_copies_no_stack_of_layers_and_no_slice_of_one(scanned_step):
  """What the layers keep for the backward pass is one array: to copy it in each layer costs more with every layer.

  The weights of the MLP are read where they lie in their stacks.
  """
  text = scanned_step(Scanned(), rank=8).as_text()
  assert " while(" in text
  assert not re.findall(rf"= bf16\[2,4,{TOKENS},{WIDTH}\]\S* copy\(", text)
  assert not re.findall(rf"dynamic-slice\S* = bf16\[(?:1,)?(?:{WIDTH},{HIDDEN}|{HIDDEN},{WIDTH})\]", text)


def test_longer_ranks_meet_rows_in_a_loop(scanned_step):
  """The compiler would lay tokens along the fastest axis there, and 16 columns beside them would cost twice as much."""
  text = scanned_step(Scanned(remat=True), rank=16).as_text()
  kept = set(re.findall(rf"bf16\[2,4,{TOKENS},{WIDTH}\]{{([\d,]+)", text))
  assert kept == {"3,2,1,0"}


@pytest.fixture
def on_the_host(device, lenient):
  """A function from a base of stacked layers that rests on the host to the size of its stack, and what is on the chip.

  The type of a `jax.ShapeDtypeStruct` does not say where it rests: the step does.
  """
  layers = 16
  placed = jax.sharding.SingleDeviceSharding(device)
  host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
  on = lambda where: lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
  x = jax.ShapeDtypeStruct((64, WIDTH), jnp.bfloat16, sharding=placed)

  def compiled(layer, resting):
    params = {"w": jax.ShapeDtypeStruct((layers, WIDTH, WIDTH), jnp.bfloat16)}
    config = jaxlora.LoraConfig(rank=8, targets="w", axes={"w": "sio"})
    frozen, trainable = jaxlora.split(jaxlora.adapt(resting(params), config, jax.random.key(0)))
    scanned = lambda p, x: jax.lax.scan(lambda x, w: (x + jnp.tanh(layer(x, w)), None), x, p["w"])[0]
    wrapped = jaxlora.wrap(scanned, on_materialize="error")

    rests = jax.tree.map(lambda leaf: leaf.sharding.memory_kind == "pinned_host", frozen)

    def loss(half, frozen, x):
      there = jax.tree.map(lambda x, rest: jax.device_put(x, jax.memory.Space.Host) if rest else x, frozen, rests)
      return jnp.sum(jnp.square(wrapped(jaxlora.join(there, half), x).astype(jnp.float32)))

    args = jax.tree.map(on(placed), trainable), frozen, x
    memory = jax.jit(jax.grad(loss)).trace(*args).lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    stack = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen))
    return stack, memory.argument_size_in_bytes + memory.temp_size_in_bytes

  compiled.floats = lambda params: jax.tree.map(on(host), params)
  compiled.codes = lambda codes: jaxlora.quant.rest_on_host(jax.tree.map(on(placed), codes))
  return compiled


def test_floats_on_the_host_are_fetched_layer_by_layer(on_the_host):
  """A scan over layers that rest on the host has a few of them on the chip at a time, never the stack."""
  stack, here = on_the_host(lambda x, w: x @ jax.device_put(w, jax.memory.Space.Device), on_the_host.floats)
  assert here < stack / 8


FORMATS = {
  "int8 per output": {"format": "int8", "block_size": None, "double": False},
  "int8": {"format": "int8"},
  "nf4": {"format": "nf4", "double": False},
  "nf4, double": {"format": "nf4"},
  "q4_0": {"format": "q4_0"},
  "fp8": {"format": "fp8"},
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_codes_on_the_host_are_fetched_layer_by_layer(on_the_host, format, turned):
  codes = lambda params: jaxlora.quantize(params, targets="w", axes={"w": "sio"}, **FORMATS[format])
  layer = (lambda x, w: x @ w.T) if turned else lambda x, w: x @ w
  stack, here = on_the_host(layer, lambda params: on_the_host.codes(codes(params)))
  assert here < stack / 2


@pytest.mark.parametrize("turned", [False, True])
def test_codes_of_another_library_are_fetched_layer_by_layer(on_the_host, turned):
  bf16 = jnp.dtype(jnp.bfloat16)
  codes = lambda params: {"w": helpers.Eighths(jax.ShapeDtypeStruct(params["w"].shape, jnp.int8), bf16)}
  layer = (lambda x, w: x @ w.T) if turned else lambda x, w: x @ w
  stack, here = on_the_host(layer, lambda params: on_the_host.codes(codes(params)))
  assert here < stack / 2


def test_codes_that_a_chip_cannot_fetch_stay_there_and_are_named(device):
  """Of a kernel whose outputs have an axis of heads; with these flattened, as the warning says, it rests."""
  on = lambda leaf: jax.ShapeDtypeStruct(
    leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(device, memory_kind="device")
  )

  def resting(*outputs):
    params = {"query": jax.ShapeDtypeStruct((4, WIDTH, *outputs), jnp.bfloat16)}
    axes = {"query": "sio" + "o" * (len(outputs) - 1)}
    codes = jaxlora.quantize(params, "int8", block_size=None, double=False, targets="query", axes=axes)
    return jaxlora.quant.rest_on_host(jax.tree.map(on, codes))["query"].codes.sharding.memory_kind

  with pytest.warns(UserWarning, match=r"leaves stay on the chip: query \(4, 1024, 16, 64\).*Flatten heads"):
    assert resting(16, 64) == "device"
  assert resting(16 * 64) == "pinned_host"
