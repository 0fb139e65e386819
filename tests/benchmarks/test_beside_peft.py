"""What runs the real PEFT on torch: the language model's example, whose losses are the same, and a step on codes.

Needs torch, in a run of its own: `USE_TORCH=1 python -m pytest -n 0 tests/benchmarks/test_beside_peft.py`.
"""

import json
import os

import numpy as np
import pytest

if os.environ.get("USE_TORCH") != "1":
  pytest.skip("needs torch, in a run of its own: USE_TORCH=1", allow_module_level=True)
pytest.importorskip("torch", reason="PEFT is torch's")

from tests.helpers import bench_scripts, tiny_llm

tiny_llm.need_packages()


def test_the_losses_agree_and_what_is_done_is_not_done_again(tmp_path, capsys, monkeypatch):
  file, data = tiny_llm.write_gguf(tmp_path / "tiny.gguf"), tiny_llm.write_data(tmp_path)
  words = [f"--model={file}", f"--data={data}", f"--out={tmp_path / 'out'}", "--steps=6", "--rank=2", "--rate=0.05"]
  with tiny_llm.modules("beside_peft") as llm:
    found = llm.beside_peft.main([*words, "--threads=1"])
    assert found["agree"]
    assert found["losses_apart"] < 1e-4
    losses = found["runs"]["jaxlora"][0]["loss"]
    assert losses[-1] < losses[0] - 0.05  # there was something to agree on
    assert all(side["tokens"] > 0 and side["peak"] > 2**20 for side in found["sides"].values())
    printed = capsys.readouterr().out
    assert "PEFT" in printed
    (summary,) = (tmp_path / "out").glob("*/summary.json")
    assert json.loads(summary.read_text())["sides"] == found["sides"]
    monkeypatch.setattr(llm.beside_peft.subprocess, "run", None)
    assert llm.beside_peft.main([*words, "--threads=1"]) == found
    assert np.isfinite(losses).all()


def test_peft_trains_on_bitsandbytes_codes(tmp_path):
  pytest.importorskip("bitsandbytes", reason="PEFT's codes are bitsandbytes'")
  sizes = ["--d=64", "--layers=1", "--batch=2", "--seq=8", "--rank=2", "--vocabulary=32", "--rounds=1", "--threads=1"]
  with bench_scripts.modules("quantized_torch") as bench:
    script = bench.quantized_torch
    finished = bench_scripts.finish(script.main, [*sizes, "--quiet"], tmp_path)  # raises where one does not train
    assert json.loads((tmp_path / "quantized_torch.json").read_text()) == finished.results
    assert (tmp_path / "quantized_torch.png").read_bytes().startswith(b"\x89PNG")
    assert finished.results["over_floats"][script.FLOATS]["median"] == 1
    table = script.tables(finished.results)
    assert all(f"\n| {name} | " in table for name in script.FORMATS)
