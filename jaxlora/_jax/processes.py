"""Processes of one run (`jax.distributed`) that wait for each other, and not without end."""

import time

try:
  from jax._src import distributed
except ImportError:  # a JAX that moved it: nobody waits here, and JAX's own barriers have no error of ours
  distributed = None  # type: ignore[assignment]

_PAUSE = 0.05  # seconds


def all_meet(place: str, seconds: float) -> bool:
  """Whether every process of the run came to a place of this name within some time. A lone process need not wait.

  A process that once gave up here has been here more often than the others. The service tells it so at its next visit
  at once, and it asks again; when time is up it gives up for good.
  """
  client = getattr(getattr(distributed, "global_state", None), "client", None)
  if client is None:
    return True
  until = time.monotonic() + seconds
  while (left := until - time.monotonic()) > 0:
    try:
      client.wait_at_barrier(place, max(1, int(1000 * left)))
      return True
    except Exception as error:  # one visit behind, say
      if "DEADLINE_EXCEEDED" in str(error):
        return False
      time.sleep(_PAUSE)
  return False
