"""Files: content that appears whole or not at all, and where a safetensors file holds its tensors."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
import shutil

import jax.numpy as jnp
import numpy as np


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
  """Yields a path to write a file or a new folder to; `target` becomes it once the block has ended without an error.

  Missing parents are made. The new content is flushed to the disk before one rename puts it in place, so that a process
  or a machine that dies at any moment leaves the old content or the new one. After an error nothing is left beside
  `target`. A folder replaces nothing but an empty folder, as `os.replace` does.

  Raises:
    OSError: if it cannot be written.
  """
  partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    _flush(partial)
    os.replace(partial, target)
  finally:
    if partial.is_dir():
      shutil.rmtree(partial)
    else:
      partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
  """Waits until a file, or every file below a folder, is on the disk."""
  for file in path.rglob("*") if path.is_dir() else (path,):
    if file.is_file():
      with open(file, "rb") as stream:
        os.fsync(stream.fileno())


_DTYPES = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2",
  "F8_E8M0": "float8_e8m0fnu",
  "I64": "int64",
  "I32": "int32",
  "I16": "int16",
  "I8": "int8",
  "U64": "uint64",
  "U32": "uint32",
  "U16": "uint16",
  "U8": "uint8",
  "BOOL": "bool",
}


def dtype_of(code: str) -> np.dtype | None:
  """The dtype in NumPy of one that the safetensors format calls so; `None` for one that NumPy does not have."""
  return jnp.dtype(_DTYPES[code]) if code in _DTYPES else None


_CODES = {name: code for code, name in _DTYPES.items()}


def code_of(dtype: np.dtype | type | str) -> str:
  """A dtype as the safetensors format writes it, such as `"BF16"`."""
  return _CODES[jnp.dtype(dtype).name]


def nbytes_of(code: str, shape: Sequence[int]) -> int:
  """The bytes of a tensor whose dtype NumPy has."""
  dtype = dtype_of(code)
  return math.prod(shape) * (1 if dtype is None else dtype.itemsize)


Spec = tuple[str, tuple[int, ...]]  # a tensor's dtype, as safetensors writes it, and its shape


def new_header(
  specs: Mapping[str, Spec], metadata: Mapping[str, str], sizes: Mapping[str, int] | None = None
) -> tuple[bytes, dict[str, int]]:
  """The header of a safetensors file, and where in the file each tensor begins: wide dtypes first, so all are aligned.

  Args:
    specs: the tensors, by name.
    metadata: goes into the header.
    sizes: their bytes; needed where some are of a dtype that NumPy does not have.
  """
  entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
  begin, offsets = 0, {}
  for name in sorted(specs, key=lambda name: -nbytes_of(specs[name][0], ())):
    code, shape = specs[name]
    end = begin + (nbytes_of(code, shape) if sizes is None else sizes[name])
    entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    offsets[name], begin = begin, end
  text = json.dumps(entries, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + at for name, at in offsets.items()}


def raw_bytes(value: np.ndarray) -> memoryview:
  """The bytes of an array, in the order of its elements."""
  return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor of a safetensors file that has not been read.

  Attributes:
    file: the file.
    code: its dtype as the format writes it, such as `"BF16"`.
    shape: its shape.
    begin, end: its bytes in the file.
  """

  file: Path
  code: str
  shape: tuple[int, ...]
  begin: int
  end: int

  @property
  def dtype(self) -> np.dtype | None:
    """Its dtype in NumPy; `None` for a dtype that NumPy does not have."""
    return dtype_of(self.code)

  @property
  def nbytes(self) -> int:
    return self.end - self.begin

  def read(self) -> np.ndarray:
    """Its values, in memory."""
    with open(self.file, "rb") as stream:
      stream.seek(self.begin)
      return np.frombuffer(stream.read(self.nbytes), self.dtype).reshape(self.shape)

  def mapped(self) -> np.ndarray:
    """Its values as a read-only view of the file: the operating system reads what is used, when it is used."""
    dtype = self.dtype
    if dtype is None or self.begin % dtype.itemsize or not self.nbytes:
      return self.read()
    return np.asarray(np.memmap(self.file, dtype, "r", self.begin, self.shape))


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
  """The tensors of a safetensors file by name, in the order of their bytes. Only the header is read.

  The safetensors library checks the header first: byte ranges that overlap, leave the file or contradict a shape are
  its errors.

  Raises:
    ImportError: without safetensors, which the extra `jaxlora[peft]` installs.
    OSError, ValueError, safetensors.SafetensorError: if the file cannot be read as safetensors.
  """
  import safetensors

  with safetensors.safe_open(file, framework="np"):
    pass
  with open(file, "rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(length))
  entries = [(name, about) for name, about in header.items() if name != "__metadata__"]
  return {
    name: StoredTensor(
      file, about["dtype"], tuple(about["shape"]), *(8 + length + offset for offset in about["data_offsets"])
    )
    for name, about in sorted(entries, key=lambda entry: entry[1]["data_offsets"])
  }
