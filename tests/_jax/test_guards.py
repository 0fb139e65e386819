"""Names that JAX does not promise are imported under a guard: whatever a later JAX moves, importing does not fail."""

import importlib.util
import sys
import types

import jax
import jax.extend.core
import jax.interpreters.ad
import jax.interpreters.batching
import jax.interpreters.mlir
import pytest

from jaxlora._jax import (
  batched_call,
  by_platform,
  call_primitive,
  called,
  jaxpr,
  linear_call,
  marked_call,
  processes,
  trace_cache,
)


def again(module):
  """The module, executed anew under another name."""
  spec = importlib.util.spec_from_file_location("anew", module.__file__)
  made = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(made)
  return made


def without(module, *names):
  """A copy of a module that lacks some names."""
  return types.SimpleNamespace(**{name: value for name, value in vars(module).items() if name not in names})


@pytest.mark.parametrize("module", [linear_call, by_platform, call_primitive])
@pytest.mark.parametrize(
  ("holder", "name"),
  [
    ("ad", "primitive_jvps"),
    ("ad", "primitive_transposes"),
    ("batching", "primitive_batchers"),
    ("mlir", "register_lowering"),
    ("mlir", "lower_fun"),
  ],
)
def test_a_name_that_moved_is_no_error(module, holder, name, monkeypatch):
  """A name that is gone from a module is an AttributeError, not an ImportError."""
  assert again(module).Primitive is not None
  kept = {part: getattr(jax.interpreters, part) for part in ("ad", "batching", "mlir")}
  moved = types.SimpleNamespace(**kept | {holder: without(kept[holder], name)})
  monkeypatch.setitem(sys.modules, "jax.interpreters", moved)
  asked = name != "primitive_transposes" or module is linear_call
  assert (again(module).Primitive is None) == asked


@pytest.mark.parametrize(
  ("module", "lost", "fallback"),
  [
    (linear_call, "jax.interpreters", "Primitive"),
    (call_primitive, "jax.extend.core", "Primitive"),
    (by_platform, "jax.interpreters", "Primitive"),
    (called, "jax.experimental.xla_metadata", "set_xla_metadata"),
    (jaxpr, "jax.interpreters", "pe"),
  ],
)
def test_a_module_that_is_gone_is_no_error(module, lost, fallback, monkeypatch):
  if module is call_primitive:
    gone = without(jax.extend.core, "Primitive")
    monkeypatch.setitem(sys.modules, lost, gone)
  else:
    monkeypatch.setitem(sys.modules, lost, None)
  assert getattr(again(module), fallback) is None


def test_layers_are_traced_one_by_one_where_nothing_tells_what_is_traced(monkeypatch):
  monkeypatch.setitem(sys.modules, "jax._src.core", types.SimpleNamespace())
  assert again(trace_cache).is_concrete(object())


def test_where_jax_has_moved_its_service_nobody_waits(monkeypatch):
  monkeypatch.setattr(processes, "distributed", None)
  assert processes.all_meet("somewhere", 1.0)


def test_calls_are_plain_where_there_are_no_primitives(monkeypatch):
  fn = lambda x: 2 * x
  for module in (batched_call, marked_call):
    monkeypatch.setattr(module, "Primitive", None)
  assert batched_call.batched_call(fn, lambda batched, args: None, 3) == 6
  assert marked_call.marked_call(fn, None, 3) == 6
