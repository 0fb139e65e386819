"""Trees for PEFT's folders, and folders written and edited by hand."""

import json
import re

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxlora._base.paths import flatten
from jaxlora.peft import Adapter, Module
from jaxlora.peft._config import config_of
from jaxlora.peft._write import write as write_adapter
from tests import helpers

KEY = jax.random.key(0)
PREFIX = "base_model.model."
RANDOM = np.random.default_rng(0)


def normal(*shape, dtype="float32"):
  return jax.device_put(RANDOM.normal(size=shape).astype(dtype))


def layer():
  return {
    "attn": {
      "query": {"kernel": normal(8, 2, 3), "bias": normal(2, 3)},
      "out": {"kernel": normal(2, 3, 8), "bias": normal(8)},
    },
    "norm": {"scale": normal(8)},
  }


def params():
  return {
    "embed": {"embedding": normal(11, 8)},
    "layers_0": layer(),
    "layers_1": layer(),
    "conv": {"kernel": normal(3, 2, 4, 5)},
    "head": {"kernel": normal(8, 7), "bias": normal(7)},
  }


AXES = {".*query/kernel": "ioo", ".*out/kernel": "iio", "conv/kernel": "iiio"}

# Configurations that cover what a PEFT folder can hold of the tree above.
FIELDS = [
  {},
  {"alpha": 3.5, "dropout": 0.25},
  {"scaling": "rslora"},
  {"overrides": {".*query.*": {"rank": 4}, "embed.*": {"alpha": 9}, ".*_1/attn/out.*": {"alpha": 0.5, "rank": 1}}},
  {"targets": ".*query/kernel", "train": ["head", "norm"]},
  {"targets": ".*query/kernel", "train": ".*query/bias"},
  {"targets": ".*query/kernel", "train": ".*bias"},
  {"targets": ".*out/kernel", "train": "(conv|layers_1/attn/query)/.*"},
  {"dtype": "bfloat16"},
  {"dtype": "float16", "targets": "head/kernel"},
]


def adapted(tree=None, targets=r".*(kernel|embedding)", axes=AXES, **fields):
  """An adapted tree with random factors and trained leaves."""
  paths = [path for path, _ in flatten(tree or params())[0] if re.fullmatch(targets, path)]
  axes = {pattern: roles for pattern, roles in axes.items() if any(re.fullmatch(pattern, path) for path in paths)}
  return helpers.adapted(tree or params(), targets=targets, axes=axes, **fields)


def assert_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def write(folder, modules, whole=None, **config):
  """A folder with random factors: name -> (rank, in, out)."""
  records = [
    Module(
      name,
      "linear",
      RANDOM.normal(size=(r, i)).astype("float32"),
      RANDOM.normal(size=(o, r)).astype("float32"),
      float(r),
    )
    for name, (r, i, o) in modules.items()
  ]
  write_modules(folder, records, whole)
  edit(folder, **config)


def write_modules(folder, modules, whole=None):
  """A folder with these modules, and the configuration that they need."""
  by_name = {module.name: module for module in modules}
  write_adapter(folder, Adapter(by_name, whole or {}, {}, config_of(by_name, whole or {})))


def edit(folder, tensors=None, **config):
  """Changes a folder: tensors (`None` takes one out) and fields of the configuration."""
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | config))
  if tensors:
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in (load_file(path) | tensors).items() if v is not None}, path)


def tensors_of(folder):
  return load_file(folder / "adapter_model.safetensors")
