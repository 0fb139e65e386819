"""A decoder of today's families in few lines, its weights in one canonical form that the trees of presets come to."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Kind:
  """What families do differently.

  Attributes:
    theta: of the rotary embedding, for each layer.
    window: tokens that a layer attends to, for each layer; `None` for all.
    scale: of the scores.
    eps: of the norms.
    plus: what is added to the norms' scales: 1 in Gemma.
    act: of the gate.
    embedding: what embeddings are multiplied by.
    cap, final_cap: of the scores and of the logits, by tanh.
    neighbours: whether rotary positions turn neighbours, and not what lies half a head apart.
  """

  theta: tuple[float, ...]
  window: tuple[int | None, ...]
  scale: float
  eps: float = 1e-6
  plus: float = 0.0
  act: Callable[[jax.Array], jax.Array] = jax.nn.silu
  embedding: float = 1.0
  cap: float | None = None
  final_cap: float | None = None
  neighbours: bool = False


def logits(embedding: Any, layers: list[dict[str, Any]], final: Any, ids: Any, kind: Kind, head: Any = None) -> Any:
  """Logits (batch, tokens, vocabulary).

  Args:
    embedding: (vocabulary, width).
    layers: of each q, k, v (width, heads, size) with biases q_bias (heads, size) or none, o (heads, size, width), gate,
      up, down, and the norms pre, pre_mlp, and where the family has them q_norm, k_norm, post, post_mlp.
    final: the last norm.
    ids: (batch, tokens).
    kind: the family.
    head: (width, vocabulary); `None` for the embedding.
  """
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    return _logits(embedding, layers, final, ids, kind, head)


def _logits(embedding, layers, final, ids, kind: Kind, head):
  norm = lambda x, scale: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + kind.eps) * (kind.plus + scale)
  x = embedding[ids] * kind.embedding
  for number, layer in enumerate(layers):
    h = norm(x, layer["pre"])
    q, k, v = (jnp.einsum("btd,dnh->btnh", h, layer[name]) + layer.get(f"{name}_bias", 0.0) for name in "qkv")
    q, k = (norm(y, layer[f"{name}_norm"]) if f"{name}_norm" in layer else y for name, y in (("q", q), ("k", k)))
    q, k = (_turned(y, kind.theta[number], kind.neighbours) for y in (q, k))
    out = _attention(q, k, v, kind, kind.window[number])
    out = jnp.einsum("btnh,nhd->btd", out, layer["o"])
    x = x + (norm(out, layer["post"]) if "post" in layer else out)
    h = norm(x, layer["pre_mlp"])
    out = (kind.act(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    x = x + (norm(out, layer["post_mlp"]) if "post_mlp" in layer else out)
  found = norm(x, final) @ (embedding.T if head is None else head)
  return found if kind.final_cap is None else kind.final_cap * jnp.tanh(found / kind.final_cap)


def _attention(q, k, v, kind: Kind, window: int | None):
  k, v = (jnp.repeat(y, q.shape[2] // y.shape[2], axis=2) for y in (k, v))
  scores = jnp.einsum("btnh,bsnh->bnts", q, k) * kind.scale
  if kind.cap is not None:
    scores = kind.cap * jnp.tanh(scores / kind.cap)
  behind = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])[None]
  seen = (behind >= 0) & (behind < (window or q.shape[1]))
  return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


def _turned(x, theta: float, neighbours: bool):
  """Rotary positions."""
  half = x.shape[-1] // 2
  angles = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
  a, b = (x[..., ::2], x[..., 1::2]) if neighbours else (x[..., :half], x[..., half:])
  turned = [a * cos - b * sin, b * cos + a * sin]
  return jnp.stack(turned, -1).reshape(x.shape) if neighbours else jnp.concatenate(turned, -1)
