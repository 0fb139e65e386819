"""What the commands read: without the extra jaxlora[peft] there is nothing here to collect."""

import collections
import importlib.util
import json
import tempfile

import pytest

from jaxlora import _cli, checkpoint
from jaxlora._base.files import StoredTensor
from jaxlora._cli import changes, convert
from jaxlora.peft import _read, _write

NEEDED = ("safetensors", "tqdm")
collect_ignore_glob = [] if all(map(importlib.util.find_spec, NEEDED)) else ["test_*"]


def pytest_report_header():
  return "tests/cli: left out, as jaxlora[peft] is not installed" if collect_ignore_glob else None


@pytest.fixture
def run(capsys):
  """Runs a command and returns the object that `--json` prints."""

  def one(*arguments, code=0):
    assert _cli.main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)

  return one


@pytest.fixture(scope="session")
def tree():
  from tests.cli import files

  return files.adapted_tree()


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tree):
  """The same adapter in both formats, and its base as Flax and as torch would write it."""
  from safetensors.numpy import save_file

  from jaxlora import peft
  from tests.cli import files

  folder = tmp_path_factory.mktemp("cli")
  checkpoint.save(folder / "checkpoint", tree, metadata={"task": "summaries"})
  peft.save(folder / "peft", tree)
  save_file(files.flat(files.PARAMS), folder / "flax.safetensors", metadata={"format": "flax"})
  save_file(files.as_torch(files.PARAMS), folder / "torch.safetensors", metadata={"format": "pt"})
  return folder


@pytest.fixture
def touched(monkeypatch):
  """Counts what is read and written, by name, and refuses temporary folders."""
  counts = collections.Counter()

  def counted(owner, name, label):
    function = getattr(owner, name)

    def counting(*arguments, **options):
      counts[label(*arguments)] += 1
      return function(*arguments, **options)

    monkeypatch.setattr(owner, name, counting)

  counted(_read, "_read_config", lambda folder: "read adapter_config.json")
  counted(_read, "stored_tensors", lambda file: f"read the header of {file.name}")
  counted(StoredTensor, "read", lambda stored: f"read {stored.file.name} from byte {stored.begin}")
  counted(_write, "replacing", lambda target: f"wrote {target.name}")
  counted(convert, "contents", lambda path: "read a checkpoint")
  counted(changes, "contents", lambda path: "read a checkpoint")
  counted(convert, "save_part", lambda path, tree: "wrote a checkpoint")

  def refused(*_, **__):
    raise AssertionError("a temporary folder")

  monkeypatch.setattr(tempfile, "mkdtemp", refused)
  return counts
