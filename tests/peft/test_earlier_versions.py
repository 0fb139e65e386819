"""Folders that earlier versions wrote are read, and the same bytes are written for the same adapter.

`written_by_0_1_0.zip` holds `peft`, by `peft.save`, and `checkpoint`, by `checkpoint.save`, of the tree below: an
embedding, a scanned projection, a scanned norm and a head trained whole.
"""

import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import _cli, checkpoint, peft
from jaxlora.peft._read import read
from jaxlora.peft._write import write
from tests.peft.folders import assert_equal


def counted(start, *shape):
  return jax.device_put(start + np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 8)


BASE = {
  "embed_tokens": {"embedding": counted(1, 5, 4)},
  "layers": {"q_proj": {"kernel": counted(2, 2, 4, 3), "bias": counted(3, 2, 3)}, "norm": {"scale": counted(4, 2, 4)}},
  "lm_head": {"kernel": counted(5, 4, 5), "bias": counted(6, 5)},
}


def expected():
  embedding, kernel = BASE["embed_tokens"]["embedding"], BASE["layers"]["q_proj"]["kernel"]
  full, lora = jaxlora.FullWeight, jaxlora.LoraWeight.from_factors
  return {
    "embed_tokens": {"embedding": lora(embedding, counted(-1, 2, 5), counted(-2, 2, 4), alpha=3.0)},
    "layers": {
      "q_proj": BASE["layers"]["q_proj"]
      | {"kernel": lora(kernel, counted(-3, 2, 1, 4), counted(-4, 2, 1, 3), "sio", alpha=0.5)},
      "norm": {"scale": full(BASE["layers"]["norm"]["scale"], counted(7, 2, 4))},
    },
    "lm_head": {
      "kernel": full(BASE["lm_head"]["kernel"], counted(8, 4, 5)),
      "bias": full(BASE["lm_head"]["bias"], counted(9, 5)),
    },
  }


@pytest.fixture
def folder(tmp_path):
  with zipfile.ZipFile(pathlib.Path(__file__).with_name("written_by_0_1_0.zip")) as archive:
    archive.extractall(tmp_path)
  return tmp_path


def bytes_of(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_loaded(folder):
  assert_equal(peft.load(folder / "peft", BASE), expected())


def test_the_same_bytes_are_written(folder, tmp_path):
  about = {"base_model_name_or_path": "somebody/model", "task_type": "CAUSAL_LM"}
  peft.save(tmp_path / "saved", expected(), **about)
  assert bytes_of(tmp_path / "saved") == bytes_of(folder / "peft")
  write(tmp_path / "copied", read(folder / "peft"))
  assert bytes_of(tmp_path / "copied") == bytes_of(folder / "peft")


def test_a_checkpoint_is_converted(folder, tmp_path, capsys):
  about = ["--base-model", "somebody/model", "--task-type", "CAUSAL_LM"]
  assert _cli.main(["convert", str(folder / "checkpoint"), str(tmp_path / "converted"), *about]) == 0
  assert bytes_of(tmp_path / "converted") == bytes_of(folder / "peft")
  base = ["--base", str(folder / "checkpoint")]
  assert _cli.main(["convert", str(folder / "peft"), str(tmp_path / "back"), *base]) == 0
  assert_equal(checkpoint.restore(tmp_path / "back", BASE), jax.tree.map(jnp.asarray, expected()))
  assert capsys.readouterr().out
