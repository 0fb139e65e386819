"""Adapters whose names are not those of the model's files: vision-language models, beginnings, and `--names`."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora import peft
from tests import helpers
from tests.cli.files import flat

NESTINGS = {
  "text": lambda name: name,
  "Hub": lambda name: "language_model." + name,
  "transformers 5": lambda name: re.sub(r"^model\.", "model.language_model.", name),
}
BESIDE = {
  "text": "visual.blocks.0.q_proj",
  "Hub": "visual.blocks.0.q_proj",
  "transformers 5": "model.visual.blocks.0.q_proj",
}


def model():
  """A text model's tree, and one part beside it."""
  kernel = lambda seed: {"kernel": helpers.array(seed, (4, 6), jnp.float32)}
  layers = {str(k): {"self_attn": {"q_proj": kernel(k)}} for k in range(2)}
  return {"model": {"layers": layers}, "lm_head": kernel(5), "visual": {"blocks": {"0": {"q_proj": kernel(9)}}}}


def files(folder, tree, nesting, adapter=False):
  """A tree's weights as torch has them, or its adapter, under names of one nesting."""
  rename = lambda name: (
    BESIDE[nesting] + name.removeprefix(BESIDE["text"]) if name.startswith("visual") else NESTINGS[nesting](name)
  )
  folder.mkdir(exist_ok=True)
  if not adapter:
    state = {
      rename(name.replace(".kernel", ".weight")): np.ascontiguousarray(x.T) for name, x in flat(tree, ".").items()
    }
    save_file(state, folder / "model.safetensors")
    return state
  peft.save(folder, tree)
  old = load_file(folder / "adapter_model.safetensors")
  beginning = "base_model.model."
  save_file(
    {beginning + rename(name.removeprefix(beginning)): x for name, x in old.items()},
    folder / "adapter_model.safetensors",
  )
  return None


@pytest.mark.parametrize("of_adapter", NESTINGS)
@pytest.mark.parametrize("of_base", NESTINGS)
def test_vision_language_models_of_every_nesting(of_base, of_adapter, run, tmp_path):
  tree = helpers.adapted(model(), targets=".*")
  files(tmp_path / "base", model(), of_base)
  files(tmp_path / "adapter", tree, of_adapter, adapter=True)
  want = files(tmp_path / "want", jaxlora.merge(tree), of_base)
  run("merge", tmp_path / "base" / "model.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
  got = load_file(tmp_path / "out.safetensors")
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)
  nested = {}
  for name in want:  # a Flax tree named like that base
    node = nested
    *parts, _ = name.split(".")
    for part in parts:
      node = node.setdefault(part, {})
    node["kernel"] = jnp.asarray(load_file(tmp_path / "base" / "model.safetensors")[name].T)
  loaded = flat(jaxlora.merge(peft.load(tmp_path / "adapter", nested)), ".")
  for name in want:
    np.testing.assert_allclose(loaded[name.replace(".weight", ".kernel")].T, want[name], rtol=1e-5, atol=1e-6)


def merged(run, tmp_path, state, modules, names=None, code=0):
  """Merges an adapter of some modules into tensors; returns what became of these, or the error."""
  save_file(state, tmp_path / "base.safetensors")
  tensors = {}
  for name, (a, b) in modules.items():
    tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
  (tmp_path / "p").mkdir(exist_ok=True)
  save_file(tensors, tmp_path / "p" / "adapter_model.safetensors")
  config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": sorted(modules)}
  (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(config))
  arguments = []
  if names is not None:
    (tmp_path / "names.json").write_text(json.dumps(names))
    arguments = ["--names", tmp_path / "names.json"]
  report = run(
    "merge", tmp_path / "base.safetensors", tmp_path / "p", tmp_path / "out.safetensors", *arguments, code=code
  )
  return report["error"] if code else load_file(tmp_path / "out.safetensors")


def weight(seed, *shape):
  return np.asarray(helpers.array(seed, shape, jnp.float32))


FACTORS = (weight(1, 2, 4), weight(2, 6, 2))


@pytest.mark.parametrize(
  "names",
  [
    {r"net\.(\d+)\.query": r"layers.\1.q"},
    {r"net/(\d+)/query": r"layers.\1.q"},
    {r"net\.(\d+)\.query\.weight": r"layers.\1.q.weight"},
    {r"net/0/query/weight": "layers.0.q"},
  ],
)
def test_names_between_files_of_torch(names, run, tmp_path):
  state = {"net.0.query.weight": weight(0, 6, 4), "net.0.key.weight": weight(3, 6, 4)}
  found = merged(run, tmp_path, state, {"layers.0.q": FACTORS}, names)
  expected = state["net.0.query.weight"] + FACTORS[1] @ FACTORS[0]
  np.testing.assert_allclose(found["net.0.query.weight"], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(found["net.0.key.weight"], state["net.0.key.weight"])


def test_the_names_that_an_error_advises(run, tmp_path):
  state = {"the.base.q.weight": weight(0, 6, 4)}
  error = merged(run, tmp_path, state, {"another.adapter.q": FACTORS}, code=1)
  (advice,) = re.findall(r"a JSON file of (\{.*\})\.$", error)
  advice = advice.replace("the/base's/name", "the/base").replace("the.adapter's.name", "another.adapter")
  found = merged(run, tmp_path, state, {"another.adapter.q": FACTORS}, json.loads(advice.replace("\\", "\\\\")))
  assert not np.array_equal(found["the.base.q.weight"], state["the.base.q.weight"])


def test_parts_between_files_of_torch(run, tmp_path):
  state = {"net.qkv.weight": weight(0, 12, 4), "net.gate.weight": weight(3, 3, 4), "net.up.weight": weight(4, 3, 4)}
  modules = {
    "net.q": FACTORS,
    "net.v": (weight(5, 2, 4), weight(6, 3, 2)),
    "net.gate_up": (weight(7, 2, 4), weight(8, 6, 2)),
  }
  names = {
    "net/qkv": {"split": ["net.q", "net.k", "net.v"], "sizes": [2, 1, 1]},
    "net/(gate|up)": {"joined": "net.gate_up", "parts": ["gate", "up"]},
  }
  found = merged(run, tmp_path, state, modules, names)
  delta = {name: b @ a for name, (a, b) in modules.items()}
  qkv = np.concatenate([delta["net.q"], np.zeros((3, 4), np.float32), delta["net.v"]])
  for name, update in (("qkv", qkv), ("gate", delta["net.gate_up"][:3]), ("up", delta["net.gate_up"][3:])):
    np.testing.assert_allclose(found[f"net.{name}.weight"], state[f"net.{name}.weight"] + update, rtol=1e-5, atol=1e-5)


def test_several_beginnings_that_fit_are_an_error(run, tmp_path):
  state = {"one.layers.0.q.weight": weight(0, 6, 4), "two.layers.0.q.weight": weight(3, 6, 4)}
  modules = {"layers.0.q": FACTORS}
  error = merged(run, tmp_path, state, modules, code=1)
  assert "layers.0.q.weight: may be any of one.layers.0.q.weight, two.layers.0.q.weight. Say which by --names" in error
  found = merged(run, tmp_path, state, modules, {r"two\.(.*)": r"\1"})
  np.testing.assert_array_equal(found["one.layers.0.q.weight"], state["one.layers.0.q.weight"])
  assert not np.array_equal(found["two.layers.0.q.weight"], state["two.layers.0.q.weight"])


@pytest.mark.parametrize(
  ("names", "message"),
  [
    ({"nothing": "q"}, "matches none of the 2 leaves"),
    ({"(": "q"}, "is not a regular expression"),
    ({"net/.": "q"}, "both are q.weight"),
    ({"net/a": "q.{}"}, "a tensor of a torch model has no stacked layers"),
  ],
)
def test_names_that_do_not_fit(names, message, run, tmp_path):
  state = {"net.a.weight": weight(0, 6, 4), "net.b.weight": weight(3, 6, 4)}
  assert message in merged(run, tmp_path, state, {"q": FACTORS}, names, code=1)


def test_kohyas_names_between_files_of_torch(run, tmp_path):
  name = "down_blocks.0.attentions.1.to_q"
  save_file({f"{name}.weight": weight(0, 6, 4), "x.weight": weight(1, 2, 2)}, tmp_path / "base.safetensors")
  flat_name = "lora_unet_" + name.replace(".", "_")
  factors = {f"{flat_name}.lora_down.weight": FACTORS[0], f"{flat_name}.lora_up.weight": FACTORS[1]}
  save_file(factors | {f"{flat_name}.alpha": np.asarray(1.0, np.float32)}, tmp_path / "style.safetensors")
  run("merge", tmp_path / "base.safetensors", tmp_path / "style.safetensors", tmp_path / "out.safetensors")
  found = load_file(tmp_path / "out.safetensors")
  expected = weight(0, 6, 4) + 0.5 * FACTORS[1] @ FACTORS[0]
  np.testing.assert_allclose(found[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
