"""Several adapters in one batch: each row of it decodes with its own, all of them over one base."""

from collections.abc import Mapping, Sequence
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxlora
from jaxlora import checkpoint

from . import decoding
from .model import Cache, Llama
from .rows import STEP, Example, batch, padded
from .tokens import Chat

BASE = "base"  # the name of no adapter


class Request(NamedTuple):
  """A user's message, and who answers it: an adapter's name, or `BASE`."""

  adapter: str
  prompt: str


@functools.partial(jax.jit, static_argnames=("limit", "end", "pad"))
def greedy(
  model: Llama, bank: jaxlora.Bank, ids: jax.Array, prompts: jax.Array, valid: jax.Array, limit: int, end: int, pad: int
) -> jax.Array:
  """`decoding.greedy`, every row with the adapter of its id: the cache and the loop in one program."""

  def last(model: Llama, tokens: jax.Array, room: jax.Array, cache: Cache, at: jax.Array) -> tuple[jax.Array, Cache]:
    return model(tokens, room, last=1, cache=cache, at=at)

  routed = jaxlora.route(last, in_axes=(0, 0, 1, None), out_axes=(0, 1), on_materialize="error")
  call = functools.partial(routed, model, bank, ids)
  return decoding.decode(call, model.config, prompts, valid, limit, end, pad)


class Server:
  """A base, a bank of adapters, and batches of one size.

  Attributes:
    bank: the adapters; `None` as long as there has been none.
  """

  def __init__(
    self,
    model: Llama,
    chat: Chat,
    size: int,
    limit: int,
    capacity: int,
    rank: int | None = None,
    adapters: Mapping[str, Path] | None = None,
  ):
    """Loads the adapters to begin with.

    Args:
      model: the base, in floats or codes.
      chat: its tokenizer.
      size: rows of a batch; what is asked in smaller ones is filled up.
      limit: the most tokens of an answer.
      capacity: the most adapters at a time.
      rank: the highest rank of an adapter; `None` for the highest of the first ones.
      adapters: folders that finetune.py has written, by name.

    Raises:
      ValueError: as for `put`.
    """
    self.model, self.chat, self.size, self.limit, self.capacity, self.rank = model, chat, size, limit, capacity, rank
    self.bank: jaxlora.Bank | None = None
    if adapters:
      self.bank = jaxlora.stack({name: self._load(name, adapters[name]) for name in adapters}, capacity, rank)

  @property
  def names(self) -> tuple[str, ...]:
    """The adapters that can be asked."""
    return () if self.bank is None else self.bank.names

  def put(self, name: str, folder: Path) -> None:
    """Serves one adapter more, or another one under a name that is there; no program is compiled again.

    Raises:
      ValueError: if it is of another base, of a higher rank or of other layers, or if there is no room; nothing has
        changed then.
    """
    tree = self._load(name, folder)
    if self.bank is None:
      self.bank = jaxlora.stack({name: tree}, self.capacity, self.rank)
      return
    try:
      self.bank = self.bank.put(name, tree)
    except ValueError as error:
      raise ValueError(f"{folder}: {error} serve.py --rank and --capacity say what there is room for.") from None

  def _load(self, name: str, folder: Path) -> Any:
    if name == BASE:
      raise ValueError(f"{name!r} is the base without an adapter: call the adapter otherwise")
    return checkpoint.load(folder, self.model)

  def remove(self, name: str) -> None:
    """Serves one adapter less.

    Raises:
      ValueError: if there is none of this name.
    """
    if self.bank is None or name not in self.bank.names:
      raise self._unknown(name)
    self.bank = self.bank.remove(name)

  def check(self, request: Request) -> None:
    """Raises ValueError for what cannot be answered: an unknown adapter, or a prompt that is too long."""
    if request.adapter != BASE and request.adapter not in self.names:
      raise self._unknown(request.adapter)
    found, context = len(self.chat.prompt(request.prompt)), self.model.config.context
    if padded(found) + self.limit > context:
      most = (context - self.limit) // STEP * STEP
      raise ValueError(
        f"the prompt has {found} tokens, expected at most {most}: the model's context is {context} and the answer has"
        f" {self.limit} of it; shorten the prompt, or answers by --limit"
      )

  def answers(self, requests: Sequence[Request]) -> list[str]:
    """What each one's adapter answers.

    Raises:
      ValueError: as `check` does, before anything is computed.
    """
    for request in requests:
      self.check(request)
    written: list[str] = []
    for k in range(0, len(requests), self.size):
      written += self._batch(requests[k : k + self.size])
    return written

  def _batch(self, requests: Sequence[Request]) -> list[str]:
    full = [*requests, *[requests[-1]] * (self.size - len(requests))]
    rows = batch([Example(self.chat.prompt(request.prompt), []) for request in full], self.chat.pad, answer=0)
    options = self.limit, self.chat.end, self.chat.pad
    if self.bank is None:
      found = decoding.greedy(self.model, *rows, *options)
    else:
      ids = self.bank.ids([None if request.adapter == BASE else request.adapter for request in full])
      found = greedy(self.model, self.bank, ids, *rows, *options)
    return [self.chat.decode(row) for row in found[: len(requests)].tolist()]

  def _unknown(self, name: str) -> ValueError:
    known = ", ".join(map(repr, (BASE, *self.names)))
    return ValueError(f"there is no adapter {name!r}; found {known}: put it first")
