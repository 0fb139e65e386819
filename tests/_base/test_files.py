"""Files that appear whole or not at all, and safetensors files read in parts."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora._base.files import replacing, stored_tensors


def test_a_file_appears_whole_with_its_folder(tmp_path):
  target = tmp_path / "new" / "file"
  with replacing(target) as path:
    path.write_text("whole")
    assert not target.exists()
  assert target.read_text() == "whole"
  with replacing(target) as path:
    path.write_text("other")
    number = path.stat().st_ino
    assert target.read_text() == "whole"
  assert target.read_text() == "other"
  assert target.stat().st_ino == number  # one rename, no copy that could stop half-way
  assert list(target.parent.iterdir()) == [target]


def test_a_folder_appears_whole(tmp_path):
  with replacing(tmp_path / "folder") as path:
    path.mkdir()
    (path / "file").write_text("whole")
    assert not (tmp_path / "folder").exists()
  assert (tmp_path / "folder" / "file").read_text() == "whole"
  with pytest.raises(OSError), replacing(tmp_path / "folder") as path:
    path.mkdir()
  assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_an_error_nothing_is_left_and_the_old_stands(tmp_path, kind):
  target = tmp_path / "target"
  target.write_text("old")

  def write_half(path):
    if kind == "folder":
      path.mkdir()
      path = path / "inside"
    path.write_text("half")
    raise RuntimeError("no space")

  with pytest.raises(RuntimeError, match="no space"), replacing(target) as path:
    write_half(path)
  assert list(tmp_path.iterdir()) == [target]
  assert target.read_text() == "old"


def test_tensors_are_read_and_mapped_where_they_lie(tmp_path):
  safetensors = pytest.importorskip("safetensors.numpy", reason="the extra jaxlora[peft] is not installed")
  random = np.random.default_rng(0)
  values = {
    "half": random.standard_normal((3, 4)).astype(jnp.bfloat16),
    "double": random.standard_normal((2, 5)),
    "bytes": np.arange(7, dtype=np.uint8),
    "scalar": np.array(3, np.float32),
    "empty": np.zeros((0, 4), np.float32),
  }
  path = tmp_path / "model.safetensors"
  safetensors.save_file(values, path, metadata={"format": "np"})
  stored = stored_tensors(path)
  assert stored.keys() == values.keys()
  for name, tensor in stored.items():
    for array in (tensor.read(), tensor.mapped()):
      assert (array.dtype, array.shape, array.nbytes) == (values[name].dtype, values[name].shape, tensor.nbytes)
      np.testing.assert_array_equal(array, values[name])
      assert not array.flags.writeable


def test_a_tensor_that_is_not_aligned_is_read(tmp_path):
  pytest.importorskip("safetensors", reason="the extra jaxlora[peft] is not installed")
  header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
  header += b" " * ((2 - len(header)) % 4)  # the numbers begin two bytes off
  path = tmp_path / "odd.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + np.array([1, 2], np.float32).tobytes())
  (tensor,) = stored_tensors(path).values()
  assert tensor.begin % 4
  assert tensor.mapped().flags.aligned
  np.testing.assert_array_equal(tensor.mapped(), [1, 2])
