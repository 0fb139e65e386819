"""PEFT's side of `beside_peft.py`, in a process of its own: `python -m lm.side_peft FOLDER OUT THREADS`.

Its process loads no JAX, whose memory would count as PEFT's.
"""

import json
from pathlib import Path
import platform
import sys
import time
from typing import Any

import numpy as np

from . import memory


def load(folder: Path) -> Any:
  """The base of transformers with PEFT's adapter, as it was saved, ready to train."""
  import peft
  import torch
  import transformers

  base = transformers.LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
  return peft.PeftModel.from_pretrained(base, folder / "start", is_trainable=True).train()


def loss_of(model: Any, tokens: Any, valid: Any, answer: int) -> Any:
  """The mean of -log p over the answers' tokens; as in jaxlora's side, the head computes their columns alone."""
  from torch.nn import functional

  seen = valid[:, :-1]
  positions = (seen.long().cumsum(1) - 1).clamp(min=0)
  logits = model(
    input_ids=tokens[:, :-1], attention_mask=seen.long(), position_ids=positions, logits_to_keep=answer, use_cache=False
  ).logits
  counts, labels = valid[:, -answer:], tokens[:, -answer:]
  return functional.cross_entropy(logits.float()[counts], labels[counts])


def main(folder: Path, out: Path, threads: int) -> None:
  """Trains for the steps of the plan, and writes what was seen."""
  import torch

  torch.set_num_threads(threads)
  plan = json.loads((folder / "plan.json").read_text())
  model = load(folder)
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.Adam(trained)
  result: dict[str, Any] = {"loss": [], "seconds": [], "tokens": [], "widths": []}
  batches, could = np.load(folder / "batches.npz"), memory.reset()
  for step, rate in enumerate(plan["rates"]):
    tokens = torch.from_numpy(batches[f"tokens{step}"]).long()
    valid = torch.from_numpy(batches[f"valid{step}"])
    begin = time.perf_counter()
    for group in optimizer.param_groups:
      group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(model, tokens, valid, plan["answer"])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    result["loss"].append(loss.item())
    result["seconds"].append(time.perf_counter() - begin)
    result["tokens"].append(int(valid.sum()))
    result["widths"].append(tokens.shape[1])
    print(f"PEFT, step {step + 1} of {len(plan['rates'])}: loss {result['loss'][-1]:.4f}", file=sys.stderr, flush=True)
  import peft
  import transformers

  versions = {module.__name__: module.__version__ for module in (torch, peft, transformers)}
  result |= {"peak": memory.peak() if could else None, "threads": threads, "trained": sum(p.numel() for p in trained)}
  out.write_text(json.dumps(result | {"versions": {"python": platform.python_version(), **versions}}, indent=2))


if __name__ == "__main__":
  main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
