"""What chips of a TPU v5e send each other in a training step, by the TPU's own compiler: compiled, and never run."""

import os

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import jaxlora
from tests._platform.test_compilers import _ENVIRONMENT
from tests.helpers import bench_scripts

pytest.importorskip("libtpu", reason="the TPU's compiler needs jaxlora[compilers]")
pytest.importorskip("matplotlib", reason="benchmarks need jaxlora[bench]")

SHAPES = {"up": (512, 2048), "down": (2048, 512)}
BATCH, TIME, RANK = 8, 256, 8
# Specs of tokens (batch, time, width), of `up` and of `down`.
LAYOUTS = {
  "data": (P("x"), P(), P()),
  "sequence": (P(None, "x"), P(), P()),
  "FSDP": (P("x"), P("x"), P(None, "x")),
  "TP": (P(), P(None, "x"), P("x")),
}


@pytest.fixture(scope="module")
def mesh():
  with pytest.MonkeyPatch.context() as patch:
    for name, value in _ENVIRONMENT.items():
      patch.setitem(os.environ, name, value)
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
  return Mesh(np.array(found), "x", axis_types=(AxisType.Auto,))


def fn(p, x):
  return x + jax.nn.gelu(x @ p["up"]) @ p["down"]


def compiled(step, out, *args):
  return jax.jit(step, out_shardings=out).trace(*args).lower(lowering_platforms=("tpu",)).compile().as_text()


def lies(tree):
  return jax.tree.map(lambda leaf: leaf.sharding, tree)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_sends_what_its_floor_does_and_its_thin_products(mesh, layout):
  tokens, *specs = LAYOUTS[layout]
  shape = lambda size, spec: jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
  params = {name: shape(size, spec) for (name, size), spec in zip(SHAPES.items(), specs, strict=True)}
  x = shape((BATCH, TIME, 512), tokens)
  squared = lambda y: jnp.sum(jnp.square(y.astype(jnp.float32)))
  frozen, half = jaxlora.split(jaxlora.adapt(params, jaxlora.LoraConfig(rank=RANK), jax.random.key(0)))
  ours = lambda half, frozen, x: squared(jaxlora.wrap(fn)(jaxlora.join(frozen, half), x))
  step = compiled(jax.grad(ours), lies(half), half, frozen, x)
  floor = compiled(jax.grad(lambda x, p: squared(fn(p, x))), x.sharding, x, params)
  with bench_scripts.modules("hlo") as bench:
    sent, least = (sum(bench.hlo.communicated(text, 1).values()) for text in (step, floor))
    reduced = [
      size
      for one in bench.hlo.inside(step, 1)
      if one.instruction.opcode.startswith(("all-reduce", "reduce-scatter"))
      for _, size in bench.hlo.arrays(one.instruction.type)
    ]
  thin = 2 * RANK * sum(3 * sum(size) + 2 * BATCH * TIME for size in SHAPES.values())
  assert sent <= least + 1.1 * thin
  assert not {tuple(size) for size in reduced} & {*SHAPES.values(), *(size[::-1] for size in SHAPES.values())}
