"""The public faces: complete, documented, and with every name that an earlier version had."""

import importlib
import inspect
import types

import pytest

import jaxlora

# Every name of version 0.1.0.
# fmt: off
EARLIER = [
  "Bank", "FullWeight", "LoraConfig", "LoraWeight", "LowRank", "MaterializeError", "MaterializeWarning",
  "Truncation", "adapt", "allocate", "combine", "compress", "cosine", "explain", "extract", "grad",
  "init_from_data", "interpolate", "join", "labels", "lora_plus", "low_rank", "mask", "merge", "norms", "optimizer",
  "pad", "prune", "route", "scale", "sensitivity", "spectrum", "split", "stack", "strip", "subtract", "summary",
  "value_and_grad", "wrap",
]
EARLIER_FACES = {
  "checkpoint": [
    "CheckpointError", "CheckpointWarning", "Contents", "Manager", "State", "contents", "fingerprint",
    "restore", "save",
  ],
  "peft": ["PeftError", "load", "save"],
}
# fmt: on
FACES = ("svd", "arithmetic", "init", "serving", "checkpoint", "peft")


def face(name):
  return importlib.import_module(f"jaxlora.{name}")


def test_every_earlier_name_works():
  assert set(EARLIER) <= set(jaxlora.__all__)
  assert all(hasattr(jaxlora, name) for name in jaxlora.__all__)
  assert jaxlora.__version__
  assert "__version__" not in jaxlora.__all__
  for name, names in EARLIER_FACES.items():
    assert set(names) <= set(face(name).__all__)


@pytest.mark.parametrize("name", FACES)
def test_a_face_has_what_it_lists_and_an_example(name):
  module = face(name)
  public = {key for key, value in vars(module).items() if not key.startswith("_") and not inspect.ismodule(value)}
  assert public == set(module.__all__)
  assert len(set(module.__all__)) == len(module.__all__)
  assert any(line.startswith("    ") for line in module.__doc__.splitlines()), "the docstring has no example"
  for key in module.__all__:
    value = getattr(module, key)
    if isinstance(value, type | types.FunctionType):
      assert value.__doc__, key


def test_reports_can_be_named():
  """The types of what functions return are where the functions are."""
  for name in ("Truncation", "LeafTruncation", "Summary", "LeafSummary", "Explanation", "Use", "LowRank"):
    assert isinstance(getattr(jaxlora, name), type)
  for name, kinds in {"svd": ("Truncation", "LeafTruncation"), "arithmetic": ("Truncation",)}.items():
    assert all(getattr(face(name), kind) is getattr(jaxlora, kind) for kind in kinds)
  assert {"State", "Contents"} <= set(face("checkpoint").__all__)


@pytest.mark.parametrize("name", ["compress", "combine", "extract"])
def test_a_function_with_a_report_stands_beside_each_that_loses_something(name):
  plain, partner = getattr(jaxlora, name), getattr(jaxlora, f"{name}_with_report")
  options = list(inspect.signature(plain).parameters)
  assert options.pop() == "with_report"
  assert list(inspect.signature(partner).parameters) == options
