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


def squared(y):
  return jnp.sum(jnp.square(y.astype(jnp.float32)))


def placed(mesh, size, spec, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec))


def compared(fn, params, x, *others, **fields):
  """The bytes that a step of the factors sends, those of the floor, and the sizes of what the step reduces."""
  config = jaxlora.LoraConfig(rank=RANK, **fields)
  frozen, half = jaxlora.split(jaxlora.adapt(params, config, jax.random.key(0)))
  wrapped = jaxlora.wrap(fn, on_materialize="error")
  ours = lambda half, frozen, x, *others: squared(wrapped(jaxlora.join(frozen, half), x, *others))
  step = compiled(jax.grad(ours), lies(half), half, frozen, x, *others)
  floor = compiled(jax.grad(lambda x, p, *others: squared(fn(p, x, *others))), x.sharding, x, params, *others)
  with bench_scripts.modules("hlo") as bench:
    sent, least = (sum(bench.hlo.communicated(text, 1).values()) for text in (step, floor))
    reduced = {
      tuple(size)
      for one in bench.hlo.inside(step, 1)
      if one.instruction.opcode.startswith(("all-reduce", "reduce-scatter"))
      for _, size in bench.hlo.arrays(one.instruction.type)
    }
  return sent, least, reduced


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_sends_what_its_floor_does_and_its_thin_products(mesh, layout):
  tokens, *specs = LAYOUTS[layout]
  params = {name: placed(mesh, size, spec) for (name, size), spec in zip(SHAPES.items(), specs, strict=True)}
  sent, least, reduced = compared(fn, params, placed(mesh, (BATCH, TIME, 512), tokens))
  thin = 2 * RANK * sum(3 * sum(size) + 2 * BATCH * TIME for size in SHAPES.values())
  assert sent <= least + 1.1 * thin
  assert not reduced & {*SHAPES.values(), *(size[::-1] for size in SHAPES.values())}


EXPERTS = 8, 256, 512
ROWS = 1024


def grouped(p, x, sizes):
  return jax.lax.ragged_dot(x, p["experts"], sizes)


def on_each(mesh):
  """Each device multiplies the rows that it has by the experts that it has, as after an exchange of tokens."""
  return jax.shard_map(grouped, mesh=mesh, in_specs=P("x"), out_specs=P("x"))


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(("rows", "by_shard"), [(P(), False), (P("x"), False), (P("x"), True)])
def test_experts_between_devices_send_what_their_floor_does_and_thin_factors(mesh, rows, by_shard):
  """The compiler sums results over the devices, or gathers rows and experts that are both split, and gathers factors;
  under `shard_map` nothing is sent.
  """
  params = {"experts": placed(mesh, EXPERTS, P("x"))}
  sizes = placed(mesh, EXPERTS[:1], P("x") if by_shard else P(), jnp.int32)
  x = placed(mesh, (ROWS, EXPERTS[1]), rows)
  fn = on_each(mesh) if by_shard else grouped
  sent, least, reduced = compared(fn, params, x, sizes, axes={"experts": "sio"})
  assert sent <= (0 if by_shard else least + 1.1 * 2 * 3 * RANK * EXPERTS[0] * sum(EXPERTS[1:]))
  assert not {size for size in reduced if len(size) > 1 and RANK not in size}
