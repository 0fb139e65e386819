"""examples/summarize.py from end to end on a tiny model, its decoding against a brute-force oracle, and its data."""

from collections.abc import Callable
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests.helpers import bench_scripts
from tests.helpers.bench_scripts import Finished

for package in ("matplotlib", "rouge_score", "sklearn", "tokenizers", "tqdm"):
  pytest.importorskip(package, reason="benchmarks need jaxlora[bench]")

PARTS = ("decoder", "decoding", "docstrings", "figures", "findings", "plots", "pretraining", "questions", "tables")
MODULES = ("summarize", *(f"studies.summaries.{part}" for part in (*PARTS, "tokens", "tuning")))
TINY = ["--packages=chex,flax,optax", "--vocabulary=300", "--width=16", "--depth=1", "--heads=2", "--quiet"]
TINY += ["--validation=20", "--test=8", "--beam=2", "--pretrain-steps=30", "--pretrain-batch=4", "--rounds=1"]
TINY += ["--rank=2", "--ranks=2", "--sweep-ranks=2", "--rates-lora=1e-2,3e-2", "--rates-full=1e-3,1e-2"]
TINY += ["--seeds=2", "--sweep-seeds=1", "--steps=12", "--batch-size=4"]


@pytest.fixture(scope="module")
def bench():
  with bench_scripts.modules(*MODULES) as found:
    yield found


# ----------------------------------------------------------------------------------------------------------------------
# Decoding.


class Peaked(NamedTuple):
  model: Any
  params: Any
  tree: Any
  apply: Any


@pytest.fixture(scope="module")
def peaked(bench):
  """A tiny model, and adapters on it that change what it writes."""
  model = bench.decoder.Decoder(vocabulary=5, width=16, depth=2, heads=2, positions=16)
  params = jax.tree.map(lambda leaf: 3 * leaf, bench.decoder.init(model, 0))
  frozen, trainable = bench.tuning.split(model, bench.tuning.Method(4), params, seed=0)
  trainable = jax.tree.map(
    lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), trainable
  )
  return Peaked(model, params, jaxlora.join(frozen, trainable), jaxlora.wrap(model.apply, on_materialize="error"))


PREFIX = np.array([[1, 1, 3, 2, 0], [4, 2, 3, 4, 0], [1, 1, 1, 1, 0], [1, 3, 3, 2, 0]], np.int32)


VALID = np.not_equal(PREFIX, 1)
LENGTH = 6


def log_probs_of(one: Peaked, params: Any) -> Callable[..., np.ndarray]:
  """Of the token after prefix + written, with no cache, and no padding before it."""
  apply = jax.jit(lambda params, tokens: one.apply({"params": params}, tokens, jnp.ones_like(tokens, bool))[0])

  def log_probs(prefix: np.ndarray, written: tuple[int, ...]) -> np.ndarray:
    text = [*prefix[np.not_equal(prefix, 1)], *written]
    tokens = np.zeros((1, PREFIX.shape[1] + LENGTH), np.int32)  # what comes later is not seen
    tokens[0, : len(text)] = text
    logits = np.asarray(apply(params, tokens)[0, len(text) - 1], np.float64)
    return logits - np.log(np.exp(logits).sum())

  return log_probs


@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_beside_a_cache_is_argmax_without_one(bench, peaked, adapted):
  end, pad = bench.decoder.END, bench.decoder.PAD
  params = peaked.tree if adapted else peaked.params
  log_probs_after = log_probs_of(peaked, params)
  found = bench.decoding.decode(peaked.model, peaked.apply, params, PREFIX, VALID, LENGTH)
  for prefix, tokens in zip(PREFIX, np.asarray(found), strict=True):
    written: tuple[int, ...] = ()
    while len(written) < LENGTH and end not in written:
      log_probs = log_probs_after(prefix, written)
      log_probs[pad] = -np.inf
      written += (int(log_probs.argmax()),)
    assert tokens.tolist() == [*written, *[pad] * (LENGTH - len(written))]
  other = bench.decoding.decode(peaked.model, peaked.apply, peaked.params, PREFIX, VALID, LENGTH)
  assert np.array_equal(found, other) is not adapted  # the adapters are seen


def test_merged_decodes_what_adapted_does(bench, peaked):
  args = (PREFIX, VALID, LENGTH)
  adapted = bench.decoding.decode(peaked.model, peaked.apply, peaked.tree, *args)
  merged = bench.decoding.decode(peaked.model, peaked.model.apply, jaxlora.merge(peaked.tree), *args)
  assert np.array_equal(adapted, merged)


def test_a_wide_beam_finds_the_best_of_all_sequences(bench, peaked):
  end, pad, length = bench.decoder.END, bench.decoder.PAD, 3
  tokens = [k for k in range(5) if k != pad]
  everything = {
    sequence[: sequence.index(end) + 1] if end in sequence else sequence
    for sequence in itertools.product(tokens, repeat=length)
  }
  found = bench.decoding.decode(peaked.model, peaked.apply, peaked.tree, PREFIX, VALID, length, 40)
  log_probs_after = log_probs_of(peaked, peaked.tree)
  for prefix, best in zip(PREFIX, np.asarray(found), strict=True):
    log_probs = {
      written: log_probs_after(prefix, written)
      for written in {sequence[:k] for sequence in everything for k in range(len(sequence))}
    }
    mean = {
      sequence: np.mean([log_probs[sequence[:k]][token] for k, token in enumerate(sequence)]) for sequence in everything
    }
    assert mean[tuple(token for token in best.tolist() if token != pad)] == pytest.approx(max(mean.values()), abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Data.


BODY = "It goes over every leaf of the tree, and calls the function with it.\n\nArgs:\n  tree:   any tree.\n------"


@pytest.mark.parametrize(
  ("text", "found"),
  [
    (f"Maps a tree.\n\n{BODY}", "Maps a tree."),
    (f"Maps a tree\nof leaves.\n\n{BODY}", None),
    ("Maps a tree of leaves.", None),
    ("Maps a tree.\n\nToo short.", None),
    (f":param tree: a tree\n\n{BODY}", None),
    (f"{'Maps a tree ' * 20}\n\n{BODY}", None),
  ],
)
def test_a_pair_is_a_summary_line_and_a_body(bench, text, found):
  pair = bench.docstrings.as_pair("package", text)
  assert (pair and pair.summary) == found
  if pair:
    assert pair.body.endswith("Args:\ntree: any tree.")


def test_a_file_gives_its_docstrings(bench, tmp_path):
  path = tmp_path / "module.py"
  path.write_text('"""One."""\nclass A:\n  """Two."""\n  if x:\n    async def f():\n      """Three."""\n  y = "Four"\n')
  assert list(bench.docstrings.docstrings(path)) == ["One.", "Two.", "Three."]
  path.write_text("no Python")
  assert list(bench.docstrings.docstrings(path)) == []


def test_what_has_been_read_is_not_tested_on(bench):
  docstrings = bench.docstrings
  body = " ".join(f"word{k}" for k in range(40))
  other = " ".join(f"other{k}" for k in range(40))
  read = [docstrings.Pair("a", body, "Maps a tree.")]
  pairs = [
    docstrings.Pair("b", other, "maps a  TREE"),
    docstrings.Pair("b", f"{body} and more", "Another summary here."),
    docstrings.Pair("b", f"{other} {body[:70]}", "Only a part is copied."),
  ]
  dropped = docstrings.Counter()
  assert docstrings.unseen(pairs, read, dropped) == pairs[2:]
  assert dropped == {"summary known from another split": 1, "body copied from another split": 1}
  repeats = [docstrings.Pair("a", f"Here: maps a tree. {body}", "Maps a tree."), *pairs[1:], pairs[2]]
  assert docstrings.without_repeats(repeats, docstrings.Counter()) == pairs[1:]


def test_splits_share_no_package(bench, finished):
  packages = finished.results["data"]["packages"]
  assert {name: one["split"] for name, one in packages.items()} == {
    "chex": "train",
    "flax": "validation",
    "optax": "test",
  }
  assert all(one["pairs"] > 10 for one in packages.values())
  with pytest.raises(ValueError, match=r"no docstring to be found for the test split; expected packages among .*optax"):
    bench.docstrings.collect(["chex", "flax"])


def test_rows_and_text_are_the_same(bench):
  docstrings, data = bench.docstrings, bench.tokens
  pairs = [docstrings.Pair("a", "short body", "A summary — of it."), docstrings.Pair("a", "long " * 200, "word " * 60)]
  tokenizer = data.train_tokenizer([pair.body for pair in pairs], 300)
  rows = data.as_rows(tokenizer, pairs)
  start = data.PREFIX
  assert (rows.tokens[:, start - 1] == bench.decoder.END).all()
  assert np.array_equal(rows.valid[:, :start], rows.tokens[:, :start] != bench.decoder.PAD)
  assert rows.valid[:, start:].all()
  assert tokenizer.decode(rows.tokens[0, : start - 1][rows.valid[0, : start - 1]].tolist()) == "short body"
  assert tokenizer.decode(rows.tokens[0, start:].tolist()) == "A summary — of it."
  assert rows.tokens[1, -1] == bench.decoder.END
  assert tokenizer.get_vocab()["<end>"] == bench.decoder.END


# ----------------------------------------------------------------------------------------------------------------------
# Numbers.


def test_the_interval_is_students(bench):
  assert bench.figures.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == {
    "mean": 3,
    "half": pytest.approx(1.9632, abs=1e-4),
    "count": 5,
  }
  assert bench.figures.interval([2.0]) == {"mean": 2, "half": None, "count": 1}
  assert bench.figures.interval([2.0, None]) is None


def test_the_best_rate_is_read_off_the_curve(bench):
  rates = [10.0**k for k in range(-4, 1)]
  losses = [(np.log10(rate) + 1.7) ** 2 for rate in rates]
  assert bench.figures.vertex(rates, losses) == pytest.approx(10**-1.7)
  assert bench.figures.vertex(rates, losses[::-1]) == pytest.approx(10**-2.3)
  assert bench.figures.vertex(rates, [1, 2, 3, 4, 5]) is None
  assert bench.figures.vertex(rates, [3, 2, 1, float("inf"), float("inf")]) is None


# ----------------------------------------------------------------------------------------------------------------------
# The whole.


@pytest.fixture(scope="module")
def finished(bench, tmp_path_factory) -> Finished:
  folder = tmp_path_factory.mktemp("summarize")
  return bench_scripts.finish(bench.summarize.main, [*TINY, f"--cache={folder / 'cache'}"], folder / "out")


def test_it_leaves_tables_json_and_plots(bench, finished):
  kept = json.loads((finished.out / "summarize.json").read_text())
  assert kept == finished.results
  assert bench.tables.tables(kept) == finished.printed.rstrip("\n")
  for name in ("base, not adapted", "LoRA r=2", "full fine-tuning", "attention", "MLP"):
    assert f"| {name} |" in finished.printed
  for name in ("rouge", "rank", "learning_rate", "forgetting"):
    assert (finished.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_sentences_follow_the_numbers(bench, finished):
  results = json.loads(json.dumps(finished.results))
  results["base"]["rougeL"] = 10.0
  for row, score in zip(results["main"], (12.0, 14.0), strict=True):
    row["figures"]["rougeL"]["mean"] = score
  results["difference"]["rougeL"] = {"mean": -2.0, "half": 1.0, "count": 2}
  text = bench.findings.findings(results)
  assert "LoRA has 50 % of full fine-tuning's gain over the base in ROUGE-L" in text
  assert "ROUGE-L -2.0 ± 1.0 (apart)" in text
  assert "with the adapter taken off it is exactly the base's" in text
  results["difference"]["rougeL"]["half"] = 2.5
  assert "ROUGE-L -2.0 ± 2.5 (the interval holds zero)" in bench.findings.findings(results)
  for curve, rate in zip((*results["rates"]["lora"], results["rates"]["full"]), (0.02, 0.002), strict=True):
    curve["vertex"] = rate
  assert "10.0 at rank 2; between the ranks it moves 1.00-fold" in bench.findings.rate_findings(results)


def test_both_learn_and_lora_comes_off_without_a_trace(finished):
  base, (lora, full) = finished.results["base"], finished.results["main"]
  for row in (lora, full):
    assert [run["seed"] for run in row["seeds"]] == [0, 1]
    assert row["figures"]["validation_loss"]["mean"] < base["validation_loss"]
    assert set(finished.results["lead"]) < set(row["figures"])
  assert lora["figures"]["pretraining_loss_removed"]["mean"] == base["pretraining_loss"]
  assert lora["figures"]["pretraining_loss"]["mean"] != base["pretraining_loss"]
  assert "pretraining_loss_removed" not in full["figures"]


def test_placements_have_equal_parameters(finished):
  assert len({row["trainable_parameters"] for row in finished.results["placements"]}) == 1
  assert [row["rank"] for row in finished.results["placements"]] == [2, 4, 4]
  lora, full = finished.results["main"]
  assert full["trainable_parameters"] == finished.results["pretrained"]["parameters"]
  for field in ("trainable_parameters", "optimizer_bytes", "file_bytes", "flops_per_step"):
    assert lora[field] < full[field]


def test_finished_runs_are_picked_up(bench, finished, monkeypatch):
  again = []

  def run(one, *_):
    again.append(one)
    return {"seed": one.seed, "file_bytes": 1, "validation_loss": None, "pretraining_loss": None}

  monkeypatch.setattr(bench.tuning, "run", run)
  monkeypatch.setattr(bench.questions, "time_steps", lambda *_: finished.results["timing"])
  monkeypatch.setattr(bench.pretraining, "make_step", lambda *_: pytest.fail("it pretrained again"))
  monkeypatch.setattr(bench.questions.Bench, "program", lambda *_: bench.tuning.Program(None, 1, 1, 1, 1.0))
  results = bench.summarize.main(finished.args)
  assert not again
  assert [row["seeds"] for row in results["main"]] == [row["seeds"] for row in finished.results["main"]]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bench.plots, "plot", lambda *_: None)
    bench.summarize.main([*finished.args, "--rates-full=1e-3,1e-2,1"])
  assert [(one.method.rank, one.lr) for one in again] == [(None, 1.0)]
  assert "diverged" in bench.tables.rate_table(json.loads((finished.out / "summarize.json").read_text()))


def test_an_interrupted_pretraining_goes_on(bench, finished, tmp_path, monkeypatch):
  args = bench.summarize.make_parser().parse_args(TINY)
  data = bench.tokens.load(args.packages, 300, 20, 8, finished.out.with_name("cache"))
  model = bench.questions.make_model(args)
  monkeypatch.setattr(bench.pretraining, "KEEP", 2)
  ticks: list[int] = []

  def pretrain(cache: Path | None, tick: Any = ticks.append) -> Any:
    return bench.pretraining.pretrain(model, data, 4, 2, 1e-2, cache, tick)[0]

  def interrupt(done: int) -> None:
    if sum(ticks) == 3:
      raise KeyboardInterrupt
    ticks.append(done)

  with pytest.raises(KeyboardInterrupt):
    pretrain(tmp_path, interrupt)
  ticks.clear()
  resumed = pretrain(tmp_path)
  assert ticks == [2, 1, 1]
  assert jax.tree.all(jax.tree.map(np.array_equal, resumed, pretrain(None)))


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ("--rank=9", "--rank 9: the placements have twice that rank"),
    ("--ranks=17", "rank 17 is larger"),
    ("--heads=3", "--width 16 is no multiple of --heads 3"),
    ("--vocabulary=100", "no room for every byte"),
    ("--packages=nothing", "no docstring to be found for the train split"),
    ("--rates-lora=nan", "'nan' is not a number above 0"),
    (f"--out={__file__}", "is not a directory"),
  ],
)
def test_bad_arguments_end_with_a_message(bench, option, message, capsys, tmp_path):
  with pytest.raises(SystemExit) as caught:
    bench.summarize.main([*TINY, f"--out={tmp_path}", "--no-cache", option])
  assert caught.value.code == 2
  assert message in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(bench, finished, capsys, monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(bench.pretraining, "pretrain", interrupted)
  with pytest.raises(SystemExit) as caught:
    bench.summarize.main(finished.args)
  assert caught.value.code == 130
  assert f"Finished runs are kept in {finished.out / 'runs'}" in capsys.readouterr().err
