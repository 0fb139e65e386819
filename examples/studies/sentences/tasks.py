"""The tasks: classification of docstrings by package, and retrieval of a docstring's body by its summary line."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import bert, package_text, text
from .bert import Params
from .package_text import Pair

TEMPERATURE = 0.05  # of the contrastive loss, as in the model's own training
DATA_SEED = 0  # one choice of texts for all runs: seeds vary the training, never the data
Batch = dict[str, np.ndarray]


class Task(NamedTuple):
  """A task to adapt to.

  Attributes:
    name: the task's.
    train: the training data.
    loss: `loss(params, batch)`, which training minimises.
    score: `score(params)`, the reported scores of plain parameters on the evaluation split.
    head: `head(key)`, fresh parameters of the head on top of the encoder.
    head_for_all: whether every method has that head, or "head alone" only.
    texts: counts of classes and texts, for the results.
  """

  name: str
  train: Batch
  loss: Callable[[Params, Batch], jax.Array]
  score: Callable[[Params], dict[str, float]]
  head: Callable[[jax.Array], Params]
  head_for_all: bool
  texts: dict[str, int]


class Sizes(NamedTuple):
  """How many texts are trained and evaluated on, and how many tokens each has."""

  per_class: int
  test_per_class: int
  pool: int
  summary: int
  body: int


def pooled(model: bert.Bert, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
  """The pooled last hidden states (batch, d)."""
  return bert.pool(model.apply({"params": params["encoder"]}, ids, mask), mask)


def classification(model: bert.Bert, tokenizer: Any, pairs: Sequence[Pair], evaluate_on: str, sizes: Sizes) -> Task:
  """Which package a docstring comes from: a linear head on the pooled states, with classes of equal size."""
  packages = sorted({pair.package for pair in pairs})

  def texts(split: str, count: int) -> tuple[text.Tokens, np.ndarray]:
    chosen = [one for package in packages for one in choose(pairs, split, count, package)]
    docstrings = [package_text.without_names(f"{pair.summary} {pair.body}") for pair in chosen]
    labels = np.array([packages.index(pair.package) for pair in chosen], np.int32)
    return text.tokenize(tokenizer, docstrings, sizes.body), labels

  def logits(params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return pooled(model, params, ids, mask) @ params["head"]["kernel"] + params["head"]["bias"]

  def loss(params: Params, batch: Batch) -> jax.Array:
    found = logits(params, batch["ids"], batch["mask"])
    return optax.softmax_cross_entropy_with_integer_labels(found, batch["label"]).mean()

  (train, labels), (test, answers) = texts("train", sizes.per_class), texts(evaluate_on, sizes.test_per_class)
  evaluate = jax.jit(logits)

  def score(params: Params) -> dict[str, float]:
    return {"accuracy": float((text.in_batches(evaluate, params, test).argmax(-1) == answers).mean())}

  def head(key: jax.Array) -> Params:
    shape = (model.config.hidden_size, len(packages))
    return {"kernel": jax.nn.initializers.lecun_normal()(key, shape), "bias": jnp.zeros(len(packages))}

  counts = {"classes": len(packages), "train": len(labels), "test": len(answers)}
  batch = {"ids": train.ids, "mask": train.mask, "label": labels}
  return Task("classification", batch, loss, score, head, head_for_all=True, texts=counts)


def retrieval(model: bert.Bert, tokenizer: Any, pairs: Sequence[Pair], evaluate_on: str, sizes: Sizes) -> Task:
  """Which body belongs to a summary: cosines of embeddings, trained against the other bodies of the batch.

      loss = -mean_i log softmax_j(cos(summary_i, body_j) / temperature)_i

  "Head alone" trains a projection of the embeddings that starts as the identity; the other methods have no head.
  """

  def texts(split: str, count: int | None) -> tuple[text.Tokens, text.Tokens]:
    chosen = choose(pairs, split, count)
    return (
      text.tokenize(tokenizer, [pair.summary for pair in chosen], sizes.summary),
      text.tokenize(tokenizer, [pair.body for pair in chosen], sizes.body),
    )

  def embed(params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    states = pooled(model, params, ids, mask)
    return bert.normalize(states @ params["head"]["kernel"] if "head" in params else states)

  def loss(params: Params, batch: Batch) -> jax.Array:
    summaries, bodies = (embed(params, batch[f"{part}_ids"], batch[f"{part}_mask"]) for part in ("summary", "body"))
    cosines = summaries @ bodies.T
    return optax.softmax_cross_entropy_with_integer_labels(cosines / TEMPERATURE, jnp.arange(len(cosines))).mean()

  train, test = texts("train", None), texts(evaluate_on, sizes.pool)
  evaluate = jax.jit(embed)

  def score(params: Params) -> dict[str, float]:
    summaries, bodies = (text.in_batches(evaluate, params, part) for part in test)
    return ranking(summaries @ bodies.T)

  def head(key: jax.Array) -> Params:
    del key
    return {"kernel": jnp.eye(model.config.hidden_size)}

  batch = {}
  for part, tokens in zip(("summary", "body"), train, strict=True):
    batch |= {f"{part}_ids": tokens.ids, f"{part}_mask": tokens.mask}
  counts = {"train": len(train[0].ids), "test": len(test[0].ids)}
  return Task("retrieval", batch, loss, score, head, head_for_all=False, texts=counts)


def ranking(similarity: np.ndarray) -> dict[str, float]:
  """Mean reciprocal rank and recall@1 of the diagonal of each row; ties count against it."""
  rank = (similarity >= np.diag(similarity)[:, None]).sum(1)
  return {"mrr": float((1 / rank).mean()), "recall@1": float((rank == 1).mean())}


def choose(pairs: Sequence[Pair], split: str, count: int | None, package: str | None = None) -> list[Pair]:
  """Up to `count` pairs of a split, of one package or of all, in a fixed random order."""
  mine = [pair for pair in pairs if pair.split == split and package in (None, pair.package)]
  order = np.random.default_rng(DATA_SEED).permutation(len(mine))
  return [mine[k] for k in order[:count]]


TASKS = {"classification": classification, "retrieval": retrieval}
