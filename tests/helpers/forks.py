"""Processes that are cheap to start: children of one that has imported everything and has run nothing of JAX yet.

`Forks().run(job, *args)` forks a child that runs one of the `JOBS`. What a child says comes back line by line; the
caller may kill it at any moment.
"""

from collections.abc import Iterator
import json
import os
from pathlib import Path
import resource
import signal
import socket
import subprocess
import sys
import traceback


class Forks:
  """The caller's side."""

  def __init__(self):
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *sys.path])
    self._parent = subprocess.Popen(
      [sys.executable, __file__],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )

  def run(self, job: str, *args) -> Iterator[list]:
    """What the child says: `["pid", number]` first, `["gone", status]` last."""
    self._parent.stdin.write(json.dumps([job, args]) + "\n")
    self._parent.stdin.flush()
    line, pid = json.loads(self._parent.stdout.readline()), 0
    try:
      while line[0] != "gone":
        pid = line[1] if line[0] == "pid" else pid
        yield line
        line = json.loads(self._parent.stdout.readline())
      yield line
    finally:
      if line[0] != "gone":  # the caller lost interest: nobody is left behind
        os.kill(pid, signal.SIGKILL)
        while json.loads(self._parent.stdout.readline())[0] != "gone":
          pass

  def close(self) -> None:
    self._parent.stdin.close()
    self._parent.wait()
    self._parent.stdout.close()


# ----------------------------------------------------------------------------------------------------------------------
# The children's side.


OUT = 1


def say(*line) -> None:
  os.write(OUT, (json.dumps(line) + "\n").encode())


def numbered(number: int):
  """A base, and a tree whose factors all are one number."""
  import numpy as np

  import jaxlora

  base = np.arange(64, dtype=np.float32).reshape(8, 8)
  factor = np.full((2, 8), number, np.float32)
  tree = {
    f"layer_{k}": {"kernel": jaxlora.LoraWeight(base, factor, factor, rank=2, alpha=2.0), "bias": base[0]}
    for k in range(4)
  }
  return {name: {"kernel": base, "bias": base[0]} for name in tree}, tree


def save_on(path: str, number: int) -> None:
  """Saves one adapter after the other over the same path."""
  from jaxlora import checkpoint

  say("ready")
  while True:
    number += 1
    checkpoint.save(path, numbered(number)[1], metadata={"number": number})
    say("saved", number)


def train_on(path: str) -> None:
  """Saves one step of a training run after the other."""
  import jax
  import numpy as np

  from jaxlora import checkpoint

  key = jax.device_put(np.array([0, 7], np.uint32))
  with checkpoint.Manager(path, max_to_keep=2) as manager:
    number = manager.latest_step() or 0
    say("ready")
    while True:
      number += 1
      tree = numbered(number)[1]
      manager.save(number, tree, {"moment": tree["layer_0"]["kernel"].a}, data={"number": number}, key=key)
      say("saved", number - 1)  # the one before is on disk once the next begins


def command_lines(*commands: list[str]) -> None:
  """Runs one command line after the other, and says their codes and the most memory that was resident until then."""
  from jaxlora import _cli

  for arguments in commands:
    code = _cli.main(arguments)
    say("code", code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def hosts(job: str, count: int, devices: int, *args) -> None:
  """Runs a job of `tests/checkpoint/hosts.py` as several processes of one run; each says what it says with its number.

  Once one of them is gone otherwise than by itself, all are killed, as a scheduler does it.
  """
  from tests.checkpoint import hosts

  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  left: dict[int, int] = {}
  for process in range(count):
    if not (pid := os.fork()):
      code = 1
      try:
        hosts.start(process, count, devices, port)
        hosts.JOBS[job](lambda *line, process=process: say(process, *line), *args)
        code = 0
      except BaseException:
        traceback.print_exc()
      os._exit(code)
    left[pid] = process
  while left:
    pid, status = os.wait()
    say(left.pop(pid), "gone", status)
    if status:
      for other in left:
        os.kill(other, signal.SIGKILL)


JOBS = {job.__name__: job for job in (save_on, train_on, command_lines, hosts)}


def serve() -> None:
  global OUT
  OUT = os.dup(1)
  os.dup2(2, 1)  # what a job prints is no part of what it says
  import jax  # noqa: F401
  import orbax.checkpoint  # noqa: F401

  from jaxlora import checkpoint  # noqa: F401

  for line in sys.stdin:
    job, args = json.loads(line)
    child = os.fork()
    if not child:
      try:
        say("pid", os.getpid())
        JOBS[job](*args)
      except BaseException:
        traceback.print_exc()
        os._exit(1)
      os._exit(0)
    say("gone", os.waitpid(child, 0)[1])


if __name__ == "__main__":
  serve()
