"""The memory of this process, from Linux: its peak and its pages. No framework is imported: it would count, too."""

from collections.abc import Mapping
import os
from pathlib import Path
import resource
import sys

_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
  """The environment in which glibc asks Linux for huge pages; what it says of them already stays."""
  said = environment.get(_TUNABLES, "")
  if _HUGE_PAGES in said:
    return dict(environment)
  return {**environment, _TUNABLES: ":".join(filter(None, [said, f"{_HUGE_PAGES}=1"]))}


def with_huge_pages() -> None:
  """Begins this program anew where large arrays get huge pages; nothing where it runs so, or is not on Linux.

  glibc looks once, at the start of a process. A training step makes a gigabyte of arrays anew: in pages of 4 kB these
  are 290,000 faults, and products look that many pages up.
  """
  environment = huge_pages(os.environ)
  if sys.platform == "linux" and environment != dict(os.environ):
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def peak() -> int:
  """The most bytes that the process has held at once since it began, or since `reset`."""
  status = Path("/proc/self/status")
  lines = status.read_text().splitlines() if status.exists() else []
  found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
  return found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset() -> bool:
  """Begins to look for the peak anew; whether the system can do that."""
  try:
    Path("/proc/self/clear_refs").write_text("5")
  except OSError:
    return False
  return True
