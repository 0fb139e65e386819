"""examples/dpo.py from end to end on a tiny model and tiny data; what is interrupted goes on bit for bit."""

import json

import numpy as np
import pytest

from tests.helpers import bench_scripts, tiny_llm

for package in ("matplotlib", "rouge_score", "sklearn", "tokenizers", "tqdm"):
  pytest.importorskip(package, reason="the study needs jaxlora[llm]")

TINY = ["--vocabulary=300", "--width=16", "--depth=1", "--pretrain-steps=2", "--steps=6", "--batch=4", "--rank=2"]
TINY += ["--seeds=1", "--small-rates=1e-3", "--rate=1e-2", "--quiet"]
PARTS = ("pairs", "training", "tables")


@pytest.mark.nightly
def test_it_prefers_and_goes_on_where_it_stood(tmp_path, monkeypatch):
  tiny_llm.write_data(tmp_path)
  args = [*TINY, f"--data={tmp_path}", f"--cache={tmp_path / 'cache'}"]
  with bench_scripts.modules("dpo", *(f"studies.preferences.{part}" for part in PARTS)) as bench:
    monkeypatch.setattr(bench.training, "EVERY", 2)
    done = bench_scripts.finish(bench.dpo.main, args, tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "dpo.json").read_text()) == done.results
    assert (tmp_path / "whole" / "dpo.png").read_bytes().startswith(b"\x89PNG")
    used = done.results["memory"]
    assert used["arguments"] == used["base"] + used["rest"]
    (run,) = done.results["runs"]
    assert run["margin"][0] == 0  # at first, policy and reference are one to the bit
    assert run["loss"][0] == pytest.approx(np.log(2))
    assert run["train"]["margin"] > 0

    update, taken = bench.training.make_steps(bench.dpo.Decoder(300, 16, 1, 4, 128), 0.1).update, []
    assert update._cache_size() == 1  # all runs share one program

    def stop(model, base, rows, settings, folder, digest, tick):
      def counted(count):
        taken.append(count)
        if len(taken) == 5:  # behind the start and four steps, of which two checkpoints were kept
          raise KeyboardInterrupt

      return train(model, base, rows, settings, folder, digest, counted)

    train = bench.training.train
    monkeypatch.setattr(bench.training, "train", stop)
    with pytest.raises(SystemExit):
      bench_scripts.finish(bench.dpo.main, args, tmp_path / "stopped")
    monkeypatch.setattr(bench.training, "train", train)
    again = bench_scripts.finish(bench.dpo.main, args, tmp_path / "stopped")
    assert [again.results[part] for part in ("runs", "starts")] == [done.results[part] for part in ("runs", "starts")]


def test_the_best_sentence_is_chosen_and_the_worst_rejected(tmp_path):
  tiny_llm.write_data(tmp_path)
  with bench_scripts.modules("studies.preferences.pairs") as bench:
    data = bench.pairs.load(300, tmp_path)
    text = lambda row: data.tokenizer.decode(row[bench.pairs.PROMPT :].tolist()).strip()
    chosen, rejected = data.train.tokens[1]  # of the second question, which people answer by "it ends"
    assert (text(chosen), text(rejected)) == ("it ends .", "a paper of 0 .")
    assert data.train.tokens.shape[0] == 12  # the third question's sentences are equally far from "they win"
    np.testing.assert_array_equal(chosen[: bench.pairs.PROMPT], rejected[: bench.pairs.PROMPT])
