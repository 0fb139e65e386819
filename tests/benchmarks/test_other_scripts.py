"""Benchmarks that need a chip's compiler or torch: options, bookkeeping and tables, where neither is.

With the compiler they run in `test_compiled.py`, with torch in `test_beside_peft.py`.
"""

import argparse
import json

import jax
import pytest

from tests.helpers import bench_scripts

for package in ("matplotlib", "tqdm"):
  pytest.importorskip(package, reason="benchmarks need jaxlora[bench]")

# Packages whose versions the tables of compiled figures name, whether or not they are installed here.
NAMED = dict.fromkeys(("jax", "flax", "qwix", "libtpu"), "1.2.3")
SCRIPTS = ("compiled_suite", "seven_billion", "quantized_torch", "decoding", "head_loss")


@pytest.fixture(scope="module")
def bench():
  with bench_scripts.modules(*SCRIPTS, "chips", "harness", "settings", "quantized") as found:
    yield found


def finish(bench, out, name, *options):
  """A run, and what every one owes: a JSON that says what was returned, a plot, and its table in Markdown."""
  script = getattr(bench, name)
  finished = bench_scripts.finish(script.main, ["--quiet", *options], out)
  assert json.loads((out / f"{name}.json").read_text()) == finished.results
  assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  return finished


@pytest.mark.parametrize(
  ("script", "options", "message"),
  [
    ("compiled_suite", ["--chips=v9"], "'v9' begins no chip; there are: v5e:2x2, v5p:2x2x1, v6e:2x2"),
    ("compiled_suite", ["--only=qwix,lora"], "no contestant 'lora'; there are: full fine-tuning, qwix"),
    ("seven_billion", ["--d=100", "--heads=32"], "--d 100 is no multiple of --heads 32"),
    ("seven_billion", ["--chip=v9"], "invalid choice: 'v9'"),
    ("quantized_torch", ["--threads=0"], "'0' is not a whole number above 0"),
    ("decoding", ["--d=100"], "d must be a multiple of that"),
  ],
)
def test_bad_arguments_end_with_a_message(bench, script, options, message, capsys):
  with pytest.raises(SystemExit):
    getattr(bench, script).main(["--quiet", *options])
  assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_an_example(bench, script, capsys):
  with pytest.raises(SystemExit):
    getattr(bench, script).main(["--help"])
  assert f"example: python benchmarks/{script}.py" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["compiled_suite", "seven_billion", "decoding"])
def test_without_the_compiler_it_says_what_to_install(bench, script, capsys, monkeypatch, tmp_path):
  def missing(chip):
    raise bench.chips.NoCompilerError(f"the compiler for {chip.name} is missing: pip install it")

  monkeypatch.setattr(getattr(bench, script), "device_of", missing)
  options = ["--chip=v5e:2x2"] if script == "decoding" else []
  with pytest.raises(SystemExit) as caught:
    getattr(bench, script).main(["--quiet", f"--out={tmp_path}", *options])
  assert caught.value.code == 2
  assert "the compiler for v5e:2x2 is missing: pip install it" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# compiled_suite.py


def test_the_suite_goes_on_where_it_was(bench, tmp_path, monkeypatch):
  suite, compiled = bench.compiled_suite, []

  def figures_of(target, row, name):
    compiled.append((target.chip.name, row.name, name))
    return None if name == "qwix" and "remat" in row.name else {"cycles": 2e6 + len(name) * 1e6, "temp": 4 + len(name)}

  monkeypatch.setattr(suite, "device_of", lambda chip: None)
  monkeypatch.setattr(suite, "figures_of", figures_of)
  options = ["--chips=v5p,v6e", "--only=qwix,jaxlora"]
  finished = finish(bench, tmp_path, "compiled_suite", *options)
  assert len(compiled) == len(set(compiled)) == 2 * 3 * 3  # chips, settings, contestants beside the floor
  lines = [line.split("  ") for line in finished.printed.splitlines()]
  rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
  # Cycles and then bytes over the floor's, whose name has 12 letters; what is not supported is left out.
  assert ["v5p", "2 layers", "14.00 M", "0.429", "0.643", "0.500", "0.688"] in rows
  assert ["v6e", "4 layers, scanned, remat", "14.00 M", "-", "0.643", "-", "0.688"] in rows
  written = suite.tables({**finished.results, "versions": NAMED})
  assert written.count("\n| v5p | ") == written.count("\n| v6e | ") == 3
  assert written.startswith("Compiled, not run")
  assert "qwix 1.2.3" in written

  assert finish(bench, tmp_path, "compiled_suite", *options).results["rows"] == finished.results["rows"]
  assert len(compiled) == 18
  finish(bench, tmp_path, "compiled_suite", "--chips=v6e", "--only=jaxlora", "--fresh")
  assert len(compiled) == 18 + 3 * 2


def test_the_settings_of_the_suite_are_those_that_its_title_says(bench):
  suite = bench.compiled_suite
  assert all(row in suite.SETTINGS for rows in suite.ROWS.values() for row in rows)
  for row in suite.SETTINGS:
    settings = suite.settings_of(row)
    title = settings.title()
    assert f"{settings.layers} layers" in row.name
    assert all((mark in title) == (mark in row.name) for mark in ("scanned", "remat", "bf16 on float32"))
    assert settings.rank == (int(row.name.split("rank ")[1].split(",")[0]) if "rank" in row.name else 8)
    assert settings.width == (2048 if "d=2048" in row.name else 1024)
    assert (settings.batch, settings.seq) == (8, 512)


def test_a_contestant_that_cannot_is_not_compiled(bench, monkeypatch):
  monkeypatch.setattr(bench.harness, "installed", lambda package: False)
  monkeypatch.setattr(bench.compiled_suite, "compile_for", None)
  assert bench.compiled_suite.figures_of(None, bench.compiled_suite.SETTINGS[0], "qwix") is None


# ----------------------------------------------------------------------------------------------------------------------
# seven_billion.py


def test_the_model_of_seven_billion_is_llamas(bench):
  script = bench.seven_billion
  sizes = script.Sizes(layers=32, width=4096, heads=32, hidden=11008, vocabulary=32000, matrices=True)
  base = script.base_of(sizes, bench.settings.Settings(4096, 32, 1, 2048, 16))
  leaves = jax.tree.leaves(base.params)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  assert sum(leaf.size for leaf in leaves) == 6_738_415_616  # as published
  assert base.batch.x.shape == (1, 2048)


def test_what_does_not_fit_is_told_from_what_fails(bench, monkeypatch):
  script = bench.seven_billion

  def refused(text):
    def compile_for(*_):
      raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(script, "compile_for", compile_for)
    return script.verdict(None, None, None)

  found = refused("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 25.11G of 15.75G hbm.")
  assert (found["fits"], found["needs"]) == (False, 25.11)
  assert refused("RESOURCE_EXHAUSTED: Program (18.5G) exceeds the limit")["needs"] == 18.5
  assert refused("RESOURCE_EXHAUSTED: too much")["needs"] is None
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    refused("INTERNAL: a failure")


def test_seven_billion_end_to_end(bench, tmp_path, monkeypatch):
  script, gib = bench.seven_billion, bench.seven_billion.GIB

  def verdict(target, one, base):
    if one.name == "full fine-tuning":
      return {"fits": False, "needs": 25.11, "said": "RESOURCE_EXHAUSTED"}
    if base.settings.batch > 5:
      return {"fits": False, "needs": None, "said": "RESOURCE_EXHAUSTED"}
    return {"fits": True, "bytes": {"argument": 8 * gib, "temp": 3 * gib, "output": 8 * gib, "alias": 7 * gib}}

  monkeypatch.setattr(script, "device_of", lambda chip: None)
  monkeypatch.setattr(script, "verdict", verdict)
  base = script.base_of(script.Sizes(2, 256, 2, 512, 512, True), bench.settings.Settings())
  monkeypatch.setattr(script, "base_of", lambda sizes, settings: base._replace(settings=settings))
  few = ["--quick", "--only=full|float base|nf4, double", "--largest"]
  finished = finish(bench, tmp_path, "seven_billion", *few)
  table = script.tables({**finished.results, "versions": NAMED})
  assert "| full fine-tuning | no | - | - | 25.11 G | 0 |" in table
  for name in ("float base", "nf4, double"):
    assert f"| {name} | yes | 8.00 G | 3.00 G | 12.00 G | 5 |" in table
  assert "v5e:2x2, compiled, not run" in finished.printed


# ----------------------------------------------------------------------------------------------------------------------
# quantized_torch.py


def test_torch_that_is_not_installed_is_named(bench, monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(bench.harness, "installed", lambda package: package != "bitsandbytes")
  with pytest.raises(SystemExit) as caught:
    bench.quantized_torch.main([f"--out={tmp_path}"])
  assert caught.value.code == 2
  assert "pip install 'jaxlora[peers]' bitsandbytes" in capsys.readouterr().err


def test_the_table_of_torch(bench, tmp_path):
  script, harness = bench.quantized_torch, bench.harness
  seconds = {script.FLOATS: [0.1, 0.1, 0.1], "nf4": [0.11, 0.12, 0.13], "nf4, double": [0.12] * 3, "int8": [0.2] * 3}
  seconds |= {script.FLOATS + harness.CONTROL: [0.1, 0.1, 0.1]}
  settings = argparse.Namespace(d=64, layers=1, batch=2, seq=8, rank=2)
  results = {
    **harness.provenance(settings),
    "torch": {"torch": "2", "peft": "0.21", "bitsandbytes": "0.50", "threads": 2},
    "seconds": {name: harness.summarize(values) for name, values in seconds.items()},
    "over_floats": harness.ratios(seconds, script.FLOATS),
  }
  table = script.tables(results)
  assert "d=64, 1 layers, 2 x 8 tokens, rank 2" in table
  assert "2 threads, torch 2, peft 0.21, bitsandbytes 0.50." in table
  assert "| nf4 | 1.20 (1.10-1.30) | 120 ms |" in table
  assert "| int8 | 2.00 | 200 ms |" in table
  script.plot(results, tmp_path / "plot.png")
  assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------------------------------
# decoding.py


def test_every_way_of_decoding_gives_the_books_values(bench):
  decoding = bench.decoding
  for name, way in decoding.WAYS.items():
    assert decoding.largest_error(way) <= (1e-4 if name == "polynomial" else 0), name


def test_a_way_is_every_platforms_for_as_long_as_something_is_built(bench, monkeypatch):
  decoding = bench.decoding
  monkeypatch.setattr(decoding.jax, "clear_caches", lambda: None)  # what the other tests have compiled
  before, way = dict(decoding.policy.PLATFORMS), decoding.by_polynomial
  held = decoding.with_way(way, lambda: [one.look_up for one in decoding.policy.PLATFORMS.values()])
  assert all(one is way for one in held)
  assert before == decoding.policy.PLATFORMS
  with pytest.raises(ZeroDivisionError):
    decoding.with_way(way, lambda: 1 / 0)
  assert before == decoding.policy.PLATFORMS


def test_decoding_of_a_token(bench, tmp_path, monkeypatch):
  decoding = bench.decoding
  monkeypatch.setattr(decoding, "WAYS", {name: decoding.WAYS[name] for name in ("index", "polynomial")})
  monkeypatch.setattr(bench.harness, "calls_per_turn", bench_scripts.one_call)
  finished = finish(bench, tmp_path, "decoding", "--d=64", "--layers=1", "--rounds=1")
  rows = finished.results["rows"]
  assert list(rows) == ["float base", "index", "polynomial"]
  assert rows["float base"]["over_floats"]["median"] == 1
  assert finished.results["errors"]["index"] == 0 < finished.results["errors"]["polynomial"]
  table = decoding.tables(finished.results)
  assert "one token and a weight of 256 x 64" in table
  assert "A/A control" in table
  assert all(f"\n| {name} | " in table for name in rows)


def test_losses_of_a_large_head(bench, tmp_path, monkeypatch):
  monkeypatch.setattr(bench.harness, "calls_per_turn", bench_scripts.one_call)
  finished = finish(bench, tmp_path, "head_loss", "--quick", "--rounds=1", "--seq=256")
  rows = finished.results["rows"]
  for head in bench.head_loss.HEADS:
    plain, chunked = (rows[f"{head}, {loss}"] for loss in ("plain", "chunked"))
    assert plain["over_plain"]["median"] == 1
    assert chunked["temp"] < plain["temp"]
  table = bench.head_loss.tables(finished.results)
  assert ("2 x 256 tokens, 2,048 words" in table, "A/A control" in table) == (True, True)
  assert all(f"\n| {name} | " in table for name in rows)


def test_the_table_of_a_chip_has_cycles_and_no_times(bench):
  decoding = bench.decoding
  results = {
    "title": "A training step",
    "chip": "v5e:2x2",
    "rows": {"index": {"cycles": 1.05, "temp": 1.0}, "polynomial": {"temp": 2.0}},
    "errors": {"index": 0.0, "polynomial": 2.4e-5},
  }
  assert decoding.cells(results)[1:] == [("index", "1.050", "1.000", "0"), ("polynomial", "-", "2.000", "2e-05")]
  assert "Compiled for v5e:2x2, not run: these are no times." in decoding.describe(results)
