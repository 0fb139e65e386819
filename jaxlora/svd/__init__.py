"""Singular values and low-rank factors: of any matrix, and of an adapter's own update, which is never formed.

    jaxlora.svd.spectrum(tree)                                      # the singular values of every update
    smaller, report = jaxlora.svd.compress_with_report(tree, energy=0.95)
    tree = jaxlora.svd.extract(base_params, tuned_params, rank=8)   # a full fine-tune turned into an adapter

Functions that lose something have a partner `..._with_report`, which returns a `Truncation` as well.
"""

from jaxlora._base.matrix import LowRank
from jaxlora.svd._compress import compress, compress_with_report
from jaxlora.svd._extract import extract, extract_with_report
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
  "compress_with_report",
  "extract",
  "extract_with_report",
  "low_rank",
  "spectrum",
]
