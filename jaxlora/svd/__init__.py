"""Singular values and low-rank factors: of any matrix, and of an adapter's own update, which is never formed."""

from jaxlora._base.matrix import LowRank
from jaxlora.svd._compress import compress
from jaxlora.svd._extract import extract
from jaxlora.svd._low_rank import low_rank
from jaxlora.svd._ranks import allocate
from jaxlora.svd._truncation import LeafTruncation, Truncation
from jaxlora.svd._update import spectrum

__all__ = [
  "LeafTruncation",
  "LowRank",
  "Truncation",
  "allocate",
  "compress",
  "extract",
  "low_rank",
  "spectrum",
]
