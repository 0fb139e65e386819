"""The command line: `jaxlora inspect`, `check`, `convert`, `merge`, `summary` and `explain`."""

import argparse
from collections.abc import Callable, Sequence
import json
import logging
import sys
from typing import Any

from jaxlora._cli.check import run_check
from jaxlora._cli.completion import add_completion
from jaxlora._cli.convert import run_convert
from jaxlora._cli.inspect import run_inspect
from jaxlora._cli.merge import run_merge
from jaxlora._cli.reports import run_explain, run_summary
from jaxlora._cli.result import Result
from jaxlora._cli.show import show
from jaxlora._version import __version__
from jaxlora.peft._serve import READERS

_NAMES = (
  "JSON: the `names` of jaxlora.peft, regex over leaves (or over the tensors of a torch model) -> torch module, or"
  ' {"split": [modules]}, {"joined": module, "parts": [components]}, {"experts": parameter}'
)

_AXES = 'JSON: the `axes` of jaxlora.peft, regex over leaves -> roles, such as {".*/q_proj/kernel": "oi"}'

_EXIT = """
exit codes: 0 done; 1 the file is bad, or does not fit; 2 usage, or an extra that is missing
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit code."""
  options = _parser().parse_args(arguments)
  logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it raises
  try:
    report, lines = options.run(options)
  except ImportError as error:
    told = "" if "jaxlora[" in str(error) else ". Install the extra: pip install 'jaxlora[peft]'"
    print(f"jaxlora: {error}{told}", file=sys.stderr)
    return 2
  except (ValueError, OSError) as error:  # all that the library raises of files and what they hold are ValueErrors
    text = f"{error}{_as_options(str(error), options)}"
    if options.json:
      print(json.dumps({"error": text}))
    print(f"jaxlora: {text}", file=sys.stderr)
    return 1
  if options.json:
    print(json.dumps(report, indent=2))
  else:
    show(lines)
  return int(bool(report.get("nan") or report.get("problems")))


def _as_options(error: str, options: Any) -> str:
  """What a remedy that names the library's arguments is in a command."""
  named = [name for name in ("axes", "names") if f"{name}=" in error and hasattr(options, name)]
  told = [f"{name}= is --{name} FILE" for name in named]
  told += ["LoraConfig(...) is --config FILE"] if "LoraConfig(" in error and hasattr(options, "config") else []
  return "".join(f"\nIn a command {one}, in JSON." for one in told)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="jaxlora",
    description="Adapters in files, jaxlora's checkpoints and PEFT folders, and reports on models.",
    epilog=_EXIT,
  )
  parser.add_argument("--version", action="version", version=__version__)
  commands = parser.add_subparsers(required=True, metavar="COMMAND")

  def command(name: str, run: Callable[[Any], Result], about: str, detail: str, example: str) -> Any:
    added = commands.add_parser(
      name,
      help=about,
      description=f"{about[0].upper()}{about[1:]}.\n{detail}",
      epilog=f"example:\n  {example}\n{_EXIT}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(run=run)
    added.add_argument("--json", action="store_true", help="print one JSON object")
    return added

  inspect = command(
    "inspect",
    run_inspect,
    "show what an adapter adapts: ranks, alphas, sizes, norms, NaNs",
    "PATH is a checkpoint of jaxlora or a PEFT folder. NaNs make the exit code 1.",
    "jaxlora inspect runs/summaries/1200",
  )
  inspect.add_argument("path", metavar="PATH")
  inspect.add_argument("--plot", metavar="FILE", help="draw norms and sizes by leaf: .png, .svg or .pdf")

  check = command(
    "check",
    run_check,
    "tell what PEFT, vLLM, SGLang and llama.cpp will make of a PEFT folder",
    "Each rule that FOLDER breaks is told with what was found, what the reader does then, the remedy, and the\n"
    "reader's function that asks for it. A broken rule makes the exit code 1; a note does not. With --write, the same\n"
    "adapter is written to OUT with one rank, one scale and PEFT's keys, or refused.",
    "jaxlora check adapter --serve vllm --serve llama.cpp --write served",
  )
  check.add_argument("folder", metavar="FOLDER")
  check.add_argument(
    "--serve",
    metavar="READER",
    action="append",
    choices=READERS,
    help=f"whose rules, all of them without: {', '.join(READERS)}",
  )
  check.add_argument("--write", metavar="OUT", help="write the adapter there so that the rules hold")

  convert = command(
    "convert",
    run_convert,
    "turn a checkpoint into a PEFT folder, or the other way round",
    "The format of FROM decides, unless --to does; FROM may be mlx-lm's folder, a LoRA file of diffusers or kohya, or\n"
    "a tree in which qwix or flax.nnx.LoRA left factors (orbax, msgpack), too.\n"
    "A checkpoint knows the names and shapes of its base. A PEFT folder does not, nor the\n"
    "names of a Flax model: those are read from --base, whose values are not looked at; without it the leaves are\n"
    "called by torch's names (h.0.attn.c_attn becomes h/0/attn/c_attn/kernel, of shape (in, out)), which leaves\n"
    "modules_to_save no shape: they need --base.",
    "jaxlora convert runs/summaries adapter --base-model openai-community/gpt2",
  )
  convert.add_argument("source", metavar="FROM")
  convert.add_argument("target", metavar="TO")
  convert.add_argument(
    "--to", choices=("peft", "jaxlora", "mlx-lm"), help="format of TO; the other of PEFT's and jaxlora's by default"
  )
  convert.add_argument("--alpha", type=float, metavar="ALPHA", help="of qwix's rule, which its checkpoints do not hold")
  convert.add_argument(
    "--base",
    metavar="FILE",
    help="names and shapes of the Flax base: safetensors, msgpack, orbax, or a jaxlora checkpoint on it",
  )
  convert.add_argument(
    "--gguf",
    metavar="MODEL",
    help="the model's GGUF file, where FROM or TO is llama.cpp's adapter, called NAME.gguf: jaxlora convert run"
    " adapter.gguf --gguf model.gguf",
  )
  convert.add_argument("--names", metavar="FILE", help=_NAMES)
  convert.add_argument("--axes", metavar="FILE", help=_AXES)
  convert.add_argument("--base-model", metavar="NAME", help="base_model_name_or_path in adapter_config.json")
  convert.add_argument("--task-type", metavar="TYPE", help="task_type in adapter_config.json, such as CAUSAL_LM")
  convert.add_argument(
    "--serve",
    metavar="READER",
    action="append",
    choices=READERS,
    help="who is to read the PEFT folder, beside PEFT: vllm, sglang, llama.cpp; may be given several times",
  )

  merge = command(
    "merge",
    run_merge,
    "fold an adapter into a model's safetensors",
    "BASE is a safetensors file, an index of several, a flax_model.msgpack, an orbax checkpoint, or a folder with one\n"
    'of them; its tensors are named as in torch, or by the paths of a Flax tree joined by "/" or ".". ADAPTER is a\n'
    "checkpoint of jaxlora or a PEFT folder. OUT is a file where BASE is one or OUT is called .safetensors, else a\n"
    "new folder, to which config.json and the tokenizer go along. FP8 weights with scales are decoded and stored\n"
    "again in their format. One tensor is in memory at a time; an orbax checkpoint is written whole.",
    "jaxlora merge model.safetensors runs/summaries merged.safetensors",
  )
  merge.add_argument("base", metavar="BASE")
  merge.add_argument("adapter", metavar="ADAPTER")
  merge.add_argument("out", metavar="OUT")
  merge.add_argument("--names", metavar="FILE", help=_NAMES)
  merge.add_argument("--axes", metavar="FILE", help=_AXES)
  merge.add_argument(
    "--dtype",
    choices=("float32", "float16", "bfloat16"),
    help="dtype of the merged tensors, where rounding to the base's would lose small updates",
  )
  merge.add_argument(
    "--dequantize", action="store_true", help="store all quantised weights as plain floats, without their scales"
  )
  merge.add_argument(
    "--untie",
    action="store_true",
    help="write the head as a tensor of its own, where it is tied to an embedding that the adapter changes otherwise",
  )
  merge.add_argument(
    "--any-base", action="store_true", help="merge though the base's fingerprint is not the recorded one"
  )
  for name, run, about, example in _REPORTS:
    _add_model(command(name, run, about, _MODEL, example))
  for reading in (inspect, check, convert, merge):
    reading.add_argument(
      "--adapter-name", metavar="NAME", help="of several adapters in a PEFT folder, or in its keys, the one to read"
    )
  add_completion(parser)
  return parser


_MODEL = """MODEL is module:function, a function of no argument in a module that Python finds here. It returns
(function, parameters, *arguments): function(parameters, *arguments) is what runs. Arrays may be
jax.ShapeDtypeStructs, as jax.eval_shape makes them: nothing is computed. Parameters that are not adapted
are adapted as the options say."""

_REPORTS = (
  (
    "summary",
    run_summary,
    "show what is adapted of a model, what trains, and what that costs",
    "jaxlora summary mymodels.gpt:small --rank 16 --targets attention",
  ),
  (
    "explain",
    run_explain,
    "show which path each adapted weight of a model takes, where, and why",
    "jaxlora explain mymodels.gpt:small --json",
  ),
)


def _add_model(command: Any) -> None:
  """The arguments of a report on a model."""
  command.add_argument("model", metavar="MODEL")
  command.add_argument("--rank", type=int, metavar="RANK", help="8, if not given")
  command.add_argument("--alpha", type=float, metavar="ALPHA", help="the rank, if not given")
  command.add_argument("--targets", metavar="TARGETS", help='a preset or a regex over paths; "all-linear"')
  command.add_argument("--variant", metavar="NAME", help="lora, dora, ...")
  command.add_argument("--config", metavar="FILE", help="JSON: the fields of LoraConfig, as its to_dict() has them")
  command.add_argument("--all", action="store_true", help="a row for each of the layers that are alike")
