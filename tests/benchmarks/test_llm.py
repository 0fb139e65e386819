"""examples/llm from end to end on a tiny model in a GGUF file, its decoding and its loop against plain oracles."""

import json
import os
import re
import shutil
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import hub, peft
import jaxlora.checkpoint
from tests.helpers import tiny_llm
from tests.helpers.tiny_llm import write_data, write_gguf

tiny_llm.need_packages()


@pytest.fixture(scope="module")
def llm():
  with tiny_llm.modules("export", "finetune", "generate", "sweep") as found:
    yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("llm")
  return write_gguf(folder / "tiny.gguf"), write_data(folder)


@pytest.fixture(scope="module")
def setup(llm, files):
  return llm.runs.prepare(*files, 6)


# ----------------------------------------------------------------------------------------------------------------------
# The model and its decoding.


def test_decoding_writes_what_the_whole_sequence_says_next(llm, setup):
  """Against calls of the whole sequence so far, without a cache and without padding."""
  examples = setup.examples["test"][:3]
  written = llm.decoding.greedy(
    setup.model, *llm.rows.batch([e._replace(answer=[]) for e in examples], setup.chat.pad, answer=0), 5, 1, 1
  )
  call = jax.jit(lambda model, tokens: model(tokens[None], jnp.ones((1, len(tokens)), bool))[0][0])
  for example, row in zip(examples, written.tolist(), strict=True):
    logits = call(setup.model, jnp.asarray([*example.prompt, *row]))  # causal: each position sees those before it
    best = logits[len(example.prompt) - 1 : -1].argmax(-1).tolist()
    end = row.index(1) + 1 if 1 in row else len(row)
    assert row[:end] == best[:end]
    assert set(row[end:]) <= {1}


def test_padding_counts_for_nothing(llm, setup):
  """The same loss of the same pair, padded to another length and beside another."""
  short, long = setup.examples["test"][0], setup.examples["test"][1]
  long = long._replace(prompt=long.prompt * 2)
  alone = llm.scores.compiled_losses(setup.model, llm.rows.batch([short], setup.chat.pad))
  beside = llm.scores.compiled_losses(setup.model, llm.rows.batch([short, long], setup.chat.pad))
  np.testing.assert_allclose(alone[0][0], beside[0][0], rtol=1e-5)
  assert int(alone[1][0]) == len(short.answer)


def test_the_model_goes_to_safetensors_and_back(llm, setup, tmp_path):
  """By the names that the original's checkpoints have."""
  hub.save(tmp_path / "model", setup.model)
  like = nnx.eval_shape(lambda: llm.model.Llama(setup.model.config, nnx.Rngs(0)))
  again = hub.load(tmp_path / "model", like)
  jax.tree.map(np.testing.assert_array_equal, again, setup.model)
  assert (tmp_path / "model" / "model.safetensors").read_bytes().count(b"model.layers.1.mlp.down_proj.weight") == 1


def test_the_chat_template_and_the_answer(setup):
  assert setup.chat.tokenizer.decode(setup.chat.prompt("hi 12"), skip_special_tokens=False) == "<|s|>uhi 12<|e|><|s|>a"
  assert setup.chat.decode([*setup.chat.answer("ab"), 5, 6]) == "ab"
  assert [len(setup.chat.encode(text)) for text in ("ab", "it")] == [2, 1]


# ----------------------------------------------------------------------------------------------------------------------
# The loop.


def schedule(llm, **fields):
  return llm.training.Schedule(**{"rate": 0.02, "steps": 4, "batch": 4} | fields)


def trained(llm, setup, method, folder, schedule, every=2, ticks=lambda *_: None):
  base = llm.methods.base_of(method, setup.model)
  tree = llm.methods.adapt(method, base, schedule.seed)
  return llm.training.train(
    tree, base, setup.examples["train"], schedule, setup.chat.pad, "digest", folder, every, ticks
  )


class StopError(Exception):
  pass


def stop_at(step):
  def tick(now, loss, speed):
    if now == step and loss is not None:
      raise StopError

  return tick


@pytest.mark.parametrize("name", ["lora", pytest.param("full", marks=pytest.mark.nightly)])
def test_a_run_goes_on_bit_for_bit(llm, setup, tmp_path, name):
  method = llm.methods.Method(name, rank=2, base="nf4")
  whole, seen = trained(llm, setup, method, tmp_path / "whole", schedule(llm))
  with pytest.raises(StopError):
    trained(llm, setup, method, tmp_path / "halved", schedule(llm), ticks=stop_at(3))
  steps = []
  resumed, again = trained(llm, setup, method, tmp_path / "halved", schedule(llm), ticks=lambda k, *_: steps.append(k))
  assert steps == [2, 3, 4]
  assert again["loss"] == seen["loss"]
  for a, b in zip(jax.tree.leaves(jaxlora.split(whole)[1]), jax.tree.leaves(jaxlora.split(resumed)[1]), strict=True):
    np.testing.assert_array_equal(a, b)
  base = llm.methods.base_of(method, setup.model)
  with pytest.raises(
    ValueError, match=r"holds a run of other data or settings \(digest, expected another\): name another"
  ):
    llm.training.train(whole, base, setup.examples["train"], schedule(llm), 1, "another", tmp_path / "halved", 2, print)


@pytest.mark.parametrize("pack", [None, pytest.param(512, marks=pytest.mark.nightly)])
def test_parts_of_a_batch_make_the_same_update(llm, setup, tmp_path, pack):
  method = llm.methods.Method("lora", rank=2)
  plans = schedule(llm, steps=2, batch=2), schedule(llm, steps=2, batch=2, accumulate=2, pack=pack)
  losses = [trained(llm, setup, method, tmp_path / f"{k}", plan)[1]["loss"] for k, plan in enumerate(plans)]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_runs_without_packing_keep_their_digest(llm):
  """What a run's settings were before there was packing."""
  plain, packed = (
    llm.runs.Run(llm.methods.Method("lora"), llm.training.Schedule(3e-3, pack=pack)) for pack in (None, 512)
  )
  assert llm.runs.harness.digest(plain.settings) == "e64f9ae4a23a16b3"
  assert packed.settings["schedule"] == plain.settings["schedule"] | {"pack": 512}
  assert "-pack512-" in packed.name


def test_packed_pairs_have_the_losses_and_gradients_of_rows_of_their_own(llm, setup):
  """Pairs of several lengths, two rows of two or three of them and a row of padding; and a document sees no other."""
  examples = [setup.examples["train"][k] for k in (0, 1, 2, 5, 7)]
  tree = llm.methods.adapt(llm.methods.Method("lora", rank=2), setup.model, 0)
  frozen, factors = jaxlora.split(tree)
  factors = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), factors)
  length = 2 * max(len(e.prompt) + len(e.answer) for e in examples) + 20
  packed = llm.packing.pack(examples, length, setup.chat.pad, multiple=4)
  assert packed.tokens.shape == (4, length)
  assert sorted(packed.segments.max(1).tolist()) == [0, 1, 2, 2]

  def gradients(losses, rows):
    total = lambda factors: losses(jaxlora.join(frozen, factors), rows)[0].sum()
    return jax.jit(jax.value_and_grad(total))(factors)

  alone = gradients(llm.scores.adapted_losses, llm.rows.batch(examples, setup.chat.pad))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max())),
    gradients(llm.packing.adapted_losses, packed),
    alone,
  )
  assert packed.valid.sum() == sum(len(e.prompt) + len(e.answer) for e in examples)
  assert packed.counts.sum() == sum(len(e.answer) for e in examples)


def test_the_rate_warms_up_and_decays(llm):
  rates = llm.training.Schedule(1.0, steps=40).rates()
  np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1, rates[4]], rtol=1e-6)
  assert (np.diff(rates[3:]) < 0).all()
  assert 0 < rates[-1] < 0.01
  assert llm.training.Schedule(1.0, steps=1).rates().tolist() == [1.0]


def test_every_pair_is_met_once_an_epoch(llm, setup):
  examples = setup.examples["train"]
  order = llm.rows.training_order(examples, 3, 6, seed=1)
  assert sorted(np.concatenate(order).tolist()) == list(range(len(examples)))
  assert [len(index) for index in order] == [3] * 6
  other = llm.rows.training_order(examples, 3, 6, seed=2)
  assert any((a != b).any() for a, b in zip(order, other, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# The commands.


@pytest.fixture(scope="module")
def finished(llm, files, tmp_path_factory):
  out = tmp_path_factory.mktemp("out")
  args = [f"--model={files[0]}", f"--data={files[1]}", f"--out={out}", "--steps=3", "--items=6", "--rank=2", "--quiet"]
  return args, llm.finetune.main(args), out


def test_the_command_compares_base_lora_and_full(llm, setup, finished, capsys, monkeypatch):
  args, results, out = finished
  assert [result["label"] for result in results] == ["base, instructed", "LoRA r=2", "full fine-tuning"]
  base, lora, full = results
  assert max(lora["loss"], full["loss"]) < base["loss"]
  assert lora["trained"] < full["trained"] == sum(leaf.size for leaf in jax.tree.leaves(setup.model))
  assert sorted(file.suffix for file in out.iterdir()) == [".adapter", *[".json"] * 3]  # checkpoints are gone
  monkeypatch.setattr(llm.training, "train", None)  # nothing is done again
  monkeypatch.setattr(llm.runs, "evaluate", None)
  assert llm.finetune.main(args) == results
  printed = capsys.readouterr().out
  assert all(text in printed for text in ("sentence by aspect", "LoRA r=2", "by a person: 0 is hard"))


def test_the_adapter_writes_and_is_exported(llm, setup, files, finished, tmp_path, capsys):
  """What the run wrote is written again; and all three exports are the same merged model."""
  _, results, out = finished
  adapter = next(out.glob("*.adapter"))
  question, model = setup.pairs["test"][1].question, f"--model={files[0]}"
  limit = f"--limit={llm.rows.ANSWER}"
  assert llm.generate.main([question, model, limit, f"--adapter={adapter}"]) == [results[1]["written"][1]]
  llm.export.main([str(adapter), str(tmp_path / "out"), model])
  merged = jaxlora.merge(jaxlora.checkpoint.load(adapter, setup.model))
  for tree in (
    hub.load(tmp_path / "out" / "merged", setup.model),
    jaxlora.merge(peft.load(tmp_path / "out" / "peft", setup.model)),
    jaxlora.merge(hub.load_gguf_adapter(tmp_path / "out" / "adapter.gguf", setup.model, base=files[0])),
  ):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), tree, merged)
  with pytest.raises(SystemExit):
    llm.export.main([str(adapter), str(tmp_path / "out"), model])
  assert "is there already; name another folder" in capsys.readouterr().err


def test_the_sweep_goes_on_and_shows_its_table(llm, files, tmp_path, capsys, monkeypatch):
  short = lambda rates, seeds: [
    llm.runs.Run(run.method, schedule(llm, steps=1, seed=run.schedule.seed))
    for run in llm.sweep.quantised(rates, seeds)[:2]
  ]
  monkeypatch.setitem(llm.sweep.GROUPS, "quantised", short)
  args = [f"--model={files[0]}", f"--data={files[1]}", f"--out={tmp_path}", "--items=3", "--seeds=1", "--quiet"]
  llm.sweep.main([*args, "--only=quantised"])
  first = capsys.readouterr()
  assert ("run 2 of 2" in first.err, "LoRA r=8, nf4 base" in first.out) == (True, True)
  monkeypatch.setattr(llm.runs, "prepare", None)
  llm.sweep.main([*args, "--show"])
  assert capsys.readouterr().out == first.out
  assert llm.sweep.best_rates(tmp_path) == {"lora": 3e-3, "rslora": 1e-3, "full": 1e-4, "head": 1e-4}
  assert (tmp_path / "evidence" / "test.png").read_bytes().startswith(b"\x89PNG")
  assert all(text in first.out for text in ("sentence by aspect", "ROUGE-L by aspect", "less LoRA r=8", "ROUGE-1"))


def test_recorded_runs_are_not_run_again(llm, files, tmp_path, capsys, monkeypatch):
  """Elsewhere, with an output folder of its own: they choose the rates, and stay recorded."""
  run = llm.runs.Run(llm.sweep.FULL, schedule(llm, steps=1, seed=llm.sweep.RATE_SEED), "val")
  other = llm.runs.Run(llm.sweep.FULL, schedule(llm, steps=1, seed=0))
  told = {"settings": run.settings, "label": "full fine-tuning", "loss": 1.0}
  file = tmp_path / "sweep.json"
  file.write_text(json.dumps({"runs": [told]}))
  monkeypatch.setattr(llm.sweep, "RECORDED", file)
  chosen = []

  def rates(found, seeds):
    chosen.append(found["full"])
    return [run, other]

  monkeypatch.setitem(llm.sweep.GROUPS, "rates", rates)
  args = [f"--model={files[0]}", f"--data={files[1]}", f"--out={tmp_path / 'out'}", "--items=3", "--quiet"]
  llm.sweep.main([*args, "--only=rates", "--continue-recorded", "--record"])
  assert "run 1 of 1" in capsys.readouterr().err
  assert chosen == [run.schedule.rate]
  assert told in json.loads(file.read_text())["runs"]
  assert other.settings in [found["settings"] for found in llm.recorded.read(file)]


def test_what_finished_results_do_not_say_is_added_from_their_adapters(llm, files, finished, tmp_path, capsys):
  _, _, out = finished
  folder = shutil.copytree(out, tmp_path / "out")
  for file in folder.glob("*.json"):
    known = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in known.items() if k not in ("loss_sums", "loss_counts", "plain_text")}))
  words = [f"--model={files[0]}", f"--data={files[1]}", f"--out={folder}", "--fill", "--quiet"]
  llm.sweep.main([*words, "--items=6"])
  printed = capsys.readouterr()
  assert "No weights are left of full-" in printed.err
  assert all(text in printed.out for text in ("over the base's", "less base, instructed"))
  for file in folder.glob("[bl]*.json"):
    whole, now = json.loads((out / file.name).read_text()), json.loads(file.read_text())
    assert now.keys() == whole.keys()
    np.testing.assert_allclose(now["loss_sums"], whole["loss_sums"], rtol=1e-5)
    assert now["plain_text"]["digest"] == whole["plain_text"]["digest"]
    assert abs(now["plain_text"]["loss"] - whole["plain_text"]["loss"]) < 1e-5
  for file in folder.glob("lora*.json"):
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "plain_text"}))
  with pytest.raises(SystemExit):
    llm.sweep.main([*words, "--items=3"])
  assert "is of another model, other data or other --items" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "rank", "trained_rows"), [("head", 8, None), ("lora", 2, 2)])
def test_the_tied_head_alone_trains(llm, setup, tmp_path, name, rank, trained_rows):
  method = llm.methods.Method(name, rank, targets=llm.methods.HEAD)
  tree, seen = trained(llm, setup, method, tmp_path, schedule(llm, steps=3))
  assert seen["loss"][-1] < seen["loss"][0]
  rows, width = setup.model.embed_tokens.embedding.shape
  count = sum(leaf.size for leaf in jax.tree.leaves(jaxlora.split(tree)[1]))
  assert count == (rows * width if trained_rows is None else trained_rows * (rows + width))
  assert method.label == ("tied head alone" if name == "head" else "LoRA r=2, tied head alone")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"token_embd": np.ones((300, 16), np.float32)}, "the tokenizer has 259 tokens and the embedding 300 rows"),
    ({"fields": {"llama.rope.scaling.type": "linear"}}, "found positions scaled by 'linear', expected none"),
    ({"fields": {"llama.context_length": None}}, "its metadata lack llama.context_length; convert the model again"),
    ({"fields": {"tokenizer.chat_template": None}}, "the tokenizer lacks chat_template, expected those of a chat"),
    ({"fields": {"tokenizer.ggml.eos_token_id": 259}}, "ends with token 259 and pads with 1, expected them below 259"),
    ({"fields": {"tokenizer.ggml.merges": ["no no"]}}, "the tokenizer's merges are not of its tokens"),
    ({"architecture": "gpt2"}, "found the architecture 'gpt2', expected 'llama'"),
    ({"output_norm": None}, "norm/scale: no tensor of the model is called so"),
    (
      {"output_norm": np.ones(3, np.float32)},
      r"norm/scale: model.norm.weight has shape \(3,\), which does not fit a leaf of shape \(16,\)",
    ),
  ],
)
def test_a_file_that_does_not_fit_is_refused(llm, files, tmp_path, capsys, change, message):
  file = write_gguf(tmp_path / "other.gguf", **change)
  with pytest.raises(SystemExit):
    llm.finetune.main([f"--model={file}", f"--data={files[1]}", f"--out={tmp_path}"])
  assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--rank=0"], "--rank: found 0, expected a whole number of at least 1"),
    (["--rate=nan"], "--rate: found nan, expected a finite number above 0"),
    (["--batch=4", "--accumulate=3"], "--accumulate: found 3, expected a divisor of --batch, 4"),
    (["--batch=99"], "found 18 training pairs, expected at least the 99 of a batch: --batch, or more data"),
    (["--pack=0"], "--pack: found 0, expected a whole number of at least 1"),
    (["--pack=9"], "expected at most the 9 of a packed row: --pack"),
    (["--data=nowhere"], "train.jsonl: not found; expected the data's three files"),
  ],
)
def test_options_that_do_not_fit_are_refused(llm, files, tmp_path, capsys, args, message):
  with pytest.raises(SystemExit):
    llm.finetune.main([f"--model={files[0]}", f"--data={files[1]}", f"--out={tmp_path}", *args])
  assert message in capsys.readouterr().err


def test_a_cut_file_and_a_prompt_above_the_context_are_refused(llm, files, setup, tmp_path):
  cut = tmp_path / "cut.gguf"
  cut.write_bytes(files[0].read_bytes()[:4000])
  with pytest.raises(ValueError, match=r"cut\.gguf: cannot be read as GGUF .*; download the file again"):
    llm.gguf_file.load(cut)
  with pytest.raises(ValueError, match=r"test0: the prompt has .* tokens, expected at most 52: .*leave the paper out"):
    llm.rows.examples(setup.chat, setup.pairs["test"], 100)
  fields = llm.gguf_file.read(files[0])
  with pytest.raises(ValueError, match="the tokenizer has 259 tokens and the embedding 300 rows"):
    llm.tokens.chat_of(fields, 300)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", r"val.jsonl, line 1: cannot be read \(JSONDecodeError"),
    ('{"id": "a", "sentences": {"abstract": ["b"]}, "summary": {"challenge": "c"}}', "KeyError.'approach'"),
    (
      '{"id": "a", "sentences": {"abstract": []}, "summary": {"challenge": "c", "approach": "d", "outcome": "e"}}',
      "line 1: a text is empty or none; expected",
    ),
    ("", "val.jsonl: holds no paper"),
  ],
)
def test_data_of_another_form_is_refused(llm, tmp_path, line, message):
  (tmp_path / "val.jsonl").write_text(line)
  with pytest.raises(ValueError, match=message):
    llm.papers.load("val", tmp_path)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["a" * 1100], r"the longest prompt has 11\d\d tokens, expected at most 960: the model's context is 1024"),
    (["a", "--limit=1024"], "--limit: found 1024, expected at least 1 and less than the model's context, 1024"),
  ],
)
def test_a_prompt_that_leaves_no_room_is_refused(llm, files, capsys, words, message):
  with pytest.raises(SystemExit):
    llm.generate.main([f"--model={files[0]}", *words])
  assert re.search(message, capsys.readouterr().err)


def test_a_run_on_other_data_is_another_run(llm, setup, tmp_path):
  """It goes on in no checkpoint of the first one, and leaves that as it is; by hand it is refused, as tested above."""
  other = {**setup.pairs, "train": setup.pairs["train"][3:]}
  changed = llm.runs.setup_of(setup.model, setup.chat, other)
  run = llm.runs.Run(llm.methods.Method("lora", 2), schedule(llm))
  assert setup.digest == llm.runs.setup_of(setup.model, setup.chat, setup.pairs).digest != changed.digest
  assert llm.runs.file_of(setup, run, tmp_path) != llm.runs.file_of(changed, run, tmp_path)


def test_a_command_whose_run_cannot_go_on_says_why(llm, capsys):
  def main():
    raise llm.training.RunError("holds a run of other data")

  with pytest.raises(SystemExit) as stop:
    llm.runs.resumable(main)
  assert (stop.value.code, capsys.readouterr().err) == (2, "error: holds a run of other data\n")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
@pytest.mark.parametrize(
  ("said", "want"),
  [
    ("", "glibc.malloc.hugetlb=1"),
    ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
    ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),  # the user's word
  ],
)
def test_a_program_begins_anew_where_arrays_get_huge_pages(said, want):
  shown = "print(os.environ['GLIBC_TUNABLES'], sys.argv)"
  code = f"import os, sys; from lm import memory; memory.with_huge_pages(); {shown}"
  environment = {**os.environ, "PYTHONPATH": str(tiny_llm.FOLDER), "GLIBC_TUNABLES": said}
  words = [sys.executable, "-c", code, "--steps=3"]
  ran = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
  assert ran.stdout == f"{want} ['-c', '--steps=3']\n"


@pytest.mark.nightly
@pytest.mark.parametrize("script", sorted(file.name for file in tiny_llm.FOLDER.glob("*.py")))
def test_a_script_says_how_it_is_called(script):
  """Started as a user does, whose import path has none of the folders that tests put there."""
  words = [sys.executable, str(tiny_llm.FOLDER / script), "--help"]
  ran = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tiny_llm.FOLDER.parents[1])
  assert f"python examples/llm/{script}" in ran.stdout


@pytest.mark.nightly
def test_the_real_model_answers(llm):
  """SmolLM2-135M-Instruct; its logits are those of transformers on torch to 1e-4 of 38."""
  try:
    model, fields = llm.gguf_file.load(llm.gguf_file.packaged())
  except ValueError as error:
    pytest.skip(str(error))
  chat = llm.tokens.chat_of(fields, model.config.vocabulary)
  example = llm.rows.Example(chat.prompt("What is the capital of France?"), [])
  assert llm.decoding.answers(model, chat, [example], 1, 12) == ["The capital of France is Paris."]
