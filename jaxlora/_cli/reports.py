"""`jaxlora summary` and `jaxlora explain`: the library's reports on a model that `module:function` returns."""

import dataclasses
from typing import Any

from jaxlora._adapt.summary import summary
from jaxlora._cli.models import model_of
from jaxlora._cli.result import BadFile, Result
from jaxlora._cli.show import Line, Table
from jaxlora._transform.explain import explain


def run_summary(options: Any) -> Result:
  """Reports what is adapted, what trains, and what that costs."""
  found = summary(model_of(options).tree)
  return dataclasses.asdict(found) | {"saved": found.saved}, [Table(found.rows(fold=not options.all)), *found.totals()]


def run_explain(options: Any) -> Result:
  """Reports which path each weight takes, and why."""
  fn, tree, args = model_of(options)
  if fn is None:
    raise BadFile(
      f"{options.model}: found parameters alone; expected (function, parameters, *arguments), which explain traces."
    )
  found = explain(fn, tree, *args)
  lines: list[Line] = [Table(found.rows(fold=not options.all)), found.written_by()]
  return dataclasses.asdict(found) | {"materialized": len(found.materialized)}, lines
