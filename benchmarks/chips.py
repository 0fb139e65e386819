"""Chips whose compilers run without them, ahead of time: how each is reached, and its makers' figures."""

from collections.abc import Iterator
import contextlib
import importlib.metadata
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

# libtpu asks for these when it is first loaded: no metadata server, no log files, and several processes on one host.
_TPU_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_LOG_DIR": "disabled",
}
# An H100 as XLA's GpuTargetConfigProto.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Chip(NamedTuple):
  """One chip.

  Attributes:
    name: as given to --chip.
    platform: as `jaxlora.wrap` calls it.
    lowered_for: the same, as JAX calls it where it lowers.
    target: arguments of `topologies.get_topology_desc`.
    packages: distributions that hold the compiler.
    extra: the extra that brings them.
    flops: FLOP/s in bfloat16.
    bandwidth: bytes/s of the memory.
    clock: Hz; None where it is not public, or says nothing.
    memory: bytes; None where the compiler itself refuses what does not fit.
    options: of the compiler.
    links: bytes/s that a chip receives from others of its slice over all of its links; None where it is one chip.
  """

  name: str
  platform: str
  lowered_for: str
  target: dict[str, str]
  packages: tuple[str, ...]
  extra: str
  flops: float
  bandwidth: float
  clock: float | None = None
  memory: int | None = None
  options: dict[str, Any] | None = None
  links: float | None = None

  @property
  def short(self) -> str:
    """The name without its topology."""
    return self.name.partition(":")[0]

  def versions(self) -> dict[str, str]:
    """Versions of the compiler's packages."""
    return {package: importlib.metadata.version(package) for package in self.packages if _is_distributed(package)}


def _tpu(name: str, flops: float, bandwidth: float, clock: float | None, links: float) -> Chip:
  target = {"platform": "tpu", "topology_name": name}
  return Chip(name, "tpu", "tpu", target, ("libtpu",), "compilers", flops, bandwidth, clock, links=links)


def slice_of(chip: Chip, topology: str) -> Chip:
  """The same chip in a slice of another topology: `4x4x4`, say."""
  name = f"{chip.short}:{topology}"
  return chip._replace(name=name, target=chip.target | {"topology_name": name})


CHIPS = {
  chip.name: chip
  for chip in (
    _tpu("v5e:2x2", 197e12, 819e9, 1.5e9, 200e9),
    _tpu("v5p:2x2x1", 459e12, 2765e9, 1.75e9, 600e9),
    _tpu("v6e:2x2", 918e12, 1640e9, None, 400e9),
    Chip(
      "h100",
      "gpu",
      "cuda",
      {"platform": "cuda", "topology": "1x1x1", "target_config": _H100},
      ("jax-cuda13-plugin", "nvidia-cuda-nvcc"),
      "compilers-gpu",
      989e12,
      3350e9,
      memory=84_942_979_072,
      options={"xla_gpu_enable_triton_gemm": False},  # all products are calls to cuBLAS, which can be counted
    ),
  )
}


class NoCompilerError(Exception):
  """A chip's compiler is not installed; says what to install."""


def stay_on_the_host() -> None:
  """Keeps JAX from looking for accelerators where there are none: an installed compiler alone is taken for one."""
  if not jax.config.jax_platforms and not _has_accelerator():
    jax.config.update("jax_platforms", "cpu")


def _has_accelerator() -> bool:
  files = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*")
  return any(next(Path("/dev").glob(pattern), None) for pattern in files)


def devices_of(chip: Chip) -> list[Any]:
  """The devices of a chip's topology: programs can be compiled for them, and not run.

  Raises:
    NoCompilerError: if its compiler is not installed.
  """
  missing = [package for package in chip.packages if not _is_distributed(package)]
  if missing:
    raise NoCompilerError(
      f"the compiler for {chip.name} needs {' and '.join(missing)}: pip install 'jaxlora[{chip.extra}]'"
    )
  with _loading(chip):
    return list(topologies.get_topology_desc(**chip.target).devices)


def device_of(chip: Chip) -> Any:
  """The first of `devices_of`, for programs of one chip."""
  return devices_of(chip)[0]


def _is_distributed(package: str) -> bool:
  try:
    importlib.metadata.distribution(package)
  except importlib.metadata.PackageNotFoundError:
    return False
  return True


@contextlib.contextmanager
def _loading(chip: Chip) -> Iterator[None]:
  """The environment in which a compiler is loaded; on a host with TPUs, its own."""
  before = dict(os.environ)
  if chip.platform == "tpu" and not _has_accelerator():
    os.environ.update(_TPU_ENVIRONMENT)
  try:
    yield
  finally:
    os.environ.clear()
    os.environ.update(before)


def is_here(device: Any) -> bool:
  """Whether this host has such a device, so that programs can be run as well."""
  return jax.devices()[0].device_kind == device.device_kind
