"""jaxlora's side of `beside_peft.py`, in a process of its own: `python -m lm.side_jaxlora FOLDER OUT lora|full`."""

import json
from pathlib import Path
import sys
import time
from typing import Any

from flax import nnx
import harness
import jax
import numpy as np

import jaxlora
from jaxlora import hub, peft

from . import beside, memory, methods, training
from .model import Config, Llama
from .rows import Rows


def main(folder: Path, out: Path, name: str) -> None:
  """Trains for the steps of the plan, and writes what was seen."""
  plan = json.loads((folder / "plan.json").read_text())
  config = Config(**plan["sizes"])
  model: Any = hub.load(folder / "model", nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))
  if name == "lora":
    tree, scale = peft.load(folder / "start", model), 1.0
  else:
    tree, scale = methods.adapt(methods.Method("full"), model, 0), beside.FULL_RATE
  frozen, trainable = jaxlora.split(tree)
  del model, tree
  opt_state = training.TX.init(trainable)
  result: dict[str, Any] = {"loss": [], "seconds": [], "tokens": [], "widths": []}
  batches, could = np.load(folder / "batches.npz"), memory.reset()
  for step, rate in enumerate(plan["rates"]):
    rows = Rows(batches[f"tokens{step}"], batches[f"valid{step}"])
    begin = time.perf_counter()
    parts = jax.tree.map(lambda x: x[None], rows)
    trainable, opt_state, loss = training.update(trainable, opt_state, frozen, parts, np.float32(rate * scale))
    result["loss"].append(float(loss))
    result["seconds"].append(time.perf_counter() - begin)
    result["tokens"].append(int(rows.valid.sum()))
    result["widths"].append(rows.tokens.shape[1])
    count, loss = len(plan["rates"]), result["loss"][-1]
    print(f"{name}, step {step + 1} of {count}: loss {loss:.4f}", file=sys.stderr, flush=True)
  result |= {"peak": memory.peak() if could else None, "versions": harness.versions()}
  harness.write(out, result)


if __name__ == "__main__":
  main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
