"""Several processes on loopback: runs saved shard by shard, restored on other numbers of them, killed and resumed."""

import signal

import jax
import pytest

from jaxlora import checkpoint
from jaxlora.checkpoint import _processes

# A second of CPU for each process: these are nightly, and a leg of `.ci/run`.
pytestmark = pytest.mark.nightly


def run(forks, job, count, devices, *args):
  """What every process said, by its number, and how each ended."""
  said, ended = {process: {} for process in range(count)}, {}
  for line in forks.run("hosts", job, count, devices, *map(str, args[:1]), *args[1:]):
    if isinstance(line[0], int):
      process, what, *rest = line
      if what == "gone":
        ended[process] = rest[0]
      else:
        said[process][what] = rest[0] if len(rest) == 1 else rest
  assert len(ended) == count
  return said, ended


def finished(forks, *args):
  said, ended = run(forks, *args)
  assert not any(ended.values()), ended
  return said


def data_written_by(step):
  """Bytes of arrays that each process wrote."""
  sizes = {}
  for folder in step.rglob("ocdbt.process_*"):
    own = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.parent.name == "d")
    sizes[folder.name] = sizes.get(folder.name, 0) + own
  return sizes


def test_saved_by_shards_and_restored_on_other_meshes(tmp_path, forks):
  """Two processes of two devices save; four of one, and one of four, restore: all bits, and where their mesh has them.

  Reading is exact, whatever the layout; so is saving a restored tree again.
  """
  path = tmp_path / "run"
  saved = finished(forks, "train", 2, 2, path, 2, 2, 3)
  (wanted,) = {said["digest"] for said in saved.values()}
  assert saved[0]["shard"] == [32, 32]  # A's inputs lie on the two rows of the mesh
  sizes = data_written_by(path / "3")
  assert len(sizes) == 2
  assert max(sizes.values()) < 1.5 * min(sizes.values())  # a half each, and an index of theirs
  assert '"fingerprint"' in (path / "3" / "record" / "metadata").read_text()
  for count, devices, data, model in ((4, 1, 4, 1), (1, 4, 1, 4)):
    for said in finished(forks, "restore", count, devices, path, data, model).values():
      assert said == {"digest": wanted, "specs": ["data", data], "same": True}


def test_killed_and_resumed_bit_for_bit(tmp_path, forks):
  """One of two processes dies while a step is being saved: the run resumes from the latest that is complete.

  On the same layout the arithmetic is the same, and so are all bits. Sums over two devices have one order: one process
  of two devices gets them, too.
  """
  path = tmp_path / "run"
  _, ended = run(forks, "train", 2, 1, path, 2, 1, 6, 3)
  assert ended == {0: signal.SIGKILL, 1: signal.SIGKILL}
  resumed = finished(forks, "train", 2, 1, path, 2, 1, 6)
  assert {said["from"] for said in resumed.values()} in ({2}, {3})
  whole = finished(forks, "train", 1, 2, tmp_path / "whole", 2, 1, 6)
  assert {said["digest"] for said in resumed.values()} == {whole[0]["digest"]}


def test_a_lone_process_is_told_what_it_may_not_do(tmp_path, forks):
  said = finished(forks, "alone", 2, 1, tmp_path / "alone")
  for error in said[0]["errors"]:
    assert "process 0 of 2 waited 1 s for the others" in error
    assert "Call it on every process" in error
  assert len(said[0]["errors"]) == 3
  assert said[0]["contents"] == ["bias", "down", "up"]
  assert all("the 2 processes have different ones" in one["keys"] for one in said.values())
  assert said[0]["digest"] == said[1]["digest"]


def test_files_of_whole_arrays_are_refused_with_a_remedy(tmp_path, forks):
  """And a bank of adapters in shards stays in shards, over processes, too."""
  said = finished(forks, "folders", 2, 1, tmp_path / "folder")
  for one in said.values():
    assert "up: other processes hold shards of it" in one["peft"]
    assert "process_allgather(tree, tiled=True)" in one["peft"]
    assert "down: other processes hold shards of it" in one["hub"]
    assert one["bank"] == [2, 2, 32]  # half of A's inputs
    assert one["digest"] is True


def test_a_folder_that_is_not_shared(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(checkpoint.CheckpointError, match=r"does not see .* a folder that all processes share"):
    _processes.check_shared(tmp_path, tmp_path / "0", "save")
  (tmp_path / "0").mkdir()
  _processes.check_shared(tmp_path, tmp_path / "0", "save")
