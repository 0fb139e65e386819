"""Real text that every installation carries: docstrings, as pairs of a body and its summary line (PEP 257).

They come from the standard library and from the packages that `jaxlora[bench]` installs, parsed and never imported.
Which versions are installed differs from machine to machine, and with them the data: a digest names them.
"""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
import json
from pathlib import Path
import platform
import re
import sysconfig
from typing import Any, NamedTuple
import warnings

from decoder import END, PAD
from digits import digest
import harness
import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# What is installed in any case: jaxlora's own requirements and its extra `bench`; with whatever these bring.
ROOTS = (
  *("jax", "flax", "optax", "orbax-checkpoint", "chex"),
  *("matplotlib", "rouge-score", "scikit-learn", "tokenizers", "tqdm"),
)
STANDARD = "python"  # the standard library, among the distributions
# A package is in one split whole: what is tested on is text of authors whom the model has not read.
VALIDATION = ("flax", "huggingface-hub", "pillow")
TEST = ("fonttools", "matplotlib", "nltk", "optax")
NOT_OURS = {
  *("test", "tests", "testing", "idlelib", "lib2to3", "site-packages"),
  *("_vendor", "vendor", "_vendored", "externals"),
}

SHINGLE = 8  # words in a row that count as copied
COPIED = 0.5  # share of a body's shingles in the training text from which on it is a copy

SPECIAL = ("<end>", "<pad>")  # their numbers are decoder.END and decoder.PAD
PREFIX, SUMMARY = 72, 24  # tokens of a body with its end, and of a summary with its
WINDOW = 128  # tokens of a piece of running text
PIECES = 64  # of the held-out text are measured
HELD_OUT = 0.02  # share of the training pairs, and of the reference's topics, that nothing is trained on


class Pair(NamedTuple):
  """A docstring: what follows its summary line, and that line."""

  package: str
  body: str
  summary: str


class Corpus(NamedTuple):
  """Pairs by split, the text of the language reference, and how all of it came about."""

  train: list[Pair]
  validation: list[Pair]
  test: list[Pair]
  reference: list[str]
  report: dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------------
# Which files.


def distributions(roots: Sequence[str] = ROOTS) -> dict[str, str]:
  """The versions of `roots` and of everything that they need, where installed, by canonical name."""
  found: dict[str, str] = {}
  pending = [canonicalize_name(root) for root in roots]
  while pending:
    name = pending.pop()
    if name in found:
      continue
    try:
      one = metadata.distribution(name)
    except metadata.PackageNotFoundError:
      continue
    found[name] = one.version
    for need in map(Requirement, one.requires or ()):
      if not need.marker or need.marker.evaluate({"extra": ""}):
        pending.append(canonicalize_name(need.name))
  return dict(sorted(found.items()))


def files_of(name: str) -> list[Path]:
  """The Python sources of a distribution, or of the standard library; tests and vendored packages are left out."""
  if name == STANDARD:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path.relative_to(root) for path in root.rglob("*.py")]
  else:
    files, root = metadata.distribution(name).files or [], Path(str(metadata.distribution(name).locate_file("")))
    files = [Path(path) for path in files if path.suffix == ".py"]
  return [root / path for path in sorted(files) if not NOT_OURS & set(path.parts) and ".." not in path.parts]


# ----------------------------------------------------------------------------------------------------------------------
# From a file to pairs.


def documented(tree: ast.AST) -> Iterator[ast.AST]:
  """Modules, classes and functions, however deep; expressions are not walked."""
  if isinstance(tree, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
    yield tree
  for field in ("body", "orelse", "handlers", "finalbody"):
    for child in getattr(tree, field, ()):
      yield from documented(child)


def docstrings(path: Path) -> Iterator[str]:
  """The docstrings of a file, with their indentation taken off; a file that is no Python has none."""
  try:
    with warnings.catch_warnings(action="ignore"):  # other people's escape sequences
      tree = ast.parse(path.read_bytes())
  except (OSError, SyntaxError, ValueError, RecursionError):
    return
  for node in documented(tree):
    text = ast.get_docstring(node)
    if text:
      yield text


def clean(text: str) -> str:
  """One space between words, one line break between lines, no rulers."""
  lines = (" ".join(line.split()) for line in text.splitlines())
  return "\n".join(line for line in lines if line and not re.fullmatch(r"[-=~^*#_+.:\s]+", line))


def words(text: str) -> list[str]:
  """Lower-case words, by which texts are compared."""
  return re.findall(r"[a-z0-9]+", text.lower())


def as_pair(package: str, text: str) -> Pair | None:
  """A docstring as PEP 257 wants it, one summary line, a blank line, a body; None for any other."""
  head, _, rest = text.strip().partition("\n\n")
  summary, body = " ".join(head.split()), clean(rest)
  if "\n" in head or not 10 <= len(summary) <= 90 or summary[0] in ":.>@%" or len(words(summary)) < 3:
    return None
  return Pair(package, body, summary) if len(words(body)) >= SHINGLE else None


# ----------------------------------------------------------------------------------------------------------------------
# Nothing of the test packages has been seen.


def shingles(body: str) -> set[tuple[str, ...]]:
  """Every run of a few words."""
  tokens = words(body)
  return {tuple(tokens[k : k + SHINGLE]) for k in range(len(tokens) - SHINGLE + 1)}


def without_repeats(pairs: Iterable[Pair], dropped: Counter[str]) -> list[Pair]:
  """Pairs whose body is new, and does not hold the summary word for word."""
  seen: set[str] = set()
  kept = []
  for pair in pairs:
    body, summary = " ".join(words(pair.body)), " ".join(words(pair.summary))
    if body in seen:
      dropped["the same body again"] += 1
    elif summary in body:
      dropped["summary word for word in the body"] += 1
    else:
      kept.append(pair)
    seen.add(body)
  return kept


def unseen(pairs: Sequence[Pair], read: Sequence[Pair], dropped: Counter[str]) -> list[Pair]:
  """Pairs that nobody has copied: neither their summary nor most of their body is in what has been read."""
  summaries = {" ".join(words(pair.summary)) for pair in read}
  known = set().union(*(shingles(pair.body) for pair in read))
  kept = []
  for pair in pairs:
    runs = shingles(pair.body)
    if " ".join(words(pair.summary)) in summaries:
      dropped["summary known from another split"] += 1
    elif len(runs & known) > COPIED * len(runs):
      dropped["body copied from another split"] += 1
    else:
      kept.append(pair)
  return kept


def split_of(package: str) -> str:
  """Which split a package belongs to."""
  return "test" if package in TEST else "validation" if package in VALIDATION else "train"


def collect(only: Sequence[str] | None = None) -> Corpus:
  """Reads the installed packages, or those of `only` that are installed.

  Raises:
    ValueError: if a split has no pair, naming the packages that it could come from.
  """
  found = {STANDARD: platform.python_version(), **distributions()}
  taken = {name: version for name, version in found.items() if only is None or name in only}
  dropped: Counter[str] = Counter()
  splits: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
  for name in taken:
    texts = (text for path in files_of(name) for text in docstrings(path))
    splits[split_of(name)] += [pair for text in texts if (pair := as_pair(name, text))]
  train = without_repeats(splits["train"], dropped)
  validation = unseen(without_repeats(splits["validation"], dropped), train, dropped)
  test = unseen(without_repeats(splits["test"], dropped), [*train, *validation], dropped)
  for kind, pairs in (("train", train), ("validation", validation), ("test", test)):
    if not pairs:
      names = {"train": (STANDARD, *ROOTS), "validation": VALIDATION, "test": TEST}[kind]
      raise ValueError(f"no docstring to be found for the {kind} split; expected packages among {', '.join(names)}")
  reference = [clean(text) for text in reference_topics()]
  everything = [*train, *validation, *test]
  report = {
    "packages": {
      name: {"version": version, "split": split_of(name), "pairs": sum(pair.package == name for pair in everything)}
      for name, version in taken.items()
    },
    "pairs": {"train": len(train), "validation": len(validation), "test": len(test)},
    "dropped": dropped,
    "reference_topics": len(reference),
    "digest": digest([everything, reference]),
  }
  return Corpus(train, validation, test, reference, report)


def reference_topics() -> list[str]:
  """The language reference's own text, by topic; parsed, like everything else."""
  path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
  tree = ast.parse(path.read_bytes())
  (topics,) = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
  return [text for _, text in sorted(topics.items())]


# ----------------------------------------------------------------------------------------------------------------------
# As tokens.


class Rows(NamedTuple):
  """Pairs in a layout of fixed places: every summary begins at the same one.

  Attributes:
    tokens: (count, PREFIX + SUMMARY): padding, body, END; summary, END, padding.
    valid: of the same shape, False in the padding before the body.
  """

  tokens: np.ndarray
  valid: np.ndarray


class Data(NamedTuple):
  """What everything is trained and measured on.

  Attributes:
    tokenizer: byte-level BPE, trained on the training split alone.
    stream: (count,), the pretraining text: bodies and the language reference, END before each.
    held_out: (count, WINDOW + 1), pieces of such text that was kept back.
    train, validation, test: pairs as tokens.
    pairs: the test pairs as text.
    report: what the data are, for the results.
  """

  tokenizer: Tokenizer
  stream: np.ndarray
  held_out: np.ndarray
  train: Rows
  validation: Rows
  test: Rows
  pairs: list[Pair]
  report: dict[str, Any]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
  """Byte-level BPE: every text has tokens, and comes back from them as it was."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
  """The tokens of each text."""
  return [one.ids for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def as_rows(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Rows:
  """Pairs as tokens; a body that is too long loses its end, and so does a summary."""
  tokens = np.full((len(pairs), PREFIX + SUMMARY), PAD, np.int32)
  valid = np.ones(tokens.shape, bool)
  bodies, summaries = (encode(tokenizer, texts) for texts in zip(*(pair[1:] for pair in pairs), strict=True))
  for k, (body, summary) in enumerate(zip(bodies, summaries, strict=True)):
    body = [*body[: PREFIX - 1], END]
    tokens[k, PREFIX - len(body) : PREFIX] = body
    valid[k, : PREFIX - len(body)] = False
    summary = [*summary[: SUMMARY - 1], END]
    tokens[k, PREFIX : PREFIX + len(summary)] = summary
  return Rows(tokens, valid)


def as_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
  """Texts one after the other, END before each."""
  return np.concatenate([[END, *ids] for ids in encode(tokenizer, texts)]).astype(np.int32)


def sample(pairs: Sequence[Pair], count: int) -> list[Pair]:
  """About `count` pairs, as many from every package where it has them; the same ones for everybody."""
  rng = np.random.default_rng(0)
  packages = sorted({pair.package for pair in pairs})
  picked = []
  for package in packages:
    mine = [pair for pair in pairs if pair.package == package]
    picked += [mine[k] for k in rng.permutation(len(mine))[: -(-count // len(packages))]]
  return picked


def hold_out(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
  """What is kept and what is held out of a list; the same for everybody."""
  out = set(np.random.default_rng(0).permutation(len(items))[: max(1, round(HELD_OUT * len(items)))].tolist())
  return [item for k, item in enumerate(items) if k not in out], [items[k] for k in sorted(out)]


def as_data(corpus: Corpus, vocabulary: int, validation: int, test: int) -> Data:
  """Holds text out, trains the tokenizer on the rest of the training split, and makes tokens of it all."""
  train, held_out = hold_out(corpus.train)
  topics, held_out_topics = hold_out(corpus.reference)
  held_out = unseen(held_out, train, Counter())
  texts = [*topics, *(pair.body for pair in train)]
  tokenizer = train_tokenizer([*texts, *(pair.summary for pair in train)], vocabulary)
  order = np.random.default_rng(0).permutation(len(texts))
  held = as_stream(tokenizer, [*held_out_topics, *(pair.body for pair in held_out)])
  pieces = held[: len(held) // (WINDOW + 1) * (WINDOW + 1)].reshape(-1, WINDOW + 1)
  pieces = np.random.default_rng(0).permutation(pieces)[:PIECES]
  pairs = sample(corpus.test, test)
  rows = {"train": train, "validation": sample(corpus.validation, validation), "test": pairs}
  data = Data(
    tokenizer,
    stream=as_stream(tokenizer, [texts[k] for k in order]),
    held_out=pieces,
    **{name: as_rows(tokenizer, some) for name, some in rows.items()},
    pairs=pairs,
    report=corpus.report,
  )
  used = {name: len(some) for name, some in rows.items()}
  tokens = {"vocabulary": tokenizer.get_vocab_size(), "pretraining": len(data.stream), "held_out": int(pieces.size)}
  tokens |= {"prefix": PREFIX, "summary": SUMMARY}
  arrays = [data.stream, data.held_out, *data.train, *data.validation, *data.test]
  report = {**corpus.report, "used": used, "tokens": tokens, "digest": digest(corpus.report["digest"], arrays)}
  return data._replace(report=report)


def load(only: Sequence[str] | None, vocabulary: int, validation: int, test: int, cache: Path | None) -> Data:
  """The data; the pairs are kept on disk, since parsing takes longer than everything else here.

  Raises:
    ValueError: if a split has no pair.
  """
  versions = {STANDARD: platform.python_version(), **distributions()}
  name = digest([Path(__file__).read_text(), versions, sorted(only) if only else None])
  path = cache / f"docstrings-{name}.json" if cache else None
  if path and path.exists():
    kept = json.loads(path.read_text())
    splits = ([Pair(*pair) for pair in kept[split]] for split in ("train", "validation", "test"))
    corpus = Corpus(*splits, kept["reference"], kept["report"])
  else:
    corpus = collect(only)
    if path:
      harness.write(path, corpus._asdict())
  return as_data(corpus, vocabulary, validation, test)
