"""The GPU's own compiler, ahead of time and without the device: a step is compiled for an H100, and never run.

Needs nvcc and JAX's plugin, `pip install -e ".[test,bench,compilers-gpu]"`.
"""

import jax
import jax.numpy as jnp
import pytest

import jaxlora
from tests.helpers import bench_scripts

for package in ("matplotlib", "tqdm"):
  pytest.importorskip(package, reason="benchmarks need jaxlora[bench]")

MODULES = ("ahead", "chips", "contestants", "settings", "hlo")
WIDTH = 512
QWIX_GEMMS = 84  # calls of cuBLAS in the step of qwix 0.1.8 for the same two layers


@pytest.fixture(scope="module")
def bench():
  with bench_scripts.modules(*MODULES) as found:
    yield found


@pytest.fixture(scope="module")
def target(bench):
  """An H100 that is not here."""
  chip = bench.chips.CHIPS["h100"]
  try:
    return bench.ahead.Target(chip, bench.chips.device_of(chip))
  except bench.chips.NoCompilerError as error:
    pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled(bench, target):
  """A function from a contestant's name to its step for an H100. Compiled, not run."""
  settings = bench.settings.Settings(WIDTH, 2, 10, 256, 8, bf16=True, vocabulary=1024)
  base = bench.settings.base_shapes(settings)
  by_name = {one.name: one for one in bench.contestants.contestants()}

  def of(name):
    step = bench.ahead.compile_for(target, by_name[name], base)
    return step, bench.ahead.figures(step, target.chip, settings)

  return of


def test_a_step_holds_less_and_moves_little_more_than_the_frozen_floor(bench, compiled):
  (_, floor), (step, ours) = compiled("frozen floor"), compiled("jaxlora")
  assert ours["temp"] < 0.90 * floor["temp"]  # of two layers; 0.69 of four wider ones
  assert ours["bytes_outside"] < 1.10 * floor["bytes_outside"]
  assert ours["gemms"] < QWIX_GEMMS
  gradients = [one for one in bench.hlo.executed(step.as_text(), 2) if bench.hlo.is_gemm(one.instruction)]
  shapes = [f"[{WIDTH},{WIDTH}]", f"[{WIDTH},{4 * WIDTH}]", f"[{4 * WIDTH},{WIDTH}]"]
  assert not [one for one in gradients if any(shape in one.instruction.type for shape in shapes)]


def test_traced_on_a_cpu_host_is_traced_for_a_gpu(bench, compiled, monkeypatch):
  _, host = compiled("jaxlora")
  wrap = bench.contestants.wrap
  monkeypatch.setattr(bench.contestants, "wrap", lambda fn, **options: wrap(fn, platform="gpu", **options))
  assert compiled("jaxlora")[1] == host


def test_a_gated_activation_is_made_again_from_what_the_floor_keeps(bench, target):
  """`act(g) * u` waits as `g` and `u`: a third array of their size would be kept for it."""
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
  layer = {"gate": shape(WIDTH, 3 * WIDTH), "up": shape(WIDTH, 3 * WIDTH), "down": shape(3 * WIDTH, WIDTH)}
  params, x = [layer] * 3, shape(8, 256, WIDTH)

  def model(params, x):
    for p in params:
      x = x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
    return jnp.sum(jnp.square(x.astype(jnp.float32)))

  frozen, factors = jaxlora.split(jaxlora.adapt(params, jaxlora.LoraConfig(rank=8), jax.random.key(0)))
  step = lambda x, factors, frozen: jaxlora.wrap(model)(jaxlora.join(frozen, factors), x)
  floor = bench.ahead.compile_shapes(target, jax.grad(lambda x, params: model(params, x)), (x, params), ())
  ours = bench.ahead.compile_shapes(target, jax.grad(step, (0, 1)), (x, factors, frozen), ())
  kept = [one.memory_analysis().temp_size_in_bytes for one in (floor, ours)]
  assert kept[1] < 1.2 * kept[0]
