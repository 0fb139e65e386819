"""Training steps of large models on slices of TPUs, by shapes and shardings alone: no array is made."""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from models_large import Decoder, Lies, Shape
import numpy as np
import optax
from settings import loss_of

import jaxlora

KERNELS = "blocks/.*(attention|mlp|shared)/.*/kernel"
EXPERTS = "blocks/.*/experts/(gate|up|down)"
AXES = {KERNELS: "sio", EXPERTS: "ssio"}
BOTH = ("x", "y")
# Fully sharded along both axes of the mesh; experts along one, their inputs along the other.
LIES = {
  KERNELS: PartitionSpec(None, "x", "y"),
  EXPERTS: PartitionSpec(None, "y", "x", None),
  "embed/embedding": PartitionSpec("y", "x"),
  "head/kernel": PartitionSpec("x", "y"),
}
MODELS = {  # vocabularies are multiples of all meshes' axes
  "8B": Shape(32, 4096, 32, 8, 14336, 128256),
  "70B": Shape(80, 8192, 64, 8, 28672, 128256),
  "400B sparse": Shape(48, 5120, 40, 8, 16384, 202752, experts=128, expert_hidden=8192),
  "tiny": Shape(4, 256, 4, 2, 512, 1024),
  "tiny sparse": Shape(4, 256, 4, 2, 512, 1024, experts=8, expert_hidden=256),
}
METHODS = ("LoRA", "QLoRA", "full fine-tuning")


class Step(NamedTuple):
  """A step that is not compiled yet: its function, shapes of its arguments, and where its results go."""

  fn: Callable[..., Any]
  args: tuple[Any, ...]
  out: Any


def sides(count: int, shape: Shape) -> tuple[int, int]:
  """Two axes of about one length; with experts, as many along `y` as there are experts, or devices."""
  along = math.gcd(count, shape.experts) if shape.experts else count // (1 << (count.bit_length() - 1) // 2)
  return count // along, along


def mesh_of(devices: Sequence[Any], shape: Shape) -> Mesh:
  """The mesh of some devices."""
  return Mesh(np.array(devices).reshape(sides(len(devices), shape)), BOTH, axis_types=(AxisType.Auto,) * 2)


def parameters(shape: Shape, mesh: Mesh) -> Any:
  """Shapes of all parameters, each with its sharding."""
  tokens = jnp.zeros((1, max(8, shape.experts)), jnp.int32)
  made = jax.eval_shape(lambda: Decoder(shape).init(jax.random.key(0), tokens)["params"])
  patterns = {pattern: spec for pattern, spec in LIES.items() if shape.experts or pattern != EXPERTS}
  return _placed(made, jaxlora.sharding.specs(made, mesh, patterns=patterns))


def _placed(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), shapes, shardings)


def _adapted(params: Any, shape: Shape, method: str, rank: int) -> Any:
  """The adapted tree of shapes, over codes for QLoRA: all kernels of the blocks but the routers'."""
  axes = {pattern: roles for pattern, roles in AXES.items() if shape.experts or pattern != EXPERTS}
  targets = "|".join(axes)
  base = jaxlora.quantize(params, "nf4", targets=targets, axes=axes) if method == "QLoRA" else params
  return jaxlora.adapt(base, jaxlora.LoraConfig(rank=rank, targets=targets, axes=axes), jax.random.key(0))


def _halves(params: Any, model: Decoder, method: str, rank: int) -> tuple[Any, Any, Callable[..., Any]]:
  """What trains, what does not, and `logits(trained, frozen, tokens)`."""
  if method == "full fine-tuning":
    return params, None, lambda trained, _, x: model.apply({"params": trained}, x)
  frozen, trained = jaxlora.split(_adapted(params, model.shape, method, rank))
  apply = jaxlora.wrap(model.apply, on_materialize="error")
  return trained, frozen, lambda half, frozen, x: apply({"params": jaxlora.join(frozen, half)}, x)


def step_of(shape: Shape, method: str, mesh: Mesh, seq: int, sequences: int, rank: int) -> Step:
  """A step with AdamW, its moments in the dtype of what trains.

  Args:
    shape: of the model.
    method: one of `METHODS`.
    mesh: of `mesh_of`.
    seq: tokens in a sequence.
    sequences: for each device.
    rank: of LoRA.
  """
  there = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
  of_experts = (there("y", "x"), there("y")) if shape.experts else ()
  model = Decoder(shape, Lies(there(BOTH), there(), *of_experts))
  trained, frozen, logits = _halves(parameters(shape, mesh), model, method, rank)
  tx = optax.adamw(1e-4)
  state = optax.tree_utils.tree_map_params(
    tx,
    lambda moment, like: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=like.sharding),
    jax.eval_shape(tx.init, trained),
    trained,
    transform_non_params=lambda count: jax.ShapeDtypeStruct(count.shape, count.dtype, sharding=there()),
  )

  def fn(trained: Any, state: Any, frozen: Any, x: jax.Array, y: jax.Array) -> Any:
    value, grads = jax.value_and_grad(lambda trained: loss_of(logits(trained, frozen, x), y))(trained)
    updates, state = tx.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state, value

  tokens = jax.ShapeDtypeStruct((mesh.size * sequences, seq), jnp.int32, sharding=there(BOTH))
  lies = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
  return Step(fn, (trained, state, frozen, tokens, tokens), (lies(trained), lies(state), there()))


def compiled(step: Step, platform: str) -> Any:
  """The compiled step; the trained half and the optimizer's state are donated."""
  traced = jax.jit(step.fn, donate_argnums=(0, 1), out_shardings=step.out).trace(*step.args)
  return traced.lower(lowering_platforms=(platform,)).compile()
