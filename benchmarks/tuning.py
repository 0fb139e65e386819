"""Pretraining, and one run of adaptation: trained by LoRA or whole, scored by ROUGE and on the pretraining text."""

from collections.abc import Callable, Iterator
import functools
import inspect
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import decoder
from decoder import END, PAD, Decoder, Params
from digits import digest
from docstrings import PREFIX, SUMMARY, WINDOW, Data, Rows
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rouge_score import rouge_scorer

import jaxlora

HERE = Path(__file__).resolve().parent
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ALPHA = 32  # for every rank, so that the update's scale falls with it: 32 / rank, as in arXiv:2106.09685, section 4.1
PLACEMENTS = {"all-linear": "all-linear", "attention": "attention", "MLP": r".*/(mlp_in|mlp_out)/kernel"}
CHUNK = 100  # rows that are scored at once
KEEP = 100  # steps of pretraining between two writes


# ----------------------------------------------------------------------------------------------------------------------
# The methods: LoRA and full fine-tuning differ in which half of the parameters trains, and in nothing else.


class Method(NamedTuple):
  """What trains: A and B of some kernels, or everything where the rank is None."""

  rank: int | None
  placement: str = "all-linear"

  def name(self) -> str:
    """As tables say it."""
    return "full fine-tuning" if self.rank is None else f"LoRA r={self.rank}, {self.placement}"


FULL = Method(None)


def split(model: Decoder, method: Method, params: Params, seed: int) -> tuple[Any, Any]:
  """The frozen and the trainable half before the first step."""
  if method.rank is None:
    return {}, params
  config = jaxlora.LoraConfig(rank=method.rank, alpha=ALPHA, targets=PLACEMENTS[method.placement])
  tokens, valid = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
  probe = lambda params: model.apply({"params": params}, tokens, valid)[0]
  return jaxlora.split(jaxlora.adapt(params, config, jax.random.key(seed), probe=probe))


def join(method: Method, frozen: Any, trainable: Any) -> Any:
  """What the model takes."""
  return trainable if method.rank is None else jaxlora.join(frozen, trainable)


# ----------------------------------------------------------------------------------------------------------------------
# Losses and steps.


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Nats per token that is no padding."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return (losses * (targets != PAD)).sum() / (targets != PAD).sum()


def text_loss(apply: Callable[..., Any], params: Any, pieces: jax.Array) -> jax.Array:
  """The loss on running text (batch, WINDOW + 1)."""
  logits, _ = apply({"params": params}, pieces[:, :-1], jnp.ones_like(pieces[:, :-1], bool))
  return cross_entropy(logits, pieces[:, 1:])


def summary_loss(apply: Callable[..., Any], params: Any, rows: Rows) -> jax.Array:
  """The loss on summaries, given their bodies."""
  logits, _ = apply({"params": params}, rows.tokens[:, :-1], rows.valid[:, :-1], last=SUMMARY)
  return cross_entropy(logits, rows.tokens[:, -SUMMARY:])


def schedule(lr: float, steps: int) -> np.ndarray:
  """The rate of every step: up over a tenth of them, down to zero by a cosine."""
  rate = optax.warmup_cosine_decay_schedule(0.0, lr, max(1, steps // 10), steps)
  return np.asarray([rate(k + 1) for k in range(steps)], np.float32)


def make_step(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
  """A step of Adam, jitted; the rate is an argument, so that a sweep over rates compiles once."""
  tx = optax.scale_by_adam()

  @jax.jit
  def step(trainable, opt_state, frozen, batch, rate):
    value, grads = jax.value_and_grad(loss)(trainable, frozen, batch)
    updates, opt_state = tx.update(grads, opt_state, trainable)
    return jax.tree.map(lambda p, u: p - rate * u, trainable, updates), opt_state, value

  return step


def init_adam(trainable: Any) -> Any:
  """Adam's state before the first step of `make_step`."""
  return optax.scale_by_adam().init(trainable)


class Program(NamedTuple):
  """A method's compiled step, and the sizes that all its runs share."""

  step: Callable[..., Any]
  trainable: int
  optimizer_bytes: int
  temp_bytes: int
  flops: float


@functools.lru_cache
def apply_of(model: Decoder) -> Callable[..., Any]:
  """The wrapped apply function; what cannot stay factored is an error here."""
  return jaxlora.wrap(model.apply, on_materialize="error")


def compile_step(model: Decoder, method: Method, params: Params, batch: Rows) -> Program:
  """Compiles a method's step ahead of time, for all rates and seeds."""
  apply = apply_of(model)
  frozen, trainable = split(model, method, params, seed=0)
  opt_state = init_adam(trainable)
  step = make_step(lambda trainable, frozen, batch: summary_loss(apply, join(method, frozen, trainable), batch))
  compiled = step.lower(trainable, opt_state, frozen, batch, np.float32(0)).compile()
  return Program(
    step=compiled,
    trainable=sum(leaf.size for leaf in jax.tree.leaves(trainable)),
    optimizer_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state)),
    temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
    flops=compiled.cost_analysis()["flops"],
  )


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining.


def windows(stream: np.ndarray, batch_size: int, steps: int) -> Iterator[np.ndarray]:
  """Pieces of the stream from anywhere; the same for everybody."""
  rng = np.random.default_rng(0)
  for _ in range(steps):
    starts = rng.integers(0, len(stream) - WINDOW, batch_size)
    yield stream[starts[:, None] + np.arange(WINDOW + 1)]


def pretrain(
  model: Decoder, data: Data, steps: int, batch_size: int, lr: float, cache: Path | None, tick: Callable[[int], Any]
) -> tuple[Params, str]:
  """Pretrained parameters and their name, from the cache where it has them; `tick` hears of every step done.

  How far it got is kept every `KEEP` steps, so that an interrupted pretraining goes on.
  """
  source = [inspect.getsource(part) for part in (decoder.Attention, decoder.Block, Decoder)]
  settings = {"model": model.settings(), "steps": steps, "batch_size": batch_size, "lr": lr, "source": source}
  name = digest(settings, [data.stream])
  path = cache / f"decoder-{name}.msgpack" if cache else None
  params = decoder.init(model, seed=0)
  state = {"params": params, "adam": init_adam(params), "done": 0}
  if path and path.exists():
    state = serialization.from_bytes(state, path.read_bytes())
  done = state["done"]
  tick(done)
  if done == steps:
    return state["params"], name
  step = make_step(lambda params, frozen, pieces: text_loss(model.apply, params, pieces))
  plan = zip(windows(data.stream, batch_size, steps), schedule(lr, steps), strict=True)
  for pieces, rate in itertools.islice(plan, done, None):
    params, adam, _ = step(state["params"], state["adam"], {}, pieces, rate)
    state = {"params": params, "adam": adam, "done": state["done"] + 1}
    tick(1)
    if path and (state["done"] % KEEP == 0 or state["done"] == steps):
      keep(path, serialization.to_bytes(state))
  return state["params"], name


def keep(path: Path, content: bytes) -> None:
  """Writes under another name first: a reader sees the old file or the new one."""
  partial = path.with_suffix(".partial")
  partial.write_bytes(content)
  partial.replace(path)


@functools.lru_cache
def source_digest() -> str:
  """Names the code that made a result: after a change, old runs are no longer picked up."""
  package = Path(jaxlora.__file__).parent
  files = [*sorted(package.glob("*.py")), *(HERE / f"{name}.py" for name in ("decoder", "docstrings", "tuning"))]
  return digest([file.read_text() for file in files])


# ----------------------------------------------------------------------------------------------------------------------
# Scores.


def take(rows: Rows, index: Any) -> Rows:
  """Some rows."""
  return Rows(rows.tokens[index], rows.valid[index])


@functools.partial(jax.jit, static_argnums=0)
def _text_loss(model: Decoder, params: Params, pieces: jax.Array) -> jax.Array:
  return text_loss(model.apply, params, pieces)


@functools.partial(jax.jit, static_argnums=0)
def _summary_loss(model: Decoder, params: Params, rows: Rows) -> jax.Array:
  return summary_loss(model.apply, params, rows)


def decode(model: Decoder, data: Data, params: Params, width: int) -> list[str]:
  """The summaries of the test pairs by plain parameters."""
  written = []
  for begin in range(0, len(data.pairs), CHUNK):
    index = np.minimum(np.arange(begin, begin + min(CHUNK, len(data.pairs))), len(data.pairs) - 1)  # one shape for all
    rows = take(data.test, index)
    prefix, valid = rows.tokens[:, :PREFIX], rows.valid[:, :PREFIX]
    tokens = decoder.decode(model, model.apply, params, prefix, valid, SUMMARY, width)
    written += np.asarray(tokens)[: len(data.pairs) - begin].tolist()
  ids = [[token for token in tokens if token not in (END, PAD)] for tokens in written]
  return [" ".join(text.split()) for text in data.tokenizer.decode_batch(ids)]


def rouge(data: Data, summaries: list[str]) -> dict[str, float]:
  """F1 in percent, with stemming, over the test pairs."""
  scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)
  scores = [scorer.score(pair.summary, text) for pair, text in zip(data.pairs, summaries, strict=True)]
  return {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE}


def lead(data: Data) -> list[str]:
  """What needs no model: the body's first sentence, or as much of it as a summary may hold."""
  return [" ".join(pair.body.replace("\n", " ").split(". ")[0].split()[:12]) for pair in data.pairs]


def evaluate(model: Decoder, data: Data, params: Params, widths: list[int], examples: int = 0) -> dict[str, Any]:
  """Every figure of plain parameters; ROUGE by decoding with each of `widths`."""
  result: dict[str, Any] = {
    "validation_loss": float(_summary_loss(model, params, data.validation)),
    "pretraining_loss": float(_text_loss(model, params, data.held_out)),
  }
  for width in widths:
    summaries = decode(model, data, params, width)
    result |= {name if width == 1 else f"{name}_beam": score for name, score in rouge(data, summaries).items()}
    if width == 1 and examples:
      every = max(1, len(data.pairs) // examples)
      result["examples"] = [
        {**pair._asdict(), "written": text} for pair, text in [*zip(data.pairs, summaries, strict=True)][::every]
      ][:examples]
  return result


# ----------------------------------------------------------------------------------------------------------------------
# One run.


def batches(rows: Rows, batch_size: int, steps: int, seed: int) -> Iterator[Rows]:
  """Shuffled batches, epoch after epoch; the seed alone decides them, so that every method sees the same."""
  rng = np.random.default_rng(seed)
  count = len(rows.tokens)
  order = np.concatenate([rng.permutation(count) for _ in range(-(-steps * batch_size // count))])
  for index in order[: steps * batch_size].reshape(steps, batch_size):
    yield take(rows, index)


def file_bytes(trainable: Any) -> int:
  """The size of a file of what was trained: a plain dict of arrays."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(trainable)
  named = {jax.tree_util.keystr(place, simple=True, separator="/"): np.asarray(leaf) for place, leaf in leaves}
  return len(serialization.msgpack_serialize(named))


class Run(NamedTuple):
  """One training: with what, at which peak rate, from which seed, and what is measured then."""

  method: Method
  lr: float
  seed: int
  widths: tuple[int, ...] = ()


def run(
  one: Run, program: Program, model: Decoder, data: Data, base: Params, steps: int, batch_size: int, tick: Any
) -> dict[str, Any]:
  """Trains from the base, and returns what came of it."""
  frozen, trainable = split(model, one.method, base, one.seed)
  opt_state, losses = init_adam(trainable), []
  for batch, rate in zip(batches(data.train, batch_size, steps, one.seed), schedule(one.lr, steps), strict=True):
    trainable, opt_state, loss = program.step(trainable, opt_state, frozen, batch, rate)
    losses.append(loss)
    tick(1)
  result = {
    "seed": one.seed,
    "learning_rate": one.lr,
    "train_loss": float(np.mean(losses[-20:])),
    "file_bytes": file_bytes(trainable),
  }
  if not np.isfinite(result["train_loss"]):
    return {**result, "train_loss": None, "validation_loss": None, "pretraining_loss": None}
  tree = join(one.method, frozen, trainable)
  result |= evaluate(model, data, jaxlora.merge(tree), list(one.widths), examples=8 if one.seed == 0 else 0)
  if one.method.rank is not None:
    result["pretraining_loss_removed"] = float(_text_loss(model, jaxlora.strip(tree), data.held_out))
  return result
