"""The parts of the language model's example, one job each; the scripts beside this folder are made of them.

`model` (the network), `gguf_file` and `tokens` (a model's file, its tokenizer and chat template), `papers` (the data),
`rows` (padded batches) and `packing` (several pairs in a row), `methods` (what trains), `training` (the loop),
`decoding`, `scores` and `plain_text` (the evaluation), `serving` (adapters side by side), `runs` (one run, from its
settings to its result), `tables`, `comparisons`, `bootstrap`, `evidence` and `plots` (finished runs), `beside`,
`side_jaxlora`, `side_peft` and `memory` (the same steps in two frameworks).

What they share with the benchmarks (files, versions, intervals) is in `benchmarks/harness`, which is not installed:
importing this package puts `benchmarks/` on the import path.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
