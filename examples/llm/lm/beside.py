"""What two frameworks train alike: base weights, first factors and batches, as files that both read.

`FOLDER/model` is a model of transformers, `FOLDER/start` an adapter of PEFT, `FOLDER/batches.npz` the rows of each step
and `FOLDER/plan.json` the learning rates. `side_jaxlora.py` and `side_peft.py` run them, each in a process of its own.
"""

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

import harness
import numpy as np

from jaxlora import hub, peft

from . import methods
from .model import Config
from .rows import ANSWER, batch, training_order
from .runs import Setup
from .training import Schedule

FULL_RATE = 1 / 30  # of LoRA's, for full fine-tuning, of which the time counts alone


def write_inputs(folder: Path, setup: Setup, method: methods.Method, schedule: Schedule) -> None:
  """Writes what both sides read; the plan comes last, so that a folder with one is whole."""
  config = setup.model.config
  hub.save(folder / "model", setup.model)
  (folder / "model" / "config.json").write_text(json.dumps(transformers_config(config)))
  tree = methods.adapt(method, setup.model, schedule.seed)
  peft.save(folder / "start", tree, task_type="CAUSAL_LM")
  examples = setup.examples["train"]
  arrays = {}
  for step, index in enumerate(training_order(examples, schedule.batch, schedule.steps, schedule.seed)):
    rows = batch([examples[k] for k in index], setup.chat.pad)
    arrays |= {f"tokens{step}": rows.tokens, f"valid{step}": rows.valid}
  np.savez(folder / "batches.npz", **arrays)
  sizes = {name: value for name, value in dataclasses.asdict(config).items() if name != "dtype"}
  plan = {"answer": ANSWER, "rates": schedule.rates().tolist(), "sizes": sizes}
  harness.write(folder / "plan.json", plan)


def transformers_config(config: Config) -> dict[str, Any]:
  """The sizes as transformers names them."""
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": config.vocabulary,
    "hidden_size": config.width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_width,
    "intermediate_size": config.mlp,
    "rope_theta": config.rope_base,
    "rms_norm_eps": config.epsilon,
    "max_position_embeddings": config.context,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
  }


def warm(result: dict[str, Any]) -> list[int]:
  """The steps whose shape is not a new one: nothing is compiled or tuned in them."""
  seen: set[int] = set()
  steps = []
  for step, width in enumerate(result["widths"]):
    if width in seen:
      steps.append(step)
    seen.add(width)
  return steps


def speed(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Tokens a second (without padding) and the median step, over warm steps of all rounds."""
  steps = [(result, step) for result in results for step in warm(result)]
  if not steps:
    return {"tokens": None, "step": None}
  seconds = [result["seconds"][step] for result, step in steps]
  return {
    "tokens": sum(result["tokens"][step] for result, step in steps) / sum(seconds),
    "step": float(np.median(seconds)),
  }
