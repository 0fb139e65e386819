"""The text: docstrings of installed packages, as pairs of a body and its summary line (PEP 257).

They come from the standard library and from the packages that `jaxlora[bench]` installs. Files are parsed, never
imported. Installed versions differ from machine to machine, and the data with them: a digest identifies the data.
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

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from studies import harness

# Installed in every case: requirements of jaxlora and of its extra `bench`. Their own requirements are read, too.
ROOTS = (
  *("jax", "flax", "optax", "orbax-checkpoint", "chex"),
  *("matplotlib", "rouge-score", "scikit-learn", "tokenizers", "tqdm"),
)
STANDARD = "python"  # the standard library, among the distributions
# All pairs of a package are in one split, so that test pairs come from packages the model has never been trained on.
VALIDATION = ("flax", "huggingface-hub", "pillow")
TEST = ("fonttools", "matplotlib", "nltk", "optax")
SKIPPED = {  # folders with tests, and with other packages' code
  *("test", "tests", "testing", "idlelib", "lib2to3", "site-packages"),
  *("_vendor", "vendor", "_vendored", "externals"),
}

SHINGLE = 8  # words of a shingle, a run of consecutive words
COPIED = 0.5  # a body is a copy if more than this share of its shingles is in another split's text


class Pair(NamedTuple):
  """A docstring: its package, the text after its summary line, and the summary line."""

  package: str
  body: str
  summary: str


class Corpus(NamedTuple):
  """Pairs by split, the text of the language reference, and a report of counts and versions."""

  train: list[Pair]
  validation: list[Pair]
  test: list[Pair]
  reference: list[str]
  report: dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------------
# Files.


def distributions(roots: Sequence[str] = ROOTS) -> dict[str, str]:
  """Versions of `roots` and of all their requirements that are installed, by canonical name."""
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
  """The Python sources of a distribution or of the standard library, without tests and vendored packages."""
  if name == STANDARD:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path.relative_to(root) for path in root.rglob("*.py")]
  else:
    files, root = metadata.distribution(name).files or [], Path(str(metadata.distribution(name).locate_file("")))
    files = [Path(path) for path in files if path.suffix == ".py"]
  return [root / path for path in sorted(files) if not SKIPPED & set(path.parts) and ".." not in path.parts]


# ----------------------------------------------------------------------------------------------------------------------
# From a file to pairs.


def documented(tree: ast.AST) -> Iterator[ast.AST]:
  """Modules, classes and functions at any depth of statements."""
  if isinstance(tree, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
    yield tree
  for field in ("body", "orelse", "handlers", "finalbody"):
    for child in getattr(tree, field, ()):
      yield from documented(child)


def docstrings(path: Path) -> Iterator[str]:
  """The docstrings of a file, dedented; none if it cannot be parsed."""
  try:
    with warnings.catch_warnings(action="ignore"):  # invalid escape sequences in their strings
      tree = ast.parse(path.read_bytes())
  except (OSError, SyntaxError, ValueError, RecursionError):
    return
  for node in documented(tree):
    text = ast.get_docstring(node)
    if text:
      yield text


def clean(text: str) -> str:
  """Collapses spaces and blank lines, and drops lines of punctuation that underline headings."""
  lines = (" ".join(line.split()) for line in text.splitlines())
  return "\n".join(line for line in lines if line and not re.fullmatch(r"[-=~^*#_+.:\s]+", line))


def words(text: str) -> list[str]:
  """Lower-case words: texts are compared by them."""
  return re.findall(r"[a-z0-9]+", text.lower())


def as_pair(package: str, text: str) -> Pair | None:
  """A docstring in the form of PEP 257 (a summary line, a blank line, a body) as a pair; None for any other."""
  head, _, rest = text.strip().partition("\n\n")
  summary, body = " ".join(head.split()), clean(rest)
  if "\n" in head or not 10 <= len(summary) <= 90 or summary[0] in ":.>@%" or len(words(summary)) < 3:
    return None
  return Pair(package, body, summary) if len(words(body)) >= SHINGLE else None


# ----------------------------------------------------------------------------------------------------------------------
# Removing copies: no validation or test pair may be in the training text.


def shingles(body: str) -> set[tuple[str, ...]]:
  """The shingles of a body: all runs of `SHINGLE` words."""
  tokens = words(body)
  return {tuple(tokens[k : k + SHINGLE]) for k in range(len(tokens) - SHINGLE + 1)}


def without_repeats(pairs: Iterable[Pair], dropped: Counter[str]) -> list[Pair]:
  """Pairs without repeated bodies, and without bodies that contain their summary; counts the others in `dropped`."""
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
  """Pairs of which neither the summary nor most of the body is in `read`; counts the others in `dropped`."""
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
  """The split of a package."""
  return "test" if package in TEST else "validation" if package in VALIDATION else "train"


def collect(only: Sequence[str] | None = None) -> Corpus:
  """Reads the docstrings of all installed packages, or of those in `only`.

  Raises:
    ValueError: if a split has no pair, naming the packages that it is taken from.
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
    "digest": harness.digest([everything, reference]),
  }
  return Corpus(train, validation, test, reference, report)


def reference_topics() -> list[str]:
  """The topics of the language reference, which the standard library holds as a dict of strings; parsed, too."""
  path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
  tree = ast.parse(path.read_bytes())
  (topics,) = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
  return [text for _, text in sorted(topics.items())]


def read(only: Sequence[str] | None, cache: Path | None) -> Corpus:
  """`collect(only)`, from `cache` where it is kept: parsing takes longer than all other work on the data.

  Raises:
    ValueError: if a split has no pair.
  """
  versions = {STANDARD: platform.python_version(), **distributions()}
  name = harness.digest([Path(__file__).read_text(), versions, sorted(only) if only else None])
  path = cache / f"docstrings-{name}.json" if cache else None
  if path and path.exists():
    kept = json.loads(path.read_text())
    splits = ([Pair(*pair) for pair in kept[split]] for split in ("train", "validation", "test"))
    return Corpus(*splits, kept["reference"], kept["report"])
  corpus = collect(only)
  if path:
    harness.write(path, corpus._asdict())
  return corpus
