"""PEFT on torch's CPU over its own full fine-tuning and frozen floor: the same shapes, batch and optimizer.

Another framework has other kernels: its ratios can be compared with JAX's, its times cannot. `train_step.py` runs this
in a process of its own.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import harness

LEARNING_RATE = 1e-3
FLOOR, FULL, PEFT = "frozen floor", "full fine-tuning", "PEFT"
TARGETS = ["query", "key", "value", "out", "mlp_in", "mlp_out"]


def make_model(args: argparse.Namespace) -> Any:
  """The causal decoder of `models.py` in torch."""
  import torch
  from torch import nn
  import torch.distributed.tensor  # PEFT looks it up without importing it
  from torch.nn import functional

  class Block(nn.Module):
    def __init__(self, width: int, heads: int):
      super().__init__()
      self.heads = heads
      self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
      for name in TARGETS[:4]:
        setattr(self, name, nn.Linear(width, width))
      self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, x: Any) -> Any:
      query, key, value = (
        layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
      )
      mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
      return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Any) -> Any:
      x = x + self.attend(self.norm_attention(x))
      return x + self.mlp_out(functional.gelu(self.mlp_in(self.norm_mlp(x)), approximate="tanh"))

  class LanguageModel(nn.Module):
    def __init__(self):
      super().__init__()
      self.embed = nn.Embedding(args.vocabulary, args.d)
      self.position = nn.Parameter(0.02 * torch.randn(args.seq, args.d))
      self.blocks = nn.ModuleList([Block(args.d, max(1, args.d // 64)) for _ in range(args.layers)])
      self.norm = nn.LayerNorm(args.d)
      self.head = nn.Linear(args.d, args.vocabulary, bias=False)

    def forward(self, tokens: Any, eps: Any = None) -> Any:
      x = self.embed(tokens) + self.position
      x = x if eps is None else x + eps
      for block in self.blocks:
        x = block(x)
      return self.head(self.norm(x))

  torch.manual_seed(0)
  return LanguageModel().to(torch.bfloat16 if args.bf16 else torch.float32)


def make_batch(args: argparse.Namespace) -> tuple[Any, Any]:
  """Tokens (batch, time), and the next token of each."""
  import torch

  tokens = torch.randint(args.vocabulary, (args.batch, args.seq + 1), generator=torch.Generator().manual_seed(1))
  return tokens[:, :-1], tokens[:, 1:]


def loss_of(logits: Any, y: Any) -> Any:
  """The mean cross entropy, in float32 at least."""
  from torch.nn import functional

  return functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def trainer(model: Any, batch: tuple[Any, Any]) -> Callable[[], float]:
  """A step of AdamW on the parameters that require gradients."""
  import torch

  optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=1e-4)

  def step() -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return loss.item()

  return step


def frozen_floor(model: Any, batch: tuple[Any, Any]) -> Callable[[], float]:
  """Forward pass and the gradient with respect to the embedded input."""
  import torch

  model.requires_grad_(False)
  eps = torch.zeros((*batch[0].shape, model.head.in_features), dtype=model.head.weight.dtype, requires_grad=True)

  def step() -> float:
    eps.grad = None
    loss = loss_of(model(batch[0], eps), batch[1])
    loss.backward()
    return loss.item()

  return step


def adapted(args: argparse.Namespace) -> Any:
  """The model with PEFT's adapters on every attention and MLP layer."""
  import peft

  config = peft.LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=TARGETS)
  return peft.get_peft_model(make_model(args), config)


def base_of(model: Any) -> dict[str, Any]:
  """A copy of the base's parameters, which must not change."""
  return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def check_trains(step: Callable[[], float], model: Any, steps: int = 5) -> dict[str, Any]:
  """Takes a few steps on one batch: the loss must fall, and the base must not change.

  Raises:
    RuntimeError: if it does not train.
  """
  import torch

  before = base_of(model)
  losses = [step() for _ in range(steps)]
  unchanged = all(torch.equal(value, before[name]) for name, value in base_of(model).items())
  check = {
    "losses": losses,
    "base_unchanged": unchanged,
    "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
  }
  if not (unchanged and losses[-1] < losses[0]):
    raise RuntimeError(f"{PEFT} does not train: {check}")
  return check


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what peft_torch.json holds."""
  parser = harness.make_parser(__file__, __doc__, "--d 256", records=False)
  harness.add_layers(parser)
  harness.add_sizes(parser)
  parser.add_argument("--threads", type=harness.positive(int), default=2, help="torch's threads")
  args = harness.parse(parser, argv, d=128, layers=2, rounds=3)
  if not all(harness.installed(name) for name in ("torch", "peft")):
    parser.error("torch and peft are not installed; the extra `peers` brings them: pip install 'jaxlora[peers]'")
  import torch

  torch.set_num_threads(args.threads)
  batch = make_batch(args)
  peft_model = adapted(args)
  runs = {
    FLOOR: frozen_floor(make_model(args), batch),
    FULL: trainer(make_model(args), batch),
    PEFT: trainer(peft_model, batch),
  }
  check = check_trains(runs[PEFT], peft_model)
  runs = harness.with_control(runs, FLOOR, runs[FLOOR])
  calls = harness.calls_per_turn(runs)
  with harness.progress((args.rounds + 1) * len(runs) * calls, "call", args.quiet) as bar:
    seconds = harness.interleave(runs, args.rounds, calls, bar.update)
  results = {
    "settings": harness.settings(args),
    "versions": harness.versions(*harness.PEERS),
    "hardware": {**harness.cpu(), "threads": args.threads},
    "check": check,
    "seconds": {name: harness.summarize(values) for name, values in seconds.items()},
    "over_floor": harness.ratios(seconds, FLOOR),
    "over_full": harness.ratios(seconds, FULL),
  }
  harness.write(args.out / "peft_torch.json", results)
  over = [results[field] for field in ("over_floor", "over_full")]
  rows = [
    (name, *(harness.ratio_cell(ratios[name]) for ratios in over), harness.milliseconds(results["seconds"][name]))
    for name in seconds
  ]
  print(harness.table(("torch", "step / floor", "step / full", "time"), rows))
  return results


if __name__ == "__main__":
  main()
