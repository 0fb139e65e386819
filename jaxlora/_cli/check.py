"""`jaxlora check`: what PEFT, vLLM, SGLang and llama.cpp will make of a PEFT folder."""

from pathlib import Path
from typing import Any

from jaxlora._base.text import listed
from jaxlora._cli.result import BadFile, Result
from jaxlora._cli.sources import check_names
from jaxlora.peft._read import read_with_keys
from jaxlora.peft._serve import READERS
from jaxlora.peft._served import Finding, findings, readers_of, served
from jaxlora.peft._write import write


def run_check(options: Any) -> Result:
  """Tells which rules of the readers FOLDER breaks; with --write, writes the same adapter so that they hold."""
  readers = readers_of(options.serve or READERS)
  adapter, keys = read_with_keys(Path(options.folder), adapter_name=options.adapter_name, mapped=not options.write)
  found = findings(adapter, keys, readers)
  if options.write:
    if Path(options.write).resolve() == Path(options.folder).resolve():
      raise BadFile(f"{options.write}: is the folder itself; expected another one.")
    check_names(adapter, options.folder)
    write(options.write, served(adapter, keys, tuple(dict.fromkeys(("peft", *readers))), options.folder))
    found = [finding for finding in found if finding.rule.note]
  broken = [finding for finding in found if not finding.rule.note]
  report = {
    "folder": options.folder,
    "serve": list(readers),
    "wrote": options.write,
    "problems": [_fields(finding) for finding in broken],
    "unsupported": list(adapter.unsupported),
    "notes": [_fields(finding) for finding in found if finding.rule.note],
  }
  good = [reader for reader in readers if reader not in {finding.reader for finding in broken}]
  lines = [f"not understood here: {reason}" for reason in adapter.unsupported]
  lines += [f"{'note: ' if finding.rule.note else ''}{finding}" for finding in found]
  lines += [f"{options.write}: written"] if options.write else []
  return report, [*lines, f"{options.write or options.folder}: {listed(good) or 'nobody'} will read it as it is meant"]


def _fields(finding: Finding) -> dict[str, Any]:
  rule = finding.rule
  return {
    "reader": finding.reader,
    "rule": rule.name,
    "requires": rule.requires,
    "found": list(finding.found),
    "otherwise": rule.otherwise,
    "remedy": finding.remedy,
    "source": rule.source,
  }
