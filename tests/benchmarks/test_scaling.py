"""benchmarks/scaling.py: steps of large models by shapes alone, and the table of what compilers say."""

import copy
import json

import jax
import pytest

from tests.helpers import bench_scripts

for package in ("matplotlib", "tqdm"):
  pytest.importorskip(package, reason="benchmarks need jaxlora[bench]")

FACTS = {"chips": 256, "parameters": 70_553_706_496, "tokens": 524_288}
FITS = {
  **FACTS,
  **{"topology": "v5e:16x16", "model": "70B", "method": "LoRA", "fits": True},
  "bytes": {"argument": 1 << 30, "temp": 5 << 30, "output": 1 << 29, "alias": 1 << 29},
  "flops": 394e12,
  "cycles": 3_000_000_000,
  "sent": {"all-gather": 300e9, "all-reduce": 100e9},
}
LARGE = {
  **FACTS,
  **{"topology": "v6e:16x16", "model": "70B", "method": "full fine-tuning", "fits": False, "needs": 40.5, "said": ""},
}


@pytest.fixture(scope="module")
def bench():
  with bench_scripts.modules("scaling", "scaling_steps", "chips", "harness", "report") as found:
    yield found


def test_the_table_says_what_fits_what_it_takes_at_least_and_by_how_much_the_rest_does_not(bench, tmp_path):
  fits = copy.deepcopy(FITS)
  fits["seconds"] = bench.scaling.seconds(fits, bench.scaling.chip_of("v5e:16x16"))
  assert fits["seconds"] == {"FLOPs": 2.0, "links": 2.0, "cycles": 2.0}
  versions = {"jax": "1", "flax": "2", "libtpu": "3"}
  settings = {"seq": 2048, "sequences": 1, "rank": 16, "level": "O1"}
  memory = {"v5e:16x16": 15.75, "v6e:16x16": 31.25}
  results = {"rows": [fits, LARGE], "versions": versions, "settings": settings, "memory": memory}
  table = bench.scaling.tables(results)
  assert (
    "| v5e:16x16 | 70B | LoRA | 6.00 G | 1.00 G | 394.0 | 400.0 GB | 2.00 s | 2.00 s | 2.00 s | 262,144 | 1,024 |"
    in table
  )
  assert "| v6e:16x16 | 70B | full fine-tuning | needs 40.50 G | - |" in table
  assert "not run" in table
  bench.scaling.plot(results, tmp_path / "plot.png")
  assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
  assert "seconds" not in bench.scaling.chip_of("v6e:16x16")._asdict()
  assert "cycles" not in bench.scaling.seconds(FITS, bench.scaling.chip_of("v6e:16x16"))  # whose clock is not public


def test_bases_of_any_size_are_only_shapes_and_every_part_lies_on_the_mesh(bench):
  """70B in codes: blocks are not cut, and nothing is whole on a device but what is small."""
  shape = bench.scaling_steps.MODELS["70B"]._replace(layers=2)
  mesh = bench.scaling_steps.mesh_of(jax.devices()[:8], shape)
  step = bench.scaling_steps.step_of(shape, "QLoRA", mesh, 64, 1, 4)
  leaves = jax.tree.leaves(step.args)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding.mesh == mesh for leaf in leaves)
  whole = sum(leaf.size for leaf in leaves if leaf.sharding.is_fully_replicated)
  assert whole < 1e-4 * sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize("count", [16, 64, 256, 1024])
def test_every_model_divides_into_the_slices(bench, count):
  for name in bench.scaling.LARGE:
    shape = bench.scaling_steps.MODELS[name]
    mesh = jax.sharding.AbstractMesh(bench.scaling_steps.sides(count, shape), bench.scaling_steps.BOTH)
    leaves = jax.tree.leaves(bench.scaling_steps.parameters(shape, mesh))
    assert sum(leaf.size for leaf in leaves) > 8e9


@pytest.mark.nightly
@pytest.mark.parametrize("model", ["tiny", "tiny sparse"])
def test_end_to_end_on_the_hosts_own_devices(bench, model, tmp_path):
  options = ["--topology=cpu", f"--model={model}", "--seq=64", "--rank=4", "--quiet"]
  finished = bench_scripts.finish(bench.scaling.main, options, tmp_path)
  assert json.loads((tmp_path / "scaling.json").read_text()) == finished.results
  by = {row["method"]: row for row in finished.results["rows"]}
  assert (
    by["QLoRA"]["bytes"]["argument"] < by["LoRA"]["bytes"]["argument"] < by["full fine-tuning"]["bytes"]["argument"]
  )
  assert by["LoRA"]["flops"] < by["full fine-tuning"]["flops"]
  before = (tmp_path / "runs.json").read_text()
  again = bench_scripts.finish(bench.scaling.main, options, tmp_path)  # which compiles nothing
  assert again.results == finished.results
  assert (tmp_path / "runs.json").read_text() == before


def test_help_has_an_example(bench, capsys):
  with pytest.raises(SystemExit):
    bench.scaling.main(["--help"])
  assert "example: python benchmarks/scaling.py" in capsys.readouterr().out
