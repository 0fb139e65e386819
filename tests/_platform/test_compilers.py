"""The TPU's own compiler, ahead of time and without the device: programs are compiled there, and never run.

Needs libtpu, `pip install -e ".[test,compilers]"`.
"""

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
WIDTH, HIDDEN = 256, 512


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    own = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    normed = nn.LayerNorm(**own)(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, **own)(normed)
    return x + nn.Dense(WIDTH, **own)(nn.gelu(nn.Dense(HIDDEN, **own)(nn.LayerNorm(**own)(x))))


@pytest.fixture
def compiled(lenient):
  """A function from options of `wrap` to the training step as a TPU v5e's compiler has it."""
  before = dict(os.environ)
  os.environ.update(_ENVIRONMENT)
  device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
  os.environ.clear()
  os.environ.update(before)
  module, x = Block(), jnp.ones((4, 96, WIDTH), jnp.bfloat16)  # 384 tokens: no side of a weight
  params = module.init(jax.random.key(0), x)["params"]
  fn = lambda p, x: module.apply({"params": p}, x)
  tree = helpers.adapted(params, rank=8, targets=".*/kernel", seed=None, probe=lambda p: fn(p, x))
  placed = jax.sharding.SingleDeviceSharding(device)
  args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), (tree, x))

  def compile_for_tpu(**options):
    wrapped = jaxlora.wrap(fn, on_materialize="error", **options)
    step = jaxlora.value_and_grad(lambda tree, x: jnp.sum(jnp.square(wrapped(tree, x).astype(jnp.float32))))
    return jax.jit(step).trace(*args).lower(lowering_platforms=("tpu",)).compile()

  return compile_for_tpu


@pytest.mark.parametrize("options", [{}, {"platform": "tpu"}, {"tuning": "none"}], ids=["cpu host", "tpu", "none"])
def test_a_step_compiles_for_a_tpu_without_what_is_for_cpus(compiled, options):
  """Compiled, not run. Traced as on a CPU host, too: forms for CPUs are chosen where a program is lowered."""
  step = compiled(**options)
  text = step.as_text()
  cycles = sum(int(count) for count in re.findall(r'"estimated_cycles":"(\d+)"', text))
  assert cycles > 0
  assert "shift-right-logical" not in text  # how CPUs wait for a cotangent
  assert "inlineable" not in text  # how they keep a sum apart
  assert not re.findall(rf"= (?:bf16|f32)\[(?:{WIDTH},{HIDDEN}|{HIDDEN},{WIDTH})\]\S* (?:dot|convolution)\(", text)
