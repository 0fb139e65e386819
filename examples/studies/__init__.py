"""The parts of the studies, a folder each, and what they share with the benchmarks.

Neither this folder nor `benchmarks/` is installed: importing this package puts `benchmarks/` on the import path. Every
study then takes what it shares from here: `from studies import harness`.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import adapt_digits
import digits
import harness
import methods

__all__ = ["adapt_digits", "digits", "harness", "methods"]
