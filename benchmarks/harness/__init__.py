"""The harness of every benchmark and study: one module per job, all of them used through this face.

`options` (command lines and folders), `timing` (interleaved rounds), `provenance` (versions, hardware, digests),
`results` (files, resumable runs, the progress bar), `intervals`, `tables` and `plots`.
"""

from .intervals import interval
from .options import (
  ROOT,
  add_layers,
  add_sizes,
  check_folders,
  check_writable,
  folder,
  make_parser,
  parse,
  positive,
  rename,
  several,
)
from .plots import Panel, plot_bars
from .provenance import PEERS, cpu, digest, hardware, installed, provenance, settings, source_digest, versions
from .results import Runs, progress, publish, say_interrupted, ticker, write
from .tables import (
  conditions,
  described,
  documented,
  exact_cell,
  markdown,
  milliseconds,
  percent_cell,
  ratio_cell,
  table,
)
from .timing import CONTROL, calls_per_turn, interleave, inverse, ratios, summarize, with_control

__all__ = [
  "CONTROL",
  "PEERS",
  "ROOT",
  "Panel",
  "Runs",
  "add_layers",
  "add_sizes",
  "calls_per_turn",
  "check_folders",
  "check_writable",
  "conditions",
  "cpu",
  "described",
  "digest",
  "documented",
  "exact_cell",
  "folder",
  "hardware",
  "installed",
  "interleave",
  "interval",
  "inverse",
  "make_parser",
  "markdown",
  "milliseconds",
  "parse",
  "percent_cell",
  "plot_bars",
  "positive",
  "progress",
  "provenance",
  "publish",
  "ratio_cell",
  "ratios",
  "rename",
  "say_interrupted",
  "settings",
  "several",
  "source_digest",
  "summarize",
  "table",
  "ticker",
  "versions",
  "with_control",
  "write",
]
