"""Damaged checkpoints, full disks and folders that cannot be written: an error, and the earlier state stands."""

import contextlib
import os
from pathlib import Path
import resource
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import checkpoint
from jaxlora.checkpoint import CheckpointError, Manager
from tests.checkpoint.trees import assert_same, matrix_tree


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where one read of orbax's fails
def test_altered_and_truncated_files_are_errors_or_do_not_matter(tmp_path):
  """Every file, cut short, altered in the middle, and deleted: the values that were saved, or a `CheckpointError`."""
  base, tree = matrix_tree(shape=(64, 48))
  tree["w"].a[:] = np.random.default_rng(0).standard_normal((2, 64))
  with Manager(tmp_path / "run", asynchronous=False) as manager:
    for step in (1, 2):
      manager.save(step, tree, {"m": tree["w"].a}, data=step)
  good = shutil.copytree(tmp_path / "run", tmp_path / "good")
  files = sorted(file.relative_to(good) for file in (good / "2").rglob("*") if file.is_file())
  failed = {}
  for file in files:
    content = (good / file).read_bytes()
    middle = len(content) // 2
    altered = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b"x"
    for kind, damaged in (("cut", content[:middle]), ("altered", altered), ("deleted", None)):
      target = tmp_path / "run" / file
      target.unlink() if damaged is None else target.write_bytes(damaged)
      with Manager(tmp_path / "run") as manager:
        try:
          assert_same(manager.restore(base, {"m": tree["w"].a}).tree, jax.tree.map(jnp.asarray, tree))
        except CheckpointError:
          failed[str(file), kind] = True
          assert manager.restore(base, step=1).data == 1  # the earlier one stands
      target.write_bytes(content)
  for kind in ("cut", "altered", "deleted"):
    assert failed["2/record/metadata", kind]
    for item in ("adapter", "training"):
      assert sum(path.startswith(f"2/{item}/") and k == kind for path, k in failed) >= 2


def test_values_altered_within_a_sound_file_are_an_error(tmp_path):
  """What tensorstore has no reason to doubt: arrays of another save, under the record of this one."""
  base, tree = matrix_tree(1.0)
  checkpoint.save(tmp_path / "a", tree)
  checkpoint.save(tmp_path / "b", matrix_tree(2.0)[1])
  shutil.rmtree(tmp_path / "a" / "0" / "adapter")
  shutil.copytree(tmp_path / "b" / "0" / "adapter", tmp_path / "a" / "0" / "adapter")
  with pytest.raises(CheckpointError, match=r"w \(a\).*damaged or altered"):
    checkpoint.restore(tmp_path / "a", base)
  record = tmp_path / "b" / "0" / "record" / "metadata"
  record.write_text(record.read_text().replace('"alpha": 2.0', '"alpha": 8.0'))
  with pytest.raises(CheckpointError, match="the record is not the one that was saved"):
    checkpoint.restore(tmp_path / "b", base)


@contextlib.contextmanager
def small_disk(folder: Path):
  mounted = shutil.which("mount") and subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
  )
  if not mounted or mounted.returncode:
    pytest.skip("mounting a small tmpfs is not permitted here")
  try:
    yield lambda: contextlib.nullcontext()
  finally:
    subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def small_files(folder: Path):
  """The kernel lets no file grow beyond 32 KiB while the limit holds."""

  @contextlib.contextmanager
  def limited():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 1024, before[1]))
    try:
      yield
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)

  yield limited


# Where one write fails, orbax closes the loop that the others report to.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("disk", [small_disk, small_files])
def test_on_a_full_disk_the_earlier_checkpoint_stands(tmp_path, disk):
  base, small = matrix_tree(3.0)
  noise = np.random.default_rng(0).standard_normal((2, 100_000)).astype(np.float32)  # does not compress
  large_base = {"w": np.zeros((100_000, 4), np.float32)}
  large = {"w": jaxlora.LoraWeight(large_base["w"], noise, small["w"].b, rank=2, alpha=1.0)}
  (tmp_path / "disk").mkdir()
  with disk(tmp_path / "disk") as limited:
    checkpoint.save(tmp_path / "disk" / "a", small)
    with limited(), pytest.raises(CheckpointError, match="cannot be written; what was there before stands"):
      checkpoint.save(tmp_path / "disk" / "a", large)
    assert checkpoint.restore(tmp_path / "disk" / "a", base)["w"].a[0, 0] == 3
    checkpoint.save(tmp_path / "disk" / "a", matrix_tree(4.0)[1])
    assert checkpoint.restore(tmp_path / "disk" / "a", base)["w"].a[0, 0] == 4

    manager = Manager(tmp_path / "disk" / "run", max_to_keep=1)
    manager.save(1, small)
    manager.wait()
    with limited(), pytest.raises(CheckpointError, match="earlier steps stand"):
      manager.save(2, large) and manager.wait()
    assert manager.all_steps() == [1]
    assert sorted(os.listdir(tmp_path / "disk" / "run")) == ["1"]
    assert manager.restore(base).step == 1
    manager.save(3, small)
    assert manager.all_steps() == [3]
    manager.close()
    assert sorted(os.listdir(tmp_path / "disk" / "run")) == ["3"]


@contextlib.contextmanager
def without_root():
  """Root may write anywhere: for a while, be nobody."""
  if os.geteuid():
    yield
    return
  os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(0)


def test_a_folder_that_cannot_be_written_is_an_error():
  base, tree = matrix_tree(3.0)
  with tempfile.TemporaryDirectory(dir="/tmp") as name:
    folder = Path(name)
    checkpoint.save(folder / "a", tree)
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in places:
      path.chmod(0o555)
    try:
      with without_root():
        with pytest.raises(CheckpointError, match="cannot be written; what was there before stands: PermissionError"):
          checkpoint.save(folder / "a", matrix_tree(4.0)[1])
        with pytest.raises(CheckpointError, match="PermissionError"):
          Manager(folder / "run")
        assert checkpoint.restore(folder / "a", base)["w"].a[0, 0] == 3
    finally:
      for path in places:
        path.chmod(0o755)
