"""Serving of the language model's example: several adapters in one batch, swapped while it runs."""

import io
import json
import sys

import jax
import pytest

import jaxlora
import jaxlora.checkpoint
from tests.helpers import tiny_llm

tiny_llm.need_packages()

LIMIT = 4


@pytest.fixture(scope="module")
def llm():
  with tiny_llm.modules("serve", "generate") as found:
    yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  return tiny_llm.write_gguf(tmp_path_factory.mktemp("served") / "tiny.gguf")


@pytest.fixture(scope="module")
def served(llm, file, tmp_path_factory):
  """The model, its tokenizer, and folders of adapters: of ranks 2, 1, 2 and 4."""
  model, fields = llm.gguf_file.load(file)
  folder = tmp_path_factory.mktemp("adapters")
  for seed, (name, rank) in enumerate({"one": 2, "low": 1, "two": 2, "high": 4}.items()):
    tree = llm.methods.adapt(llm.methods.Method("lora", rank), model, seed)
    frozen, factors = jaxlora.split(tree)
    key = jax.random.key(seed)
    drawn = jax.tree.map(lambda x: jax.random.normal(jax.random.fold_in(key, x.size), x.shape), factors)
    jaxlora.checkpoint.save(folder / name, jaxlora.join(frozen, drawn))
  return model, llm.tokens.chat_of(fields, model.config.vocabulary), folder


def alone(llm, served, name, prompt):
  """What an adapter answers by itself: merged, without a batch beside it."""
  model, chat, folder = served
  merged = model if name == "base" else jaxlora.merge(jaxlora.checkpoint.load(folder / name, model))
  return llm.decoding.answers(merged, chat, [llm.rows.Example(chat.prompt(prompt), [])], 1, LIMIT)[0]


def test_a_batch_of_adapters_is_each_one_alone_and_a_swap_compiles_nothing(llm, served, monkeypatch, capsys, file):
  """By lines, as the command reads them: mixed rows, a replaced adapter, a removed one, and what cannot be done."""
  _, _, folder = served
  lines = [
    {"adapter": "a", "prompt": "hi"}, {"adapter": "base", "prompt": "hi"}, {"adapter": "b", "prompt": "so it goes"},
    {"put": "a", "folder": str(folder / "two")}, {"adapter": "a", "prompt": "hi"},
    {"put": "c", "folder": str(folder / "high")}, {"remove": "b"}, {"adapter": "b", "prompt": "hi"},
  ]  # fmt: skip
  monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(json.dumps, lines)) + "\nno JSON\n"))
  llm.serving.greedy.clear_cache()
  llm.serve.main(
    [f"--model={file}", f"--adapter=a={folder / 'one'}", f"--adapter=b={folder / 'low'}", "--batch=3", "--limit=4"]
  )
  found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  expected = [("one", "hi"), ("base", "hi"), ("low", "so it goes"), None, ("two", "hi")]
  for answer, of in zip(found, expected, strict=False):
    assert of is None or answer["answer"] == alone(llm, served, *of)
  assert len({found[k]["answer"] for k in (0, 1, 4)}) == 3
  assert llm.serving.greedy._cache_size() == 1  # one program, before and after the swap
  assert found[3] == lines[3]
  assert "rank 4 is above the bank's, 2" in found[5]["error"]
  assert "serve.py --rank" in found[5]["error"]
  assert found[6] == {"remove": "b"}
  assert found[7] == {"error": "there is no adapter 'b'; found 'base', 'a': put it first"}
  assert "no JSON" in found[8]["error"]


def test_a_higher_rank_fits_where_it_was_said(llm, served):
  """The remedy that the error names."""
  model, chat, folder = served
  server = llm.serving.Server(model, chat, 1, LIMIT, 2, rank=4)
  server.put("a", folder / "one")
  server.put("b", folder / "high")
  assert server.names == ("a", "b")
  with pytest.raises(ValueError, match=r"the bank is full: 2 adapters.* serve\.py --rank and --capacity"):
    server.put("c", folder / "two")
  with pytest.raises(ValueError, match="'base' is the base without an adapter"):
    server.put("base", folder / "two")


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--batch=0"], "--batch: found 0, expected a whole number of at least 1"),
    (["--adapter=papers"], "--adapter: found 'papers', expected NAME=FOLDER"),
    (["--adapter=a=nowhere"], "nowhere"),
  ],
)
def test_options_that_do_not_fit_are_refused(llm, file, capsys, words, message):
  with pytest.raises(SystemExit):
    llm.serve.main([f"--model={file}", *words])
  assert message in capsys.readouterr().err


def test_an_adapter_of_another_base_and_a_long_prompt_are_refused(llm, served, tmp_path):
  _, chat, folder = served
  other, _ = llm.gguf_file.load(tiny_llm.write_gguf(tmp_path / "other.gguf", seed=1))
  server = llm.serving.Server(other, chat, 1, LIMIT, 2)
  with pytest.raises(jaxlora.checkpoint.CheckpointError, match="base"):
    server.put("a", folder / "one")
  with pytest.raises(
    ValueError, match=r"the prompt has 20\d\d tokens, expected at most 960: the model's context is 10"
  ):
    server.check(llm.serving.Request("base", "ab" * 1000))
  server.check(llm.serving.Request("base", "a" * 900))
  with pytest.raises(ValueError, match=r"found .* expected an object with texts for one of: adapter and prompt"):
    llm.serve.read('{"prompt": 3}')
