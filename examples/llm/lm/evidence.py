"""What the tables need beside the runs, kept as a file so that they are made without model and data.

`OUT/evidence/SPLIT.json` has the pairs of a split (paper, aspect, summary by people) and the baselines' scores.
"""

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

import harness

from . import baselines
from .papers import Pair

FOLDER = "evidence"


def record(out: Path, train: Sequence[Pair], pairs: Sequence[Pair], split: str) -> None:
  """Writes the file of a split."""
  known = [{"paper": pair.paper, "aspect": pair.aspect, "summary": pair.summary} for pair in pairs]
  harness.write(out / FOLDER / f"{split}.json", {"pairs": known, "baselines": baselines.results(train, pairs, split)})


def load(out: Path, split: str) -> dict[str, Any]:
  """What `record` wrote; nothing where it has not."""
  file = out / FOLDER / f"{split}.json"
  return json.loads(file.read_text()) if file.exists() else {"pairs": [], "baselines": []}
