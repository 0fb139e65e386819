"""Serves the language model's example with several adapters in one batch, and swaps them while it runs.

It reads a JSON object a line, and writes one a line for each:

  {"adapter": "papers", "prompt": "..."}     answered by that adapter; "base" is the model without one
  {"put": "papers", "folder": "F"}           one adapter more, or another one of that name: nothing is compiled again
  {"remove": "papers"}

Prompts that follow each other are answered together, --batch at a time: at a blank line, ahead of "put" and "remove",
and at the end. What cannot be done is answered by {"error": ...}, and serving goes on.
"""

import argparse
from collections.abc import Iterable, Sequence
import json
from pathlib import Path
import sys
from typing import Any

from lm import gguf_file, methods, tokens
from lm.serving import Request, Server

FORMS = ({"adapter", "prompt"}, {"put", "folder"}, {"remove"})


def make_parser() -> argparse.ArgumentParser:
  """The options."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="examples:\n"
    "  python examples/llm/serve.py --adapter papers=out/llm/NAME.adapter < requests.jsonl\n"
    """  echo '{"adapter": "base", "prompt": "What is LoRA?"}' | python examples/llm/serve.py\n"""
    "  python examples/llm/serve.py --base nf4 --adapter papers=out/llm/NAME.adapter --capacity 8 --rank 16",
  )
  add = parser.add_argument
  add("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="an adapter that finetune.py kept; again")
  add("--base", choices=("float", *methods.CODES), default="float", help="the base's weights, as the adapters' were")
  add("--batch", type=int, default=4, help="rows of a batch (default: 4)")
  add("--limit", type=int, default=64, help="the most tokens of an answer (default: 64)")
  add("--capacity", type=int, default=4, help="the most adapters at a time (default: 4)")
  add("--rank", type=int, help="the highest rank of an adapter (default: the highest of --adapter)")
  add("--model", type=Path, help="a GGUF file of a Llama-family model (default: SmolLM2-135M-Instruct)")
  return parser


def make_server(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Server:
  """The server of the options, with their adapters."""
  for name in ("batch", "limit", "capacity", "rank"):
    if (value := getattr(args, name)) is not None and value < 1:
      parser.error(f"--{name}: found {value}, expected a whole number of at least 1")
  for given in args.adapter:
    if not all(given.partition("=")):
      parser.error(f"--adapter: found {given!r}, expected NAME=FOLDER")
  adapters = {name: Path(folder) for name, _, folder in (given.partition("=") for given in args.adapter)}
  try:
    model, fields = gguf_file.load(args.model or gguf_file.packaged())
    chat = tokens.chat_of(fields, model.config.vocabulary)
    base = methods.base_of(methods.Method("lora", base=args.base), model)
    return Server(base, chat, args.batch, args.limit, args.capacity, args.rank, adapters)
  except (OSError, ValueError) as error:
    parser.error(str(error))


def read(line: str) -> dict[str, str]:
  """A line's object.

  Raises:
    ValueError: if it is none, or of no known form.
  """
  try:
    found: Any = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"no JSON ({error}): expected an object a line") from None
  if not isinstance(found, dict) or set(found) not in FORMS or not all(isinstance(x, str) for x in found.values()):
    forms = "; ".join(" and ".join(sorted(form)) for form in FORMS)
    raise ValueError(f"found {line.strip()}, expected an object with texts for one of: {forms}")
  return found


def serve(server: Server, lines: Iterable[str], write: Any) -> None:
  """Answers lines until they end; `write` takes the answers, in the order of the lines."""
  waiting: list[tuple[int, Request]] = []
  out: list[dict[str, str]] = []

  def flush() -> None:
    for (place, request), text in zip(waiting, server.answers([r for _, r in waiting]), strict=True):
      out[place] = {"adapter": request.adapter, "answer": text}
    for answer in out:
      write(answer)
    waiting.clear()
    out.clear()

  for line in lines:
    if not line.strip():
      flush()
      continue
    try:
      asked = read(line)
      if "prompt" in asked:
        request = Request(**asked)
        server.check(request)
        waiting.append((len(out), request))
        out.append({})
      else:
        flush()
        if "put" in asked:
          server.put(asked["put"], Path(asked["folder"]))
        else:
          server.remove(asked["remove"])
        out.append(asked)
    except (OSError, ValueError) as error:
      out.append({"error": str(error)})
    if len(waiting) == server.size:
      flush()
  flush()


def main(argv: Sequence[str] | None = None) -> None:
  """Serves the standard input."""
  parser = make_parser()
  server = make_server(parser, parser.parse_args(argv))
  print(f"Ready: {', '.join(('base', *server.names))}.", file=sys.stderr, flush=True)
  serve(server, sys.stdin, lambda answer: print(json.dumps(answer, ensure_ascii=False), flush=True))


if __name__ == "__main__":
  main()
