"""`--print-completion SHELL`: what a shell needs to complete commands, by shtab."""

import argparse
import importlib.util
from typing import Any

_FILES = ("PATH", "FOLDER", "FROM", "TO", "BASE", "ADAPTER", "OUT", "FILE")
_HELP = "print what SHELL needs to complete commands: bash, zsh or tcsh"


def add_completion(parser: argparse.ArgumentParser) -> None:
  """Adds the option; without shtab it says what to install."""
  if importlib.util.find_spec("shtab") is None:
    parser.add_argument("--print-completion", metavar="SHELL", action=_Missing, help=f"{_HELP}; needs jaxlora[cli]")
    return
  import shtab

  shtab.add_argument_to(parser, ["--print-completion"], help=_HELP)
  for action in _actions(parser):
    if action.metavar in _FILES:
      action.complete = shtab.FILE


def _actions(parser: argparse.ArgumentParser) -> list[Any]:
  """The options and arguments of a parser and of its commands."""
  found: list[Any] = []
  for action in parser._actions:
    found.append(action)
    if isinstance(action, argparse._SubParsersAction):
      found += [inner for command in action.choices.values() for inner in _actions(command)]
  return found


class _Missing(argparse.Action):
  """The option without shtab."""

  def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
    """Says what to install, as an error of usage."""
    parser.error("completion needs shtab. Install the extra: pip install 'jaxlora[cli]'")
