"""One run, from its settings to its result: trained, checkpointed, evaluated, and written as a JSON file when done."""

from collections.abc import Callable
import dataclasses
import json
from pathlib import Path
import shutil
import sys
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxlora
from jaxlora import checkpoint

from . import decoding, gguf_file, methods, papers, plain_text, rows, scores, tokens, training
from .methods import Method
from .model import Llama
from .papers import Pair
from .rows import Example
from .training import RunError, Schedule

PROTOCOL = 1  # of what a run does; one more where a change makes older results another thing
CHECKPOINT_EVERY = 25  # steps
TOGETHER = 30  # prompts that are decoded at once
LOSSES_TOGETHER = 6


class Setup(NamedTuple):
  """What all runs share.

  Attributes:
    model: its weights in floats.
    chat: its tokenizer.
    pairs, examples: by split; the pairs that the runs train and are evaluated on, as text and as tokens.
    digest: of the model's weights and of the data.
  """

  model: Llama
  chat: tokens.Chat
  pairs: dict[str, list[Pair]]
  examples: dict[str, list[Example]]
  digest: str


@dataclasses.dataclass(frozen=True)
class Run:
  """What decides a result, beside the setup."""

  method: Method
  schedule: Schedule
  split: str = "test"  # or "val", to choose settings by

  @property
  def settings(self) -> dict[str, Any]:
    """As JSON."""
    return {"protocol": PROTOCOL, **dataclasses.asdict(self), "schedule": self.schedule.settings}

  @property
  def name(self) -> str:
    """A file's name, for people; a digest is added to it."""
    method, schedule = self.method, self.schedule
    if method.name == "base":
      return f"base-{self.split}"
    lora = f"-r{method.rank}-{method.targets}-{method.scaling}-{method.base}" if method.name == "lora" else ""
    packed = f"-pack{schedule.pack}" if schedule.pack else ""
    return f"{method.name}{lora}-{schedule.rate:g}{packed}-s{schedule.seed}-{self.split}"


def resumable(main: Callable[[], Any]) -> None:
  """Runs a command; one that is interrupted says that it can go on, one whose run cannot says why."""
  try:
    main()
  except RunError as error:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None
  except KeyboardInterrupt:
    print("Interrupted: the same command goes on where it stood.", file=sys.stderr)
    raise SystemExit(130) from None


def prepare(model_file: Path | None, data: Path | None, items: int, dtype: Any = jnp.float32) -> Setup:
  """Reads the model and the data.

  Args:
    model_file: a GGUF file; `None` for SmolLM2's in its package.
    data: the folder of the data; `None` for its package's.
    items: pairs of the validation and of the test split that runs are evaluated on.
    dtype: of the computation.
  """
  model, fields = gguf_file.load(model_file or gguf_file.packaged(), dtype)
  chat = tokens.chat_of(fields, model.config.vocabulary)
  return setup_of(model, chat, pairs_of(chat, data, items))


def pairs_of(chat: tokens.Chat, data: Path | None, items: int) -> dict[str, list[Pair]]:
  """The pairs that runs train and are evaluated on."""
  pairs = {split: papers.load(split, data) for split in ("train", "val", "test")}
  long = {p.paper for p in pairs["train"] if len(chat.prompt(p.question)) > rows.LONGEST}
  if long:
    print(f"{len(long)} of the training papers left out, above {rows.LONGEST} tokens: {sorted(long)}", file=sys.stderr)
  pairs["train"] = [pair for pair in pairs["train"] if pair.paper not in long]
  for split in ("val", "test"):
    pairs[split] = papers.spread(pairs[split], items)
  return pairs


def setup_of(model: Llama, chat: tokens.Chat, pairs: dict[str, list[Pair]]) -> Setup:
  """A setup of a model and data at hand."""
  examples = {split: rows.examples(chat, part, model.config.context) for split, part in pairs.items()}
  sample = [np.asarray(leaf.reshape(-1)[:4096]) for leaf in jax.tree.leaves(model)]
  return Setup(model, chat, pairs, examples, harness.digest([examples, str(model.config.dtype)], sample))


def do(setup: Setup, run: Run, out: Path, quiet: bool = False) -> dict[str, Any]:
  """The result of a run: from its file, or by training what is left of it and evaluating.

  Args:
    setup: the model and the data.
    run: what to do.
    out: the folder of results; `NAME.json` is written when the run is done, `NAME/` has its checkpoints until then.
      `NAME.adapter/` is LoRA's adapter, a checkpoint of jaxlora's.
    quiet: no progress bars.
  """
  digest, file = harness.digest([run.settings, setup.digest]), file_of(setup, run, out)
  if file.exists():
    return json.loads(file.read_text())
  result: dict[str, Any] = {"settings": run.settings, "digest": digest, "label": run.method.label}
  if run.method.name == "base":
    final = setup.model
  else:
    base = methods.base_of(run.method, setup.model)
    tree = methods.adapt(run.method, base, run.schedule.seed)
    with _bar(run.name, run.schedule.steps, "step", quiet) as bar:
      tree, result["training"] = training.train(
        tree, base, setup.examples["train"], run.schedule, setup.chat.pad, digest, file.with_suffix(""),
        CHECKPOINT_EVERY, _ticker(bar),
      )  # fmt: skip
    result["trained"] = int(sum(leaf.size for leaf in jax.tree.leaves(jaxlora.split(tree)[1])))
    if run.method.name == "lora" and not file.with_suffix(".adapter").exists():
      checkpoint.save(file.with_suffix(".adapter"), tree)
    final = methods.plain(tree)
    del tree, base
  result |= evaluate(setup, final, run.split, run.name, quiet)
  result |= {"versions": harness.versions("gguf", "tokenizers", "rouge_score"), "hardware": harness.hardware()}
  harness.write(file, result)
  shutil.rmtree(file.with_suffix(""), ignore_errors=True)
  return result


def file_of(setup: Setup, run: Run, out: Path) -> Path:
  """Where a run's result is: another file, and other checkpoints beside it, for other settings, weights or data."""
  return out / f"{run.name}-{harness.digest([run.settings, setup.digest])[:8]}.json"


def evaluate(setup: Setup, model: Llama, split: str, name: str = "", quiet: bool = False) -> dict[str, Any]:
  """Loss, answers and ROUGE of plain weights on the pairs of a split."""
  pairs, examples = setup.pairs[split], setup.examples[split]
  with _bar(f"{name}: loss", len(examples), "pair", quiet) as bar:
    sums, counts = scores.losses(model, examples, setup.chat.pad, min(LOSSES_TOGETHER, len(examples)), bar.update)
  with _bar(f"{name}: answers", len(examples), "pair", quiet) as bar:
    size = min(TOGETHER, len(examples))
    written = decoding.answers(model, setup.chat, examples, size, rows.ANSWER, bar.update)
  rouge = scores.rouge(pairs, written)
  means = {kind: float(np.mean(values)) for kind, values in rouge.items()}
  return {
    "loss": float(sums.sum() / counts.sum()),
    **means,
    "each": rouge,
    "loss_sums": sums.tolist(),
    "loss_counts": counts.tolist(),
    "aspects": [pair.aspect for pair in pairs],
    "written": written,
    "plain_text": plain_text.losses(model, setup.chat),
  }


def fill(setup: Setup, file: Path, quiet: bool = False) -> bool:
  """Adds to a finished result what it does not say yet, each reference's loss and the loss of plain text.

  The base's weights are at hand, LoRA's adapter is kept beside the result; those of others are gone.

  Returns:
    Whether the result says it now.

  Raises:
    ValueError: if the result is of another model or other data.
  """
  result = json.loads(file.read_text())
  if {"loss_sums", "plain_text"} <= result.keys():
    return True
  settings = result["settings"]
  if harness.digest([settings, setup.digest]) != result["digest"]:
    raise ValueError(f"{file}: is of another model, other data or other --items; name those that it was made with")
  method, folder = Method(**settings["method"]), file.with_suffix(".adapter")
  if method.name != "base" and not folder.exists():
    return False
  tree = setup.model
  if method.name != "base":
    tree = methods.plain(checkpoint.load(folder, methods.base_of(method, setup.model)))
  examples = setup.examples[settings["split"]]
  with _bar(f"{file.stem}: loss", len(examples), "pair", quiet) as bar:
    size = min(LOSSES_TOGETHER, len(examples))
    sums, counts = scores.losses(tree, examples, setup.chat.pad, size, bar.update)
  more = {"loss_sums": sums.tolist(), "loss_counts": counts.tolist()}
  harness.write(file, result | more | {"plain_text": plain_text.losses(tree, setup.chat)})
  return True


def _bar(name: str, total: int, unit: str, quiet: bool) -> tqdm:
  return tqdm(total=total, unit=unit, desc=name, disable=quiet, dynamic_ncols=True)


def _ticker(bar: tqdm) -> Callable[..., None]:
  """Advances a bar to a step; shows the loss and the tokens a second. Time left is the bar's own."""

  def tick(step: int, loss: float | None, speed: float | None) -> None:
    if loss is None:
      bar.initial = step  # resumed: these took no time
      bar.n = step
    else:
      bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
      bar.update(step - bar.n)
    bar.refresh()

  return tick
