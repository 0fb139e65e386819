"""The benchmarks of speed from end to end on a tiny model: the same path through the code, and exact figures."""

import json

import jax
import numpy as np
import pytest

from tests.helpers import bench_scripts
from tests.helpers.bench_scripts import Finished

for package in ("matplotlib", "tqdm"):
  pytest.importorskip(package, reason="benchmarks need jaxlora[bench]")

SCRIPTS = ("train_step", "forward", "memory", "compile_time", "serving", "variants", "quantized")
MODULES = (
  *SCRIPTS,
  "harness",
  "quantized_peers",
  "contestants",
  "settings",
  "steps",
  "peers",
  "serving_ways",
  "models",
  "models_nnx",
  "peft_torch",
  "peft_serving",
  "digits",
  "methods",
)
TINY = ["--d=64", "--batch=2", "--seq=8", "--rank=2", "--vocabulary=32", "--rounds=2", "--quiet"]
OURS = ["jaxlora", "jaxlora, TrainState"]
HERE = ["frozen floor", "full fine-tuning", "textbook merge", "nnx.LoRA", *OURS]


@pytest.fixture(scope="module")
def bench():
  with bench_scripts.modules(*MODULES) as found:
    yield found


@pytest.fixture
def run(bench, tmp_path, monkeypatch):
  """Runs a script, and holds what all of them owe: a table, a JSON that says what was returned, and a plot."""
  monkeypatch.setattr(bench.harness, "calls_per_turn", bench_scripts.one_call)

  def of(name: str, *options: str) -> Finished:
    finished = bench_scripts.finish(getattr(bench, name).main, [*TINY, *options], tmp_path)
    assert json.loads((tmp_path / f"{name}.json").read_text()) == finished.results
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {"settings", "versions", "hardware"} <= set(finished.results)
    return finished

  return of


def check_rows(finished: Finished, names: list[str]) -> None:
  """The table has a line for everybody."""
  for name in names:
    assert any(line.startswith(f"{name}  ") for line in finished.printed.splitlines()), name


def test_train_step(bench, run):
  finished = run("train_step", "--layers=1", "--only=textbook,nnx,jaxlora")
  check_rows(finished, HERE)
  comparison = finished.results["comparisons"][0]
  rows = comparison["rows"]
  assert list(rows) == HERE
  for name in OURS:
    assert rows[name]["flops"] < rows["full fine-tuning"]["flops"]
    assert rows[name]["check"]["base_unchanged"] is True
    assert rows[name]["check"]["losses"][-1] < rows[name]["check"]["losses"][0]
  assert rows["frozen floor"]["over_floor"]["rounds"] == [1.0, 1.0]
  assert rows["jaxlora"]["check"]["losses"] == pytest.approx(rows["jaxlora, TrainState"]["check"]["losses"], rel=1e-5)
  assert comparison["train_state_over_split"]["median"] > 0


def test_the_suite_covers_the_settings_of_the_claim(bench):
  first, *others = bench.train_step.suite(bench.settings.Settings())
  assert first == bench.settings.Settings()
  changes = [
    {field: value for field, value in one._asdict().items() if value != getattr(first, field)} for one in others
  ]
  assert changes == [{"rank": 32}, {"width": 256}, {"scan": True}, {"remat": True}, {"bf16": True}]


def test_forward(run):
  finished = run("forward", "--layers=1")
  for comparison in finished.results["comparisons"]:
    rows = comparison["rows"]
    check_rows(finished, list(rows))
    assert comparison["difference"] < 1e-4
    assert rows["jaxlora, merged"]["flops"] == rows["base"]["flops"] < rows["jaxlora, unmerged"]["flops"]


def test_memory(bench, run, monkeypatch):
  monkeypatch.setattr(bench.steps, "check_trains", lambda *_: {})  # test_train_step has it
  everybody = [
    one for one in bench.contestants.contestants() if one.name in ("frozen floor", "full fine-tuning", *OURS)
  ]
  monkeypatch.setattr(bench.contestants, "contestants", lambda: everybody)
  finished = run("memory", "--layers=1")
  rows = finished.results["rows"]
  check_rows(finished, list(rows))
  assert rows["frozen floor"]["temp_over_floor"] == 1
  for name in OURS:
    assert 0.95 < rows[name]["flops_over_needed"] < 1.1 < rows["full fine-tuning"]["flops_over_needed"]


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_compile_time(bench, run, monkeypatch, scan):
  """By default of a scanned model; at night of one that is not, whose layers are swept scanned, too."""
  everybody = [
    one for one in bench.contestants.contestants() if one.name in ("frozen floor", "full fine-tuning", "jaxlora")
  ]
  monkeypatch.setattr(bench.contestants, "contestants", lambda: everybody)
  monkeypatch.setattr(bench.compile_time, "SWEPT", ("jaxlora",))
  monkeypatch.setattr(jax, "clear_caches", lambda: None)  # what the other tests have compiled
  finished = run("compile_time", "--layers=1,2", "--rounds=1", *["--scan"] * scan)
  rows = finished.results["rows"]
  check_rows(finished, list(rows))
  for row in rows.values():
    assert sum(phase["median"] for phase in row["phases"].values()) <= row["seconds"]["median"] * (1 + 1e-6)
  for swept in (finished.results["layers"], *([] if scan else [finished.results["scanned"]])):
    assert list(swept["jaxlora"]["seconds"]) == ["1", "2"]
  assert (finished.results["scanned"] is None) == scan
  assert finished.results["calls"]["leaves"] > finished.results["calls"]["base_leaves"]


def test_variants(bench, run, tmp_path, monkeypatch):
  monkeypatch.setattr(bench.variants, "ViT", lambda: bench.digits.ViT(width=32, depth=1, mlp=64))
  short = [
    "--seeds=2",
    "--tuning-seeds=1",
    "--steps=2",
    "--pretrain-steps=2",
    "--rates=0.01",
    f"--cache={tmp_path / 'c'}",
  ]
  finished = run("variants", "--layers=1", "--variants=dora", *short)
  assert list(finished.results["cost"]["rows"]) == ["frozen floor", "lora", "dora"]
  check_rows(finished, ["frozen floor", "lora", "dora", "lora, LoRA+"])
  for row in finished.results["cost"]["rows"].values():
    assert row["check"] is None or row["check"]["base_unchanged"] is True
  assert finished.results["quality"]["lora"]["less_than_lora"]["mean"] == 0
  assert len(finished.results["quality"]["dora"]["seeds"]) == 2


def test_serving(run):
  finished = run("serving", "--layers=1", "--batch=4", "--bank=6", "--distinct=2", "--no-peft", "--no-ways")
  check_rows(finished, ["base", "jaxlora, mixed batch, 2", "a loop of merges, 2", "jaxlora, small bank, 2"])
  for comparison in finished.results["comparisons"]:
    assert comparison["difference"] < 1e-5
    assert comparison["throughput"]["base"]["rounds"] == [1.0, 1.0]
  assert [comparison["tokens"] for comparison in finished.results["comparisons"]] == [8, 1]
  assert finished.results["memory"]["bank_over_own"] == pytest.approx(1, abs=0.01)  # and who has which leaf


def test_the_ways_of_a_product_agree(bench, monkeypatch):
  monkeypatch.setattr(bench.harness, "calls_per_turn", bench_scripts.one_call)
  settings = bench.settings.Settings(width=64, batch=4, seq=8, rank=2)
  found = bench.serving_ways.ways_of(settings, 2, 3, 1, lambda _: None)  # raises where one differs
  assert set(found["throughput"]) == {"base", "gathered", "row by row", "wide", "ragged_dot"}
  assert found["chosen"] in found["throughput"]


def test_layers_late_and_early(bench):
  late_over_early = bench.compile_time.late_over_early
  assert late_over_early({k: {"median": 3 + 2 * k} for k in (2, 4, 8, 12)}) == pytest.approx(1)
  assert late_over_early({k: {"median": k * k} for k in (2, 4, 8, 12)}) == pytest.approx(20 / 6)


@pytest.mark.parametrize("options", [{}, {"scan": True}, {"bf16": True}])
def test_qwix_trains(bench, options):
  pytest.importorskip("qwix", reason="the peers need jaxlora[peers]")
  settings = bench.settings.Settings(64, 1, 2, 8, 2, vocabulary=32, **options)
  base = bench.settings.make_base(settings)
  here = [one for one in bench.contestants.contestants() if one.name == "qwix"]
  check = bench.steps.prepare(base, here, lambda _: None)["qwix"].check
  assert check["base_unchanged"] is True
  assert check["starts_at_base"]


def test_peft_in_a_process_of_its_own(bench):
  for peer in ("torch", "peft"):
    if not bench.harness.installed(peer):
      pytest.skip("the peers need jaxlora[peers]")
  settings = bench.settings.Settings(64, 1, 2, 8, 2, vocabulary=32)
  results = bench.peers.run_peft("peft_torch", settings, rounds=1)
  row = bench.train_step.peft_row(results)
  assert row["check"]["base_unchanged"]
  assert row["check"]["trainable_parameters"] == bench.contestants.factor_parameters(bench.settings.make_base(settings))
  assert results["over_floor"]["frozen floor"]["median"] == 1


def test_peft_serves_in_a_process_of_its_own(bench):
  for peer in ("torch", "peft"):
    if not bench.harness.installed(peer):
      pytest.skip("the peers need jaxlora[peers]")
  settings = bench.settings.Settings(64, 1, 4, 8, 2, vocabulary=32)
  comparison = {"distinct": [1, 2], "tokens": 8, "throughput": {}, "seconds": {}}
  results = {"comparisons": [comparison]}
  assert bench.serving.add_peft(results, settings, rounds=1) is None
  assert set(comparison["throughput"]) == {"PEFT (torch), 1", "PEFT (torch), 2"}
  assert results["peft"]["difference"] < 1e-4


def test_a_peer_that_is_not_installed_is_left_out_with_a_line(bench, monkeypatch):
  monkeypatch.setattr(bench.harness, "installed", lambda package: False)
  here, absent = bench.contestants.present(bench.contestants.contestants(), bench.settings.Settings())
  assert [one.name for one in here] == HERE
  assert len(absent) == 1
  assert "qwix is left out" in absent[0]
  assert "jaxlora[peers]" in absent[0]


def test_what_does_not_train_is_an_error(bench):
  contestants, steps = bench.contestants, bench.steps
  base = bench.settings.make_base(bench.settings.Settings(64, 1, 2, 8, 2, vocabulary=32))
  program = contestants.textbook(base)
  idle = program._replace(step=lambda state, frozen, batch: (state, program.step(state, frozen, batch)[1]))
  for broken, message in ((idle, "does not fall"), (program._replace(trained=lambda state: ()), "parameters that it")):
    with pytest.raises(RuntimeError, match=message):
      steps.check_trains(
        contestants.Contestant("broken", contestants.textbook, contestants.factor_parameters),
        steps.compile_step(broken, base),
        base,
      )


def test_a_program_over_itself_is_near_one(bench):
  x = np.ones((300, 300), np.float32)
  program = jax.jit(lambda x: x @ x @ x)
  runs = bench.harness.with_control({"program": lambda: program(x)}, "program", lambda: program(x))
  ticks: list[int] = []
  calls = bench.harness.calls_per_turn(runs)
  seconds = bench.harness.interleave(runs, 9, calls, ticks.append)
  assert 0.5 < bench.harness.ratios(seconds, "program")["program (again)"]["median"] < 2
  assert ticks == [calls] * 2 * 10
  assert [len(values) for values in seconds.values()] == [9, 9]


def test_a_slower_program_is_seen(bench):
  x = np.ones((400, 400), np.float32)
  once, often = (jax.jit(lambda x, n=n: jax.lax.fori_loop(0, n, lambda _, y: y @ x / 400, x)) for n in (1, 20))
  seconds = bench.harness.interleave({"once": lambda: once(x), "often": lambda: often(x)}, 5, 1, lambda _: None)
  assert bench.harness.ratios(seconds, "once")["often"]["median"] > 3


def test_the_cache_decodes_what_the_whole_sequence_gives(bench):
  model = bench.models.LanguageModel(32, 64, 2, 8)
  params = bench.models.init(model)
  tokens = np.random.default_rng(0).integers(0, 32, (2, 8), np.int32)
  decoder = model.clone(decode=True)
  step = jax.jit(lambda variables, token, k: decoder.apply(variables, token, start=k, mutable=["cache"]))
  cache, logits = bench.models.empty_cache(decoder, 2), []
  for k in range(8):
    out, variables = step({"params": params, "cache": cache}, tokens[:, k : k + 1], k)
    cache = variables["cache"]
    logits.append(out)
  np.testing.assert_allclose(np.concatenate(logits, 1), jax.jit(model.apply)({"params": params}, tokens), atol=1e-4)


@pytest.mark.parametrize(
  ("script", "option", "message"),
  [
    ("train_step", "--d=100", "d must be a multiple of that"),
    ("train_step", "--rank=65", "--rank 65 is larger"),
    ("train_step", "--only=lorax", "no contestant begins with 'lorax'"),
    ("forward", "--rounds=0", "'0' is not a whole number above 0"),
    ("memory", f"--out={__file__}", "is not a directory"),
    ("compile_time", "--layers=2,x", "'x' is not a whole number above 0"),
    ("peft_torch", "--alpha=nan", "'nan' is not a number above 0"),
  ],
)
def test_bad_arguments_end_with_a_message(bench, script, option, message, capsys):
  with pytest.raises(SystemExit):
    getattr(bench, script).main([*TINY, option])
  assert message in capsys.readouterr().err.splitlines()[-1]


def test_help_has_an_example(bench, capsys):
  for script in SCRIPTS:
    with pytest.raises(SystemExit):
      getattr(bench, script).main(["--help"])
    assert f"example: python benchmarks/{script}.py" in capsys.readouterr().out


@pytest.mark.nightly
def test_quantized(run):
  pytest.importorskip("qwix")
  finished = run("quantized", "--layers=1", "--only=int8, per|qwix, int8", "--rounds=1")
  rows = finished.results["rows"]
  check_rows(finished, list(rows))
  assert list(rows) == ["float base", "int8, per output", "qwix, int8"]
  assert 0.5 < rows["qwix, int8"]["kernel_error"] / rows["int8, per output"]["kernel_error"] < 2
  assert rows["int8, per output"]["memory_over_floats"] < 1
  assert 0.005 < rows["int8, per output"]["kernel_error"] < 0.02
