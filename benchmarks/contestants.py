"""Who is compared: ways to train the same model on the same batch with the same optimizer, and the floor under them.

All adapt the same kernels (`models.TARGETS`) at the same rank, start where the base model is, and use AdamW. The frozen
floor is no trainer: it is the forward pass and the gradient with respect to the embedded input.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
import json
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from flax import traverse_util
from flax.training.train_state import TrainState
import harness
import jax
import jax.numpy as jnp
import models
from models import LanguageModel, Params
import models_nnx
import numpy as np
import optax

import jaxlora

LEARNING_RATE = 1e-3
FLOOR, FULL = "frozen floor", "full fine-tuning"


class Settings(NamedTuple):
  """The sizes of one comparison."""

  width: int = 512
  layers: int = 6
  batch: int = 8
  seq: int = 128
  rank: int = 8
  alpha: float = 16.0
  vocabulary: int = 4096
  scan: bool = False
  remat: bool = False
  bf16: bool = False

  @classmethod
  def parse(cls, parser: argparse.ArgumentParser, args: argparse.Namespace, **changes: Any) -> "Settings":
    """The options of `add_sizes`; ends the program with a line where no such model exists."""
    given = {field: getattr(args, field) for field in cls._fields if hasattr(args, field)}
    self = cls(**{**given, "width": args.d, **changes})
    if self.width % models.HEAD_WIDTH:
      parser.error(f"--d {self.width}: heads are {models.HEAD_WIDTH} wide, d must be a multiple of that")
    if self.rank > self.width:
      parser.error(f"--rank {self.rank} is larger than the smallest side of a kernel, {self.width}")
    return self

  def model(self) -> LanguageModel:
    """The model of these sizes."""
    dtype = jnp.bfloat16 if self.bf16 else jnp.float32
    return LanguageModel(self.vocabulary, self.width, self.layers, self.seq, dtype, self.scan, self.remat)

  def title(self) -> str:
    """A short name."""
    marks = [mark for mark, on in (("scanned", self.scan), ("remat", self.remat), ("bf16", self.bf16)) if on]
    sizes = f"d={self.width}, {self.layers} layers, {self.batch} x {self.seq} tokens, rank {self.rank}"
    return ", ".join([sizes, *marks])


def add_sizes(parser: argparse.ArgumentParser) -> None:
  """The options that decide a comparison's sizes, but for the number of layers."""
  harness.add_sizes(parser)
  parser.add_argument("--scan", action="store_true", help="one block, scanned over stacked parameters")
  parser.add_argument("--remat", action="store_true", help="blocks are recomputed in the backward pass")


class Batch(NamedTuple):
  """Tokens (batch, time), and what should follow each."""

  x: jax.Array
  y: jax.Array


class Base(NamedTuple):
  """What all contestants share."""

  settings: Settings
  model: LanguageModel
  params: Params
  batch: Batch


class Program(NamedTuple):
  """A contestant's training step, not yet compiled.

  Attributes:
    step: `(state, frozen, batch) -> (state, loss)`; the state is donated, as in a real loop.
    state: what changes from step to step.
    frozen: what does not.
    trained: `state -> tree`: what the optimizer moves.
    base: `(state, frozen) -> tree`: what must stay bit for bit the same; None where everything trains.
  """

  step: Callable[[Any, Any, Batch], tuple[Any, jax.Array]]
  state: Any
  frozen: Any
  trained: Callable[[Any], Any]
  base: Callable[[Any, Any], Any] | None


class Contestant(NamedTuple):
  """One row of a table.

  Attributes:
    name: what the row is called.
    build: makes its program.
    trainable: how many parameters it should train.
    package: what must be installed for it.
    misfit: why it cannot take these settings, or None.
  """

  name: str
  build: Callable[[Base], Program]
  trainable: Callable[[Base], int]
  package: str | None = None
  misfit: Callable[[Settings], str | None] = lambda settings: None


def make_base(settings: Settings) -> Base:
  """The model, its parameters and one batch, drawn once for everybody."""
  model = settings.model()
  tokens = jax.random.randint(jax.random.key(1), (settings.batch, settings.seq + 1), 0, settings.vocabulary)
  return Base(settings, model, models.init(model), Batch(tokens[:, :-1], tokens[:, 1:]))


def loss_of(logits: jax.Array, y: jax.Array) -> jax.Array:
  """The mean cross entropy, in float32 at least."""
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y).mean()


def make_step(logits: Callable[[Any, Any, jax.Array], jax.Array], tx: optax.GradientTransformation) -> Any:
  """The step of everybody whose state is `(trained, optimizer state)`."""

  def step(state: Any, frozen: Any, batch: Batch) -> tuple[Any, jax.Array]:
    trained, opt_state = state
    value, grads = jax.value_and_grad(lambda trained: loss_of(logits(trained, frozen, batch.x), batch.y))(trained)
    updates, opt_state = tx.update(grads, opt_state, trained)
    return (optax.apply_updates(trained, updates), opt_state), value

  return step


def trainer(logits: Callable[[Any, Any, jax.Array], jax.Array], trained: Any, frozen: Any) -> Program:
  """A program that trains `trained` with AdamW beside `frozen`."""
  tx = optax.adamw(LEARNING_RATE)
  state = (trained, tx.init(trained))
  return Program(make_step(logits, tx), state, frozen, lambda state: state[0], lambda state, frozen: frozen)


# ----------------------------------------------------------------------------------------------------------------------
# The contestants.


def full(base: Base) -> Program:
  """Everything trains."""
  program = trainer(lambda params, _, x: base.model.apply({"params": params}, x), base.params, None)
  return program._replace(base=None)


def floor(base: Base) -> Program:
  """Forward and input gradient; the gradient takes the place of the input that it belongs to."""

  def step(eps: jax.Array, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    value, grad = jax.value_and_grad(lambda eps: loss_of(base.model.apply({"params": params}, batch.x, eps), batch.y))(
      eps
    )
    return grad, value

  eps = jnp.zeros((*base.batch.x.shape, base.settings.width), base.model.dtype)
  return Program(step, eps, base.params, lambda state: (), lambda state, frozen: frozen)


def textbook(base: Base) -> Program:
  """W + s A B, formed in every step."""
  settings = base.settings
  factors = {}
  for number, (path, kernel) in enumerate(models.adapted_kernels(base.params).items()):
    stack, size_in, size_out = models.matrix_shape(path, kernel.shape)
    a = jax.random.uniform(jax.random.key(number), (*stack, size_in, settings.rank), kernel.dtype, -1, 1)
    factors[path] = (a / np.sqrt(size_in).astype(a.dtype), jnp.zeros((*stack, settings.rank, size_out), kernel.dtype))

  def logits(factors: Any, params: Params, x: jax.Array) -> jax.Array:
    flat = traverse_util.flatten_dict(params)
    for path, (a, b) in factors.items():
      flat[path] = flat[path] + settings.alpha / settings.rank * jnp.reshape(a @ b, flat[path].shape)
    return base.model.apply({"params": traverse_util.unflatten_dict(flat)}, x)

  return trainer(logits, factors, base.params)


def wrap(fn: Callable[..., Any], recompute: bool = True) -> Callable[..., Any]:
  """`jaxlora.wrap` that never materialises."""
  return jaxlora.wrap(fn, on_materialize="error", recompute=recompute)


def adapt(base: Base, variant: str = "lora") -> Any:
  """The combined tree."""
  settings = base.settings
  config = jaxlora.LoraConfig(rank=settings.rank, alpha=settings.alpha, targets=models.TARGETS, variant=variant)
  probe = lambda params: base.model.apply({"params": params}, base.batch.x[:1])
  return jaxlora.adapt(base.params, config, jax.random.key(2), probe=probe)


def jaxlora_split(base: Base, recompute: bool = True, variant: str = "lora") -> Program:
  """The flow with two halves: the trainable one goes through the optimizer, the frozen one goes beside it."""
  apply = wrap(base.model.apply, recompute)
  frozen, trainable = jaxlora.split(adapt(base, variant))
  return trainer(lambda half, frozen, x: apply({"params": jaxlora.join(frozen, half)}, x), trainable, frozen)


def jaxlora_train_state(base: Base, recompute: bool = True) -> Program:
  """The flow with one tree in a `TrainState`, donated whole."""
  apply = wrap(base.model.apply, recompute)
  tx = jaxlora.optimizer(optax.adamw(LEARNING_RATE))
  state = TrainState.create(apply_fn=apply, params=adapt(base), tx=tx).replace(step=jnp.zeros((), jnp.int32))

  def step(state: TrainState, _: None, batch: Batch) -> tuple[TrainState, jax.Array]:
    value, grads = jaxlora.value_and_grad(lambda tree: loss_of(state.apply_fn({"params": tree}, batch.x), batch.y))(
      state.params
    )
    return state.apply_gradients(grads=grads), value

  return Program(
    step, state, None, lambda state: jaxlora.split(state.params)[1], lambda state, frozen: jaxlora.strip(state.params)
  )


def qwix(base: Base) -> Program:
  """Google's qwix, which intercepts the products of a Linen model as it is traced."""
  import qwix

  settings = base.settings
  modules = models.TARGETS.removesuffix("/kernel")
  provider = qwix.LoraProvider(module_path=modules, rank=settings.rank, alpha=settings.alpha)
  model = qwix.apply_lora_to_model(base.model, provider)
  fresh = traverse_util.flatten_dict(jax.jit(model.init)(jax.random.key(2), base.batch.x[:1])["params"])
  factors = {path: leaf for path, leaf in fresh.items() if path[-1].endswith(("_lora_a", "_lora_b"))}

  def logits(factors: Any, params: Params, x: jax.Array) -> jax.Array:
    tree = traverse_util.unflatten_dict({**traverse_util.flatten_dict(params), **factors})
    return model.apply({"params": tree}, x)

  return trainer(logits, factors, base.params)


def nnx_lora(base: Base) -> Program:
  """Flax's own `nnx.LoRA`, on the model's twin."""
  from flax import nnx

  definition, factors, rest = models_nnx.split_twin(base.model, base.params, base.settings.rank)
  return trainer(lambda factors, rest, x: nnx.merge(definition, factors, rest)(x), factors, rest)


def no_twin(settings: Settings) -> str | None:
  """The NNX twin has neither a scan nor a remat."""
  return "its twin of the model is neither scanned nor remat" if settings.scan or settings.remat else None


def all_parameters(base: Base) -> int:
  """What full fine-tuning trains."""
  return sum(leaf.size for leaf in jax.tree.leaves(base.params))


def factor_parameters(base: Base) -> int:
  """What every LoRA must train, were it written right: rank x (input + output) of each adapted kernel."""
  total = 0
  for path, kernel in models.adapted_kernels(base.params).items():
    stack, size_in, size_out = models.matrix_shape(path, kernel.shape)
    total += int(np.prod(stack, dtype=int)) * base.settings.rank * (size_in + size_out)
  return total


def contestants() -> list[Contestant]:
  """Everybody who runs in this process; PEFT has its own (`peft_torch.py`)."""
  return [
    Contestant(FLOOR, floor, lambda base: 0),
    Contestant(FULL, full, all_parameters),
    Contestant("textbook merge", textbook, factor_parameters),
    Contestant("qwix", qwix, factor_parameters, package="qwix"),
    Contestant("nnx.LoRA", nnx_lora, factor_parameters, misfit=no_twin),
    Contestant("jaxlora", jaxlora_split, factor_parameters),
    Contestant("jaxlora, TrainState", jaxlora_train_state, factor_parameters),
  ]


def recompute_contestants() -> list[Contestant]:
  """The library with its option to recompute said aloud."""
  return [
    Contestant(f"jaxlora, {name}", functools.partial(jaxlora_split, recompute=on), factor_parameters)
    for name, on in (("no recompute", False), ("recompute", True))
  ]


def variant_contestants(variants: Sequence[str]) -> list[Contestant]:
  """The library with each variant of LoRA; what each trains is its own count, known to the tests."""
  return [
    Contestant(
      variant,
      functools.partial(jaxlora_split, variant=variant),
      lambda base, variant=variant: jaxlora.summary(adapt(base, variant)).trainable_parameters,
    )
    for variant in variants
  ]


def run_peft(script: str, settings: Settings, rounds: int, *more: str) -> dict[str, Any]:
  """What a script for PEFT measured on these settings: torch runs in a process of its own."""
  sizes = {"d": settings.width, **{name: getattr(settings, name) for name in ("layers", "batch", "seq", "rank")}}
  sizes |= {"alpha": settings.alpha, "vocabulary": settings.vocabulary, "rounds": rounds}
  options = [f"--{name}={value}" for name, value in sizes.items()] + ["--bf16"] * settings.bf16
  with tempfile.TemporaryDirectory() as out:
    command = [sys.executable, Path(__file__).with_name(f"{script}.py"), *options, *more, f"--out={out}", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
      raise RuntimeError(f"{script}.py failed: {done.stderr}")
    return json.loads((Path(out) / f"{script}.json").read_text())


def present(everybody: Sequence[Contestant], settings: Settings) -> tuple[list[Contestant], list[str]]:
  """Who can run, and a line for each who cannot."""
  here, absent = [], []
  for contestant in everybody:
    reason = contestant.misfit(settings)
    if contestant.package and not harness.installed(contestant.package):
      reason = f"{contestant.package} is not installed; the extra `peers` brings it: pip install 'jaxlora[peers]'"
    if reason:
      absent.append(f"{contestant.name} is left out: {reason}")
    else:
      here.append(contestant)
  return here, absent


# ----------------------------------------------------------------------------------------------------------------------
# Compiling, running and checking a program.


class Compiled(NamedTuple):
  """A compiled step, and what XLA says of it.

  Attributes:
    flops: None for a scanned model: XLA counts the body of a loop once.
    bytes: of temporaries, arguments, results, and results that take an argument's place.
  """

  program: Program
  call: Callable[..., Any]
  flops: float | None
  bytes: dict[str, int]


def compile_step(program: Program, base: Base) -> Compiled:
  """Compiles ahead of time: one program for the check, the timing and the A/A control."""
  compiled = jax.jit(program.step, donate_argnums=0).lower(program.state, program.frozen, base.batch).compile()
  flops = None if base.settings.scan else compiled.cost_analysis()["flops"]
  memory = compiled.memory_analysis()
  sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("temp", "argument", "output", "alias")}
  return Compiled(program, compiled, flops, sizes)


def runner(compiled: Compiled, batch: Batch) -> Callable[[], Any]:
  """A training loop's inside: each call takes the next step, from a state of its own."""
  state = jax.tree.map(jnp.copy, compiled.program.state)

  def run() -> Any:
    nonlocal state
    state, loss = compiled.call(state, compiled.program.frozen, batch)
    return state, loss

  return run


def check_trains(contestant: Contestant, compiled: Compiled, base: Base, steps: int = 5) -> dict[str, Any]:
  """Trains for a few steps on one batch: it must start where the base is, its loss must fall, its base must not move.

  Raises:
    RuntimeError: a contestant that does not train has no place in a comparison.
  """
  program = compiled.program
  before = program.base and jax.tree.map(np.array, program.base(program.state, program.frozen))
  first = float(
    jax.jit(lambda params, batch: loss_of(base.model.apply({"params": params}, batch.x), batch.y))(
      base.params, base.batch
    )
  )
  run = runner(compiled, base.batch)
  losses = []
  for _ in range(steps):
    state, loss = run()
    losses.append(float(loss))
  unchanged = None
  if before is not None:
    unchanged = jax.tree.all(jax.tree.map(np.array_equal, before, program.base(state, program.frozen)))
  check = {
    "losses": losses,
    "base_unchanged": unchanged,
    "starts_at_base": abs(losses[0] - first) < (2e-2 if base.settings.bf16 else 1e-4) * first,
    "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(program.trained(program.state))),
  }
  faults = {
    "its loss does not fall": not losses[-1] < losses[0],
    "its base moves": unchanged is False,
    "it does not start where the base is": not check["starts_at_base"],
    "it does not train the parameters that it should": check["trainable_parameters"] != contestant.trainable(base),
  }
  if any(faults.values()):
    raise RuntimeError(f"{contestant.name}: {', '.join(fault for fault, found in faults.items() if found)}: {check}")
  return check


class Entry(NamedTuple):
  """A contestant that has been compiled and checked; the floor has no check."""

  compiled: Compiled
  check: dict[str, Any] | None


def prepare(base: Base, here: Sequence[Contestant], tick: Callable[[str], Any]) -> dict[str, Entry]:
  """Compiles and checks everybody; `tick` hears of who is next."""
  entries = {}
  for contestant in here:
    tick(f"compiling {contestant.name}")
    compiled = compile_step(contestant.build(base), base)
    check = None if contestant.name == FLOOR else check_trains(contestant, compiled, base)
    entries[contestant.name] = Entry(compiled, check)
  return entries


def time_steps(
  base: Base, entries: dict[str, Entry], rounds: int, tick: Callable[[int], Any]
) -> dict[str, list[float]]:
  """Seconds per step, round by round, with the floor as its own A/A control; `tick` hears of every turn."""
  runs = {name: runner(entry.compiled, base.batch) for name, entry in entries.items()}
  runs = harness.with_control(runs, FLOOR, runner(entries[FLOOR].compiled, base.batch))
  return harness.interleave(runs, rounds, harness.calls_per_turn(runs), lambda calls: tick(1))


def turns(entries: int, rounds: int) -> int:
  """How often `prepare` and `time_steps` tick: for the progress bar."""
  return entries + (entries + 1) * (rounds + 1)
