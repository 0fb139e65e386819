"""benchmarks/compiled.py from end to end, on a tiny model: compiled for chips that are not here."""

import importlib.metadata
import json
import warnings

import jax
import pytest

from tests.helpers import bench_scripts

for package in ("matplotlib", "tqdm"):
  pytest.importorskip(package, reason="benchmarks need jaxlora[bench]")

MODULES = (
  "compiled",
  "compiled_forward",
  "compiled_suite",
  "seven_billion",
  "decoding",
  "experts",
  "ahead",
  "chips",
  "contestants",
  "settings",
  "models",
  "steps",
  "harness",
  "report",
)
TINY = ["--d=128", "--layers=2", "--batch=2", "--seq=128", "--rank=2", "--vocabulary=32", "--rounds=2", "--quiet"]
NAMED = ("jax", "flax", "qwix", "libtpu")  # versions that tables name, of which qwix may not be installed
HERE = ["frozen floor", "full fine-tuning", "nnx.LoRA", "jaxlora", "jaxlora, TrainState", "jaxlora, no recompute"]


@pytest.fixture(scope="module")
def bench():
  with bench_scripts.modules(*MODULES) as found:
    yield found


def needs(bench, name):
  """The chip, if its compiler is installed."""
  chip = bench.chips.CHIPS[name]
  try:
    bench.chips.device_of(chip)
  except bench.chips.NoCompilerError as error:
    pytest.skip(str(error))
  return chip


def run(bench, out, *options):
  """A run of the script, and what every one owes: a table, a JSON that says what was returned, and a plot."""
  finished = bench_scripts.finish(bench.compiled.main, [*TINY, *options], out)
  assert json.loads((out / "compiled.json").read_text()) == finished.results
  assert (out / "compiled.png").read_bytes().startswith(b"\x89PNG")
  for name in finished.results["rows"]:
    assert any(line.startswith(f"{name}  ") for line in finished.printed.splitlines()), name
  assert "compiled, not run" in finished.printed
  assert bench.compiled.tables(finished.results).count("\n| jaxlora") >= 3
  return finished


def test_a_tpu_that_is_not_here(bench, tmp_path):
  needs(bench, "v5e:2x2")
  finished = run(bench, tmp_path, "--bf16", "--only=nnx,jaxlora")
  rows = finished.results["rows"]
  assert list(rows) == HERE
  for row in rows.values():
    assert row["cycles"] > 0
    assert row["microseconds"]["cycles"] == pytest.approx(row["cycles"] / 1500)
  assert rows["frozen floor"]["over_floor"]["cycles"] == 1
  assert rows["jaxlora"]["flops"] < rows["full fine-tuning"]["flops"]
  assert finished.results["over_best_peer"]["peer"] == "nnx.LoRA"
  assert finished.results["run"] is None
  assert "Nothing was run" in finished.printed
  assert "libtpu" in finished.results["versions"]


def test_a_scanned_step_has_cycles_for_every_layer_and_neither_flops_nor_bytes(bench):
  chip = needs(bench, "v5e:2x2")
  target = bench.compiled.Target(chip, bench.chips.device_of(chip))
  floor, *_ = bench.contestants.contestants()

  def scanned(layers):
    settings = bench.settings.Settings(128, layers, 2, 128, 2, vocabulary=32, scan=True)
    step = bench.ahead.compile_for(target, floor, bench.settings.base_shapes(settings))
    return bench.ahead.figures(step, chip, settings)

  few, many = scanned(4), scanned(8)
  assert few["flops"] is None
  assert few["bytes"] is None
  assert 1.5 < many["cycles"] / few["cycles"] < 2


def test_the_suite_of_settings(bench, tmp_path, monkeypatch):
  needs(bench, "v5e:2x2")
  suite = bench.compiled_suite
  tiny = suite.Setting("tiny", {"width": 128, "batch": 2, "seq": 128, "rank": 2, "vocabulary": 32, "layers": 1})
  monkeypatch.setattr(suite, "ROWS", {"v5e:2x2": (tiny,)})
  finished = bench_scripts.finish(suite.main, ["--chips=v5e", "--only=jaxlora", "--quiet"], tmp_path)
  (row,) = finished.results["rows"]["v5e:2x2"].values()
  assert list(row) == ["frozen floor", "jaxlora"]
  assert all(figures["cycles"] > 0 and figures["temp"] >= 0 for figures in row.values())
  assert "libtpu" in finished.results["versions"]
  assert "\n| v5e | tiny | " in suite.tables(finished.results | {"versions": dict.fromkeys(NAMED, "1")})


def test_a_step_on_codes_holds_less(bench, tmp_path):
  needs(bench, "v5e:2x2")
  script = bench.seven_billion
  options = ["--quick", "--quiet", "--seq=128", "--only=float base|nf4, double"]
  rows = bench_scripts.finish(script.main, options, tmp_path).results["rows"]
  floats, codes = rows["float base"], rows["nf4, double"]
  assert floats["fits"]
  assert codes["fits"]
  assert codes["bytes"]["argument"] < floats["bytes"]["argument"]
  assert 0 < script.total(codes) < script.GIB


def test_a_way_of_decoding_in_a_step(bench, tmp_path, monkeypatch):
  needs(bench, "v5e:2x2")
  monkeypatch.setattr(bench.decoding, "WAYS", {"index": bench.decoding.WAYS["index"]})
  small = [option for option in TINY if "layers" not in option]
  finished = bench_scripts.finish(bench.decoding.main, [*small, "--layers=1", "--chip=v5e:2x2", "--bf16"], tmp_path)
  assert finished.results["floats"]["cycles"] > 0
  assert finished.results["rows"]["index"]["cycles"] > 0
  assert "not run: these are no times" in finished.printed


SPARSE = ["--quick", "--quiet", "--d=256", "--hidden=256", "--tokens=256", "--rounds=2"]
LARGER = ["--layers=3", "--d=512", "--hidden=1024", "--tokens=1024"]


def test_factors_of_all_experts_are_met_side_by_side_on_a_tpu(bench, tmp_path):
  """Grouped thin products cost most of a step where XLA:TPU computes their gradients for each expert on all rows, and
  copies and sums where it has a kernel for them, which counts no cycles. A step holds no more than the floor's.
  """
  needs(bench, "v5e:2x2")
  finished = bench_scripts.finish(bench.experts.main, [*SPARSE, *LARGER, "--chip=v5e:2x2", "--bf16"], tmp_path)
  rows = finished.results["rows"]
  floor, ours, grouped = (rows[name] for name in (bench.experts.FLOOR, bench.experts.OURS, bench.experts.GROUPED))
  assert ours["cycles"] < 1.7 * floor["cycles"]
  assert ours["bytes"] < min(1.45 * floor["bytes"], grouped["bytes"])  # 1.38: rows are read again, and not kept
  assert ours["temp"] <= floor["temp"] < grouped["temp"]
  assert "not run: these are no times" in finished.printed


def test_a_token_meets_no_more_experts_than_there_are(bench, capsys):
  with pytest.raises(SystemExit):
    bench.experts.main(["--quiet", "--experts=4", "--top=5"])
  assert "--top 5: there are 4 experts" in capsys.readouterr().err


def test_a_step_of_experts_on_this_host(bench, tmp_path, monkeypatch):
  monkeypatch.setattr(bench.harness, "calls_per_turn", bench_scripts.one_call)
  finished = bench_scripts.finish(bench.experts.main, SPARSE, tmp_path)
  rows = finished.results["rows"]
  assert rows[bench.experts.OURS]["temp"] < 1.1 * rows[bench.experts.FLOOR]["temp"]
  assert rows[bench.experts.OURS]["temp"] < 0.9 * rows[bench.experts.GROUPED]["temp"]
  assert rows[bench.experts.OURS]["flops"] <= rows[bench.experts.GROUPED]["flops"]
  assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
  assert "A/A control" in finished.printed
  assert bench.experts.tables(finished.results).count("\n| jaxlora") == 2


def test_a_gpu_that_is_not_here(bench, tmp_path):
  needs(bench, "h100")
  finished = run(bench, tmp_path, "--chip=h100", "--mixed", "--layers=1", "--only=jaxlora")
  rows = finished.results["rows"]
  assert rows["jaxlora"]["flops"] < rows["full fine-tuning"]["flops"]
  for row in rows.values():
    assert row["gemms"] > 0
    assert 0 < row["bytes_outside"] < row["bytes"]
    assert "cycles" not in row


def test_where_the_chip_is_here_its_steps_run(bench, tmp_path, monkeypatch):
  monkeypatch.setattr(bench.harness, "calls_per_turn", bench_scripts.one_call)
  monkeypatch.setattr(bench.compiled, "is_here", lambda device: True)
  monkeypatch.setattr(bench.compiled, "device_of", lambda chip: None)
  row = {"cycles": 3, "temp": 0, "flops": 2.0, "bytes": 1.0}
  monkeypatch.setattr(bench.compiled, "compile_for", lambda *_: None)
  monkeypatch.setattr(bench.compiled, "figures", lambda *_: dict(row))
  everybody = [one for one in bench.contestants.contestants() if one.name in ("frozen floor", "textbook merge")]
  monkeypatch.setattr(bench.compiled, "candidates", lambda *_: everybody)
  finished = bench_scripts.finish(bench.compiled.main, [*TINY, "--layers=1"], tmp_path)
  assert set(finished.results["run"]["seconds"]) == {"frozen floor", "textbook merge", "frozen floor (again)"}
  assert "run on this host's cpu, step / floor: frozen floor 1.00" in finished.printed
  assert finished.results["rows"]["textbook merge"]["over_floor"] == {
    **row,
    "cycles": 1,
    "temp": None,
    "flops": 1,
    "bytes": 1,
  }


@pytest.mark.parametrize(("limit", "begin"), [(0, 1), (0, 8), (1, 1), (5, 1), (100, 64), (100, 1024), (4096, 1)])
def test_the_largest_that_fits_is_found_to_a_sixteenth(bench, limit, begin):
  tried = []
  found = bench.ahead.largest(lambda k: tried.append(k) or k <= limit, begin, most=1024)
  expected = min(limit, 1024)
  assert found <= expected <= found + max(0, found // 16)
  assert len(tried) == len(set(tried)) <= 16


def test_what_fits_a_tpu_is_what_its_compiler_takes(bench):
  """Steps of a model that no host would hold: only shapes are made."""
  chip = needs(bench, "v5e:2x2")
  target = bench.compiled.Target(chip, bench.chips.device_of(chip))
  settings = bench.settings.Settings(16384, 1, 1, 128, 2, vocabulary=32, bf16=True)  # 6.4 GB of parameters
  floor, full, *_ = bench.contestants.contestants()
  assert bench.ahead.step_fits(target, floor, settings)
  assert not bench.ahead.step_fits(target, full, settings)


def test_fits_end_to_end(bench, tmp_path, monkeypatch):
  monkeypatch.setattr(bench.compiled, "device_of", lambda chip: jax.devices("cpu")[0])
  limits = {"frozen floor": 40, "full fine-tuning": 0}
  monkeypatch.setattr(bench.compiled, "step_fits", lambda _, one, at: at.batch <= limits.get(one.name, 33))
  finished = run(bench, tmp_path, "--fits", "--only=jaxlora", "--scan")
  rows = finished.results["rows"]
  assert rows["frozen floor"] == {"batch": 40, "tokens": 40 * 128}
  assert rows["full fine-tuning"]["batch"] == 0
  assert 31 <= rows["jaxlora"]["batch"] <= 33
  assert "B x 128 tokens" in finished.results["title"]


def test_fits_has_sizes_of_its_own(bench):
  _, args = bench.compiled.parse(["--fits", "--chip=h100"])
  parser = bench.compiled.make_parser()
  base = bench.settings.base_shapes(bench.settings.Settings.parse(parser, args))
  assert 0.9e9 < bench.contestants.all_parameters(base) < 1.1e9
  assert args.recorded.name == "compiled_fits_h100"
  assert {"compiled_fits_h100", "compiled_v5e"} <= set(bench.report.TABLES)


def test_mixed_is_bfloat16_on_float32_parameters(bench):
  settings = bench.settings.Settings(64, 1, 2, 8, 2, vocabulary=32, mixed=True)
  base = bench.settings.base_shapes(settings)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(base.params)} == {"float32"}
  for scan in (False, True):
    model = settings._replace(scan=scan).model()
    params = bench.settings.base_shapes(settings._replace(scan=scan)).params
    logits = jax.eval_shape(lambda params, x, model=model: model.apply({"params": params}, x), params, base.batch.x)
    assert logits.dtype.name == "bfloat16"


@pytest.mark.parametrize(
  "names", [("frozen floor", "jaxlora"), pytest.param((), marks=pytest.mark.nightly)], ids=["jaxlora", "all"]
)
def test_all_train_in_mixed_precision(bench, names):
  base = bench.settings.make_base(bench.settings.Settings(64, 1, 2, 8, 2, vocabulary=32, mixed=True))
  everybody = [one for one in bench.contestants.contestants() if not names or one.name in names]
  here, _ = bench.contestants.present(everybody, base.settings)
  assert here
  for name, entry in bench.steps.prepare(base, here, lambda _: None).items():
    assert name == "frozen floor" or entry.check["starts_at_base"]


@pytest.mark.parametrize(("chip", "extra"), [("v6e:2x2", "compilers"), ("h100", "compilers-gpu")])
def test_a_compiler_that_is_not_installed_is_an_error_that_says_what_to_install(
  bench, chip, extra, capsys, monkeypatch
):
  def missing(package):
    raise importlib.metadata.PackageNotFoundError(package)

  monkeypatch.setattr(importlib.metadata, "distribution", missing)
  with pytest.raises(SystemExit) as caught:
    bench.compiled.main([*TINY, f"--chip={chip}"])
  assert caught.value.code == 2
  assert f"pip install 'jaxlora[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--chip=v9"], "invalid choice: 'v9'"),
    (["--bf16", "--mixed"], "leave one of them out"),
    (["--only=lorax"], "no contestant begins with 'lorax'"),
    (["--quick", "--record"], "--record and --quick"),
  ],
)
def test_bad_arguments_end_with_a_message(bench, options, message, capsys):
  with pytest.raises(SystemExit):
    bench.compiled.main([*TINY, *options])
  assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", ["compiled", "compiled_forward"])
def test_help_has_an_example(bench, script, capsys):
  with pytest.raises(SystemExit):
    getattr(bench, script).main(["--help"])
  assert f"example: python benchmarks/{script}.py" in capsys.readouterr().out


@pytest.mark.parametrize("chip", ["v5e:2x2", "h100"])
def test_forward_passes_for_a_chip_that_is_not_here(bench, chip, tmp_path):
  """All ways of all three pieces of work; the plot, the JSON and the tables name them."""
  needs(bench, chip)
  options = [
    *TINY[:-3],
    "--vocabulary=32",
    "--quiet",
    "--layers=1",
    "--rank=2",
    "--bank=4",
    "--rows=2",
    f"--chip={chip}",
  ]
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Some donated buffers")
    finished = bench_scripts.finish(bench.compiled_forward.main, [*options, "--bf16"], tmp_path)
  assert json.loads((tmp_path / "compiled_forward.json").read_text()) == finished.results
  assert (tmp_path / "compiled_forward.png").read_bytes().startswith(b"\x89PNG")
  assert [one["what"] for one in finished.results["comparisons"]] == ["forward", "decode", "bank"]
  table = bench.compiled_forward.tables(finished.results)
  for one in finished.results["comparisons"]:
    assert len(one["rows"]) >= 4
    assert one["rows"]["base"]["over_base"]["operands"] == 1
    assert all(f"| {name} |" in table for name in one["rows"])
  assert "compiled, not run" in table
