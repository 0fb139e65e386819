"""benchmarks/meshes.py: what a step communicates on eight devices, and that it is the floor and the thin products."""

import json

import pytest

from tests.helpers import bench_scripts

for package in ("matplotlib", "tqdm"):
  pytest.importorskip(package, reason="benchmarks need jaxlora[bench]")

MODULES = ("meshes", "contestants", "settings", "models", "hlo", "harness", "report")
SMALL = ["--d=512", "--seq=64", "--vocabulary=1024", "--step=jaxlora", "--rounds=2", "--quiet"]
# Those whose steps gathered activations while tokens were flattened, or weights twice.
WORST = ("FSDP", "sequence", "TP, Megatron's sequence")


@pytest.fixture(scope="module")
def bench():
  with bench_scripts.modules(*MODULES) as found:
    yield found


def communicates_no_more_than_it_must(bench, out, setting, layers, *options):
  finished = bench_scripts.finish(
    bench.meshes.main, [*SMALL, f"--layers={layers}", f"--setting={setting}", *options], out
  )
  rows = finished.results["settings"][setting]
  over = {name: row["steps"]["jaxlora"]["bytes"] / row["reach"] for name, row in rows.items()}
  assert max(over.values()) <= 1, over
  return finished


def test_a_step_communicates_what_the_floor_does_and_its_thin_products(bench, tmp_path):
  options = [f"--only={name}" for name in WORST]
  finished = communicates_no_more_than_it_must(bench, tmp_path, "unrolled", 1, *options)
  assert json.loads((tmp_path / "meshes.json").read_text()) == finished.results
  assert "compiled, not run" in finished.printed
  kinds = finished.results["settings"]["unrolled"]["FSDP"]["steps"]["frozen floor"]["kinds"]
  assert kinds["all-gather"] > 1e6  # the base's own: what is compared with is no empty figure
  for name in WORST:
    assert f"| {name} |" in bench.meshes.tables(finished.results)


@pytest.mark.nightly
@pytest.mark.parametrize("setting", ["unrolled", "scanned", "scanned, remat"])
def test_so_on_every_mesh(bench, tmp_path, setting):
  communicates_no_more_than_it_must(bench, tmp_path, setting, 2)
