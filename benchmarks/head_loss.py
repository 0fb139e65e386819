"""The loss of a large head a part of the tokens at a time, beside the loss of all logits at once: time and memory.

Value and gradient of the mean cross entropy of hidden states and a head of `--d` x `--vocabulary`, for a head that is
frozen, adapted, or trained whole. The plain loss is optax's on `hidden @ head`; the other one is
`jaxlora.losses.chunked_cross_entropy`. Times are measured in interleaved rounds, each over its own plain loss.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import harness
from here import Step, compile_here, runs_of
import jax
import optax

import jaxlora
from jaxlora.losses import chunked_cross_entropy

PLAIN, CHUNKED = "plain", "chunked"
HEADS = ("frozen", "adapted", "trained whole")
REACH_TIME, REACH_TEMP = 1.10, 0.20  # at most, over the plain loss's


class Sizes(NamedTuple):
  """Of one comparison."""

  batch: int
  seq: int
  width: int
  vocabulary: int
  rank: int


def losses(sizes: Sizes) -> dict[str, Step]:
  """Both losses of each head, by `HEAD, LOSS`."""
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (sizes.batch, sizes.seq, sizes.width))
  head = jax.random.normal(keys[1], (sizes.width, sizes.vocabulary)) / sizes.width
  labels = jax.random.randint(keys[2], hidden.shape[:2], 0, sizes.vocabulary)
  config = jaxlora.LoraConfig(rank=sizes.rank, targets="kernel", axes={"kernel": "io"})
  frozen, factors = jaxlora.split(jaxlora.adapt({"kernel": head}, config, keys[3]))

  def plain(params: Any, hidden: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["kernel"], labels).mean()

  def chunked(params: Any, hidden: jax.Array) -> jax.Array:
    return chunked_cross_entropy(hidden, params["kernel"], labels)[0]

  def both(head: str, given: Callable[..., Any], moving: int, *args: Any) -> dict[str, Step]:
    """Both losses of `given(loss)`, differentiated along its first arguments."""
    step = lambda loss: jax.value_and_grad(given(loss), tuple(range(moving)))
    wrapped = jaxlora.wrap(plain) if head == "adapted" else plain
    return {f"{head}, {PLAIN}": Step(step(wrapped), args), f"{head}, {CHUNKED}": Step(step(chunked), args)}

  last = lambda loss: lambda hidden, params: loss(params, hidden)
  joined = lambda loss: lambda hidden, factors, frozen: loss(jaxlora.join(frozen, factors), hidden)
  params = {"kernel": head}
  return {
    **both("frozen", last, 1, hidden, params),
    **both("adapted", joined, 2, hidden, factors, frozen),
    **both("trained whole", last, 2, hidden, params),
  }


def compare(sizes: Sizes, rounds: int, tick: Callable[[str], Any]) -> dict[str, Any]:
  """Figures of each loss, by its name."""
  named = losses(sizes)
  compiled = compile_here(named, tick)
  rows = {name: {"temp": one.memory_analysis().temp_size_in_bytes} for name, one in compiled.items()}
  runs = runs_of(compiled, named)
  control = f"{HEADS[0]}, {PLAIN}"
  runs = harness.with_control(runs, control, runs[control])
  seconds = harness.interleave(runs, rounds, harness.calls_per_turn(runs), lambda calls: tick("timing"))
  for head in HEADS:
    over = harness.ratios(seconds, f"{head}, {PLAIN}")
    for name in (f"{head}, {PLAIN}", f"{head}, {CHUNKED}"):
      rows[name].update(seconds=harness.summarize(seconds[name]), over_plain=over[name])
  return {"rows": rows, "control": harness.ratios(seconds, control)[control + harness.CONTROL]}


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of the table, then its rows."""
  table = [("head, loss", "time / plain", "time", "temp / plain")]
  for head in HEADS:
    first = results["rows"][f"{head}, {PLAIN}"]
    for loss in (PLAIN, CHUNKED):
      row = results["rows"][f"{head}, {loss}"]
      times = harness.ratio_cell(row["over_plain"]), harness.milliseconds(row["seconds"])
      table.append((f"{head}, {loss}", *times, harness.exact_cell(row["temp"] / first["temp"])))
  return table


def remark(results: dict[str, Any]) -> str:
  """What stands below the table."""
  return (
    f"To reach: time {REACH_TIME:.2f}, temp {REACH_TEMP:.2f}. A/A control (a plain loss again / itself):"
    f" {harness.ratio_cell(results['control'])}"
  )


def describe(results: dict[str, Any]) -> str:
  """The table, for a terminal."""
  return harness.described(results["title"], cells(results), remark(results))


def tables(results: dict[str, Any]) -> str:
  """The table of benchmarks/README.md."""
  return harness.documented(f"{results['title']}. {harness.conditions(results)}.", cells(results), remark(results))


def plot(results: dict[str, Any], path: Any) -> None:
  """Times over the plain losses'."""
  values = {name: row["over_plain"] for name, row in results["rows"].items() if name.endswith(CHUNKED)}
  harness.plot_bars([harness.Panel(results["title"], "time / plain loss's", values, REACH_TIME)], path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what head_loss.json holds."""
  parser = harness.make_parser(__file__, __doc__, "--batch 4 --seq 1024 --d 576")
  count = harness.positive(int)
  parser.add_argument("--batch", type=count, default=4, help="sequences (default: 4)")
  parser.add_argument("--seq", type=count, default=1024, help="tokens of each (default: 1024)")
  parser.add_argument("--d", type=count, default=576, help="the hidden states' width (default: 576)")
  parser.add_argument("--vocabulary", type=count, default=49152, help="words of the head (default: 49152)")
  parser.add_argument("--rank", type=count, default=8, help="the adapter's (default: 8)")
  args = harness.parse(parser, argv, batch=2, seq=128, d=64, vocabulary=2048, rounds=3)
  sizes = Sizes(args.batch, args.seq, args.d, args.vocabulary, args.rank)
  title = f"{sizes.batch} x {sizes.seq:,} tokens, {sizes.vocabulary:,} words, d={sizes.width}, float32"
  with harness.progress((args.rounds + 1) * 7 + 6, "turn", args.quiet) as bar:
    results = {**harness.provenance(args), "title": title, **compare(sizes, args.rounds, harness.ticker(bar))}
  harness.publish(args, "head_loss", results, plot)
  print(describe(results))
  return results


if __name__ == "__main__":
  main()
