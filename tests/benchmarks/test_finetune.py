"""examples/finetune.py from end to end: a smaller model and fewer steps, the same path through the code."""

import json
from typing import Any

from flax import serialization
import jax
import numpy as np
import pytest

from tests.helpers import bench_scripts
from tests.helpers.bench_scripts import Finished

for package in ("sklearn", "matplotlib", "tqdm"):
  pytest.importorskip(package, reason="benchmarks need jaxlora[bench]")

CHANCE = 0.2


@pytest.fixture(scope="module")
def finetune():
  with bench_scripts.modules("finetune") as bench, pytest.MonkeyPatch.context() as patch:
    patch.setitem(bench.finetune.MODELS, "vit", lambda: bench.finetune.digits.ViT(width=32, depth=1, mlp=64))
    yield bench.finetune


@pytest.fixture(scope="module")
def finished(finetune, tmp_path_factory) -> Finished:
  folder = tmp_path_factory.mktemp("finetune")
  args = ["--rank=4", "--seeds=2", "--steps=60", "--pretrain-steps=60", "--rounds=2", "--quiet"]
  return bench_scripts.finish(finetune.main, [*args, f"--cache={folder / 'cache'}"], folder / "out")


METHODS = ["head alone", "LoRA r=4", "full fine-tuning"]


def test_it_leaves_a_table_json_and_a_plot(finished):
  for name in METHODS:
    assert sum(line.startswith(name) for line in finished.printed.splitlines()) == 1
  assert json.loads((finished.out / "finetune.json").read_text()) == finished.results
  assert (finished.out / "finetune.png").read_bytes().startswith(b"\x89PNG")


def test_lora_learns_and_comes_off_without_a_trace(finished):
  _, lora, full = finished.results["methods"]
  assert lora["new"]["mean"] > 2 * CHANCE
  assert lora["old_removed"] == {"mean": finished.results["pretrained"]["old"], "std": 0.0}
  assert full["old_removed"] is None


def test_costs_grow_with_what_trains(finished):
  rows = finished.results["methods"]
  assert [row["method"] for row in rows] == METHODS
  for field in ("trainable_parameters", "optimizer_bytes", "adapter_file_bytes"):
    costs = [row[field] for row in rows]
    assert costs == sorted(set(costs)), field
  assert rows[-1]["trainable_parameters"] == finished.results["pretrained"]["parameters"]
  assert rows[-1]["step_over_full"]["rounds"] == [1.0, 1.0]
  assert rows[0]["flops_per_step"] < rows[1]["flops_per_step"] < rows[-1]["flops_per_step"]


def test_the_file_holds_what_trained(finished):
  row = finished.results["methods"][1]
  file = finished.out / "adapters" / "LoRA-r=4-seed0.msgpack"
  arrays = serialization.msgpack_restore(file.read_bytes())
  assert file.stat().st_size == row["adapter_file_bytes"]
  assert sum(array.size for array in arrays.values()) == row["trainable_parameters"]
  assert {"head/kernel/value", "block_0/attention/query/kernel/a"} <= set(arrays)


def test_the_convolutional_network_adapts(finetune, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(finetune.MODELS, "conv", lambda: finetune.digits.ConvNet(width=8))
  monkeypatch.setattr(finetune, "__file__", str(tmp_path / "examples" / "finetune.py"))  # decides where results go
  args = ["--model=conv", "--rank=2", "--seeds=1", "--steps=40", "--pretrain-steps=40", "--rounds=1", "--quiet"]
  results = finetune.main([*args, f"--cache={tmp_path / 'cache'}"])
  out = tmp_path / "out" / "finetune_conv"
  assert json.loads((out / "finetune.json").read_text()) == results
  _, lora, full = results["methods"]
  assert lora["new"]["mean"] > 1.5 * CHANCE
  assert lora["old_removed"] == {"mean": results["pretrained"]["old"], "std": 0.0}
  assert lora["trainable_parameters"] < full["trainable_parameters"]
  arrays = serialization.msgpack_restore((out / "adapters" / "LoRA-r=2-seed0.msgpack").read_bytes())
  kernels = {name: array.shape for name, array in arrays.items() if name.startswith("block_1")}
  assert kernels == {
    "block_1/conv_in/kernel/a": (2, 3, 3, 8),
    "block_1/conv_in/kernel/b": (2, 16),
    "block_1/conv_out/kernel/a": (2, 3, 3, 16),
    "block_1/conv_out/kernel/b": (2, 16),
    "block_1/shortcut/kernel/a": (2, 1, 1, 8),
    "block_1/shortcut/kernel/b": (2, 16),
  }


def test_finished_runs_are_picked_up(finetune, finished, monkeypatch):
  again = []

  def run(program, setup, seed, tick):
    again.append((program.method.name, seed))
    return finished.results["methods"][1]["seeds"][seed]

  program = finetune.methods.Program
  monkeypatch.setattr(finetune.adapt_digits, "run", run)
  monkeypatch.setattr(finetune.adapt_digits, "compile_step", lambda method, _: program(method, None, None, 1.0, 1, 1))
  monkeypatch.setattr(
    finetune,
    "step_ratios",
    lambda programs, *_: finetune.harness.ratios({p.method.name: [1.0] for p in programs}, "full fine-tuning"),
  )
  results = finetune.main(finished.args)
  assert not again
  assert [row["seeds"] for row in results["methods"]] == [row["seeds"] for row in finished.results["methods"]]
  finetune.main([*finished.args, "--rank=2,4"])
  assert again == [("LoRA r=2", 0), ("LoRA r=2", 1)]
  finetune.main([*finished.args, "--lr-full=0.002", "--fresh"])
  assert len(again) == 2 + 6


def test_pretraining_is_kept_once_it_is_whole(finetune, tmp_path, monkeypatch):
  digits = finetune.digits
  monkeypatch.setattr(digits, "make_step", lambda *_: lambda params, opt_state, *_: (params, opt_state, 0.0))
  split = digits.load_task(0).train

  def pretrain(steps: int = 2) -> tuple[Any, str, list[int]]:
    ticks: list[int] = []
    params, name = digits.pretrain(digits.ViT(width=8, depth=1, mlp=8), split, steps, 4, tmp_path, ticks.append)
    return params, name, ticks

  params, name, ticks = pretrain()
  assert ticks == [1, 1]
  restored, _, ticks = pretrain()
  assert ticks == [2]
  assert jax.tree.all(jax.tree.map(np.array_equal, params, restored))
  (tmp_path / f"pretrained-{name}").rename(tmp_path / f"pretrained-{name}.orbax-checkpoint-tmp")  # an interrupted save
  assert pretrain()[2] == [1, 1]
  assert pretrain(steps=1)[1] != name


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--rank=0"], "'0' is not a whole number above 0"),
    (["--rank=4,eight"], "'eight' is not a whole number above 0"),
    (["--rank=33"], "rank 33 is larger"),
    (["--targets=nothing"], "'nothing' matches none"),
    (["--targets=("], "not a regular expression"),
    (["--targets=head/kernel"], "leaves nothing to adapt"),
    (["--lr-lora=nan"], "'nan' is not a number above 0"),
    ([f"--out={__file__}"], "is not a directory"),
    ([f"--out={__file__}/out"], f"--out: cannot write to {__file__}/out (Not a directory); name another directory"),
    (["--out={tmp}", f"--cache={__file__}/cache"], f"--cache: cannot write to {__file__}/cache"),
  ],
)
def test_bad_arguments_end_with_a_message(finetune, args, message, capsys, tmp_path, monkeypatch):
  monkeypatch.setattr(finetune.digits, "pretrain", lambda *_: pytest.fail("it began to work"))
  with pytest.raises(SystemExit) as caught:
    finetune.main([arg.format(tmp=tmp_path) for arg in args])
  assert caught.value.code == 2
  assert message in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(finetune, tmp_path, capsys, monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(finetune.digits, "pretrain", interrupted)
  with pytest.raises(SystemExit) as caught:
    finetune.main(["--quiet", f"--out={tmp_path}", f"--cache={tmp_path}"])
  assert caught.value.code == 130
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert line == (
    f"Interrupted. Finished runs are kept in {tmp_path / 'runs.json'}: the same command, without --fresh, goes on."
  )
