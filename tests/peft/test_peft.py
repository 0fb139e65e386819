"""The interchange with the real PEFT: the same logits before and after, both ways, for every kind of layer and option.

Needs torch, peft and transformers: `pip install -e ".[interchange]"` (torch's CPU build). Run by itself, as the rest of
the suite keeps transformers from loading torch: `USE_TORCH=1 python -m pytest tests/peft/test_peft.py`.
"""

import copy
import dataclasses
import functools
import json
import os
import re
import warnings

import pytest

if os.environ.get("USE_TORCH") != "1":
  pytest.skip(
    "needs torch, in a run of its own: USE_TORCH=1 python -m pytest tests/peft/test_peft.py", allow_module_level=True
  )
torch = pytest.importorskip("torch", reason="the interchange is tested against torch: jaxlora[interchange]")
peft = pytest.importorskip("peft", reason="the interchange is tested against peft: jaxlora[interchange]")
transformers = pytest.importorskip("transformers", reason="the models are those of transformers: jaxlora[interchange]")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from safetensors import torch as safetensors_torch  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import jaxlora  # noqa: E402
from jaxlora import _cli  # noqa: E402
import jaxlora.peft  # noqa: E402
from tests.helpers import peft_models as twins  # noqa: E402

torch.set_num_threads(1)  # for models this small more threads only wait for each other
pytestmark = [
  pytest.mark.usefixtures("lenient"),
  pytest.mark.filterwarnings("default"),
  # PEFT only warns where an adapter is not there: here that is a failure.
  pytest.mark.filterwarnings("error:.*[Mm]issing adapter keys"),
]
KEY = jax.random.key(0)
IDS = np.random.default_rng(0).integers(0, twins.VOCABULARY, (3, 7))


def merged(node):
  """A leaf of the plain parameters, in NumPy: what `jaxlora.merge` makes, without compiling a program per shape."""
  if isinstance(node, jaxlora.FullWeight):
    return np.asarray(node.value)
  if not isinstance(node, jaxlora.LoraWeight):
    return np.asarray(node)
  if node.extra or node.variant == "tokens":
    return np.asarray(node.materialize())  # the variants' own tests hold it to each paper's equation
  axes = {own: [d for d, role in enumerate(node.roles) if role in f"s{own}"] for own in "io"}
  stack, rank = node.roles.count("s"), len(node.roles)
  a, b = ([*axes[own][:stack], rank, *axes[own][stack:]] for own in "io")
  return np.asarray(node.base) + node.scale * np.einsum(node.a, a, node.b, b, list(range(rank)))


@functools.cache
def jitted(twin):
  return jax.jit(twin.apply)


@dataclasses.dataclass
class Pair:
  """A torch model, its twin, and how the twin's paths and torch's names meet."""

  torch_model: object
  twin: object
  inputs: np.ndarray
  module_of: object
  names: dict | None = None
  axes: dict | None = None

  @functools.cached_property
  def params(self):
    shapes = jax.eval_shape(self.twin.init, KEY, jnp.asarray(self.inputs))["params"]
    state = self.torch_model.state_dict()
    for name, tensor in state.items():
      module = self.torch_model.get_submodule(name.rpartition(".")[0])
      tensor.linear = isinstance(module, torch.nn.Linear)
    return twins.from_torch(shapes, state, self.module_of)

  def logits(self, model):
    inputs = torch.from_numpy(self.inputs)
    if self.inputs.ndim > 2:
      inputs = inputs.movedim(-1, 1)
    with torch.no_grad():
      out = model.eval()(inputs)
    return (out if isinstance(out, torch.Tensor) else out.logits).numpy()

  def apply(self, tree):
    """The twin's logits, with the adapter folded in: one compilation serves all cases."""
    params = jax.tree.map(merged, tree, is_leaf=lambda x: isinstance(x, (jaxlora.LoraWeight, jaxlora.FullWeight)))
    return np.asarray(jitted(self.twin)({"params": params}, self.inputs))

  def factored(self, tree):
    apply = jaxlora.wrap(self.twin.apply, on_materialize="error")
    return np.asarray(jax.jit(apply)({"params": tree}, jnp.asarray(self.inputs)))

  def load(self, folder, params=None, **options):
    return jaxlora.peft.load(folder, self.params if params is None else params, names=self.names, **options)

  def save(self, folder, tree, **options):
    jaxlora.peft.save(folder, tree, names=self.names, **options)


@functools.cache
def llama(scanned=False, bias=False):
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=twins.VOCABULARY, hidden_size=twins.WIDTH, intermediate_size=24, num_hidden_layers=twins.LAYERS,
    num_attention_heads=twins.HEADS, num_key_value_heads=twins.KV_HEADS, attention_bias=bias, initializer_range=0.2,
    tie_word_embeddings=False,
  )  # fmt: skip

  def module_of(path):
    name = re.sub(r"layers_(\d+)", r"layers.\1", path) if not scanned else path.replace("layers", "layers.{}", 1)
    return name.replace("/", ".") if path == "lm_head" else "model." + name.replace("/", ".")

  return Pair(transformers.LlamaForCausalLM(config), twins.Llama(bias=bias, scanned=scanned), IDS, module_of)


def scanned_llama():
  return llama(scanned=True)


def biased_llama():
  return llama(bias=True)


@functools.cache
def gpt2():
  torch.manual_seed(0)
  config = transformers.GPT2Config(
    vocab_size=twins.VOCABULARY, n_positions=32, n_embd=twins.WIDTH, n_layer=twins.LAYERS, n_head=twins.HEADS,
    initializer_range=0.2,
  )  # fmt: skip

  def module_of(path):
    return "transformer." + re.sub(r"h_(\d+)", r"h.\1", path).replace("/", ".")

  return Pair(transformers.GPT2LMHeadModel(config), twins.GPT2(), IDS, module_of)


@functools.cache
def bert():
  torch.manual_seed(0)
  config = transformers.BertConfig(
    vocab_size=twins.VOCABULARY, hidden_size=twins.WIDTH, num_hidden_layers=twins.LAYERS, intermediate_size=24,
    num_attention_heads=twins.HEADS, max_position_embeddings=32, num_labels=3, initializer_range=0.2,
  )  # fmt: skip
  model = transformers.BertForSequenceClassification(config)
  return Pair(model, twins.Bert(), IDS, lambda path: path.replace("/", "."))


class TorchConvNet(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.cube = torch.nn.Conv3d(3, 6, 3, padding=1)
    self.plane = torch.nn.Conv2d(6, 8, (3, 2), stride=(1, 2))
    self.line = torch.nn.Conv1d(8, 5, 3, padding=1)
    self.pre_head = torch.nn.Linear(5, 9)
    self.head = torch.nn.Linear(9, 7)

  def forward(self, x):
    x = torch.relu(self.cube(x))
    x = torch.relu(self.plane(x.reshape(*x.shape[:3], 16)))
    x = torch.relu(self.line(x.reshape(*x.shape[:2], -1)))
    return self.head(torch.relu(self.pre_head(x.mean(-1))))


@functools.cache
def conv_net():
  torch.manual_seed(0)
  inputs = np.random.default_rng(0).normal(size=(2, 4, 4, 4, 3)).astype("float32")
  names = {"conv_line": "line"}
  return Pair(TorchConvNet(), twins.ConvNet(), inputs, lambda path: path.replace("conv_line", "line"), names)


def trained(pair, steps=4, **config):
  """A PEFT model after a few real steps, on a copy of the pair's torch model."""
  torch.manual_seed(1)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(copy.deepcopy(pair.torch_model), peft.LoraConfig(**config)).train()
  optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
  inputs = torch.from_numpy(pair.inputs)
  if pair.inputs.ndim > 2:
    inputs = inputs.movedim(-1, 1)
  for _ in range(steps):
    out = model(inputs)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    loss = -torch.log_softmax(logits, -1)[..., 1].mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
  return model


def assert_same(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def assert_differ(found, other):
  assert np.abs(found - other).max() > 1e-2 * np.abs(other).max()


@pytest.fixture(params=[llama, scanned_llama, biased_llama, gpt2, bert, conv_net], ids=lambda build: build.__name__)
def pair(request):
  return request.param()


def test_the_twin_is_the_torch_model(pair):
  assert_same(pair.apply(pair.params), pair.logits(pair.torch_model))


LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FROM_PEFT = {
  "llama": (llama, {"target_modules": LLAMA_LINEAR, "r": 4, "lora_alpha": 8}),
  "llama, a regex": (llama, {"target_modules": r".*\.1\..*(q_proj|down_proj)", "r": 3, "lora_alpha": 6}),
  "llama, ranks and alphas that differ": (
    llama,
    {
      "target_modules": LLAMA_LINEAR,
      "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*_proj": 5, "^model.layers.0.self_attn.v_proj": 3},
      "alpha_pattern": {"self_attn.k_proj": 32, "down_proj": 3},
    },
  ),
  "llama, rsLoRA": (llama, {"target_modules": LLAMA_LINEAR, "r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
  "llama, DoRA": (llama, {"target_modules": LLAMA_LINEAR, "r": 4, "use_dora": True}),
  "llama, DoRA with an embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "use_dora": True}),
  "gpt2, DoRA": (gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 4, "use_dora": True, "fan_in_fan_out": True}),
  "scanned, DoRA": (scanned_llama, {"target_modules": ["q_proj", "up_proj"], "r": 4, "use_dora": True}),
  "conv_net, DoRA": (conv_net, {"target_modules": ["cube", "plane", "line"], "r": 3, "use_dora": True}),
  "llama, gaussian": (llama, {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}),
  "llama, embedding and head": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 4}),
  "llama, head saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
  "llama, embedding saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
  "scanned": (scanned_llama, {"target_modules": LLAMA_LINEAR, "r": 4, "lora_alpha": 8}),
  "scanned, layers that differ": (
    scanned_llama,
    {
      "target_modules": LLAMA_LINEAR,
      "rank_pattern": {r"layers\.1\..*": 2},
      "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 3},
      "modules_to_save": ["input_layernorm"],
    },
  ),
  "scanned, one layer": (scanned_llama, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
  "biases of adapted": (biased_llama, {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
  "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4, "lora_alpha": 8, "fan_in_fan_out": True}),
  "gpt2, an embedding": (gpt2, {"target_modules": ["wpe", "c_attn"], "r": 4, "fan_in_fan_out": True}),
  "gpt2, the tied embedding": (
    gpt2,
    {
      "target_modules": ["wte", "lm_head", "c_attn"],
      "r": 4,
      "lora_alpha": 12,
      "ensure_weight_tying": True,
      "fan_in_fan_out": True,
    },
  ),
  "gpt2, the tied embedding saved": (
    gpt2,
    {
      "target_modules": ["c_attn"],
      "modules_to_save": ["wte", "lm_head"],
      "ensure_weight_tying": True,
      "fan_in_fan_out": True,
    },
  ),
  "gpt2, all biases": (gpt2, {"target_modules": ["attn.c_proj"], "bias": "all", "fan_in_fan_out": True}),
  "gpt2, Conv1D saved": (
    gpt2,
    {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj", "ln_f"], "fan_in_fan_out": True},
  ),
  "bert": (bert, {"target_modules": ["query", "value", "dense"], "r": 4, "lora_alpha": 2}),
  "bert, classifier saved": (
    bert,
    {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS", "bias": "lora_only"},
  ),
  "conv_net": (conv_net, {"target_modules": ["cube", "plane", "line", "pre_head"], "r": 3, "lora_alpha": 5}),
  "conv_net, saved": (conv_net, {"target_modules": ["plane"], "modules_to_save": ["cube", "line", "head"], "r": 3}),
}


@pytest.mark.parametrize("case", FROM_PEFT)
def test_what_peft_trained_does_the_same_here(case, tmp_path):
  build, config = FROM_PEFT[case]
  pair = build()
  model = trained(pair, **config)
  model.save_pretrained(tmp_path)
  tree = pair.load(tmp_path)
  assert_same(pair.apply(tree), pair.logits(model))
  assert_differ(pair.apply(tree), pair.apply(pair.params))
  jax.tree.map(np.testing.assert_array_equal, jaxlora.strip(tree), pair.params)
  if case == build.__name__:
    assert_same(pair.factored(tree), pair.logits(model))

  # And back again, into the real PEFT.
  pair.save(tmp_path / "again", tree)
  assert_same(pair.logits(from_pretrained(pair, tmp_path / "again")), pair.logits(model))


def from_pretrained(pair, folder):
  """The real PEFT's model; that the adapter is there in whole is asserted, as PEFT itself would only warn."""
  model = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch_model), folder)
  written = set(load_file(folder / "adapter_model.safetensors"))
  held = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
  assert written <= held
  assert all(name.endswith(".bias") for name in held - written)  # the base's, which nobody trained
  return model


def adapt(pair, **fields):
  """An adapted tree with other than zero factors, as training leaves them."""
  probe = lambda p: pair.twin.apply({"params": p}, jnp.asarray(pair.inputs))
  tree = jaxlora.adapt(pair.params, jaxlora.LoraConfig(**{"rank": 3, **fields}), KEY, probe=probe)
  frozen, trainable = jaxlora.split(tree)
  random = np.random.default_rng(1)
  moved = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + random.normal(0, 0.2, x.shape).astype(x.dtype)), trainable)
  return jaxlora.join(frozen, moved)


TO_PEFT = {
  "llama": (llama, {"rank": 4, "alpha": 6}),
  "llama, one layer": (llama, {"targets": r"layers_1/.*_proj/kernel"}),
  "gpt2, one of two alike": (gpt2, {"targets": r".*/attn/c_proj/kernel"}),
  "llama, ranks, alphas, scalings": (
    llama,
    {
      "alpha": 4,
      "overrides": {
        ".*q_proj.*": {"rank": 2},
        ".*layers_1/mlp.*": {"rank": 5, "scaling": "rslora", "alpha": 2.5},
        ".*layers_0/mlp/up.*": {"alpha": 7},
      },
    },
  ),
  "llama, DoRA": (llama, {"variant": "dora"}),
  "llama, LoHa": (llama, {"variant": "loha", "rank": 2}),
  "llama, VeRA": (llama, {"variant": "vera"}),
  "llama, PiSSA": (llama, {"init": "pissa"}),
  "conv_net, DoRA": (conv_net, {"variant": "dora", "targets": ["cube", "plane", "conv_line"]}),
  "llama, rsLoRA": (llama, {"scaling": "rslora", "overrides": {".*o_proj.*": {"rank": 2}}}),
  "llama, head and norms": (llama, {"targets": ["q_proj"], "train": ["lm_head", "norm", "layers_1/input_layernorm"]}),
  "llama, kernels with heads whole": (biased_llama, {"targets": ["up_proj"], "train": ["layers_0/self_attn"]}),
  "llama, embedding": (llama, {"targets": ["embed_tokens", "o_proj", "lm_head"]}),
  "llama, embedding whole": (llama, {"targets": ["o_proj"], "train": ["embed_tokens"]}),
  "scanned": (scanned_llama, {"alpha": 5, "train": ["layers/input_layernorm", "norm"]}),
  "biases of adapted": (biased_llama, {"targets": ["q_proj", "k_proj"], "train": r".*_1/.*q_proj/bias"}),
  "gpt2": (gpt2, {"alpha": 9}),
  "gpt2, an embedding": (gpt2, {"targets": ["wpe", "c_fc"], "train": ["ln_f"]}),
  "gpt2, the tied embedding": (gpt2, {"targets": ["wte", "c_fc"], "alpha": 6}),
  "gpt2, the tied embedding whole": (gpt2, {"targets": ["c_fc"], "train": ["wte"]}),
  "gpt2, all biases": (gpt2, {"targets": ["c_attn"], "train": r".*(ln_1|c_attn)/bias"}),
  "gpt2, Conv1D whole": (gpt2, {"targets": ["c_attn"], "train": ["h_0/attn/c_proj", "h_1/mlp/c_fc/kernel"]}),
  "bert": (bert, {"train": ["classifier"], "alpha": 1.5}),
  "conv_net": (conv_net, {"targets": ["cube", "plane", "conv_line", "pre_head"]}),
  # A module to save whose name ends another's: PEFT saves both.
  "conv_net, whole": (conv_net, {"targets": ["plane"], "train": ["cube/kernel", "conv_line", "head"]}),
}


@pytest.mark.parametrize("case", TO_PEFT)
def test_what_was_trained_here_does_the_same_in_peft(case, tmp_path):
  build, fields = TO_PEFT[case]
  pair = build()
  tree = adapt(pair, **fields)
  pair.save(tmp_path, tree)
  model = from_pretrained(pair, tmp_path)
  assert_same(pair.logits(model), pair.apply(tree))
  assert_differ(pair.logits(model), pair.logits(pair.torch_model))
  again = pair.load(tmp_path)
  assert_same(pair.apply(again), pair.apply(tree))
  assert_readable_by_vllm(tmp_path)


def assert_readable_by_vllm(folder):
  """What vLLM's reader asks of `adapter_config.json`: r, lora_alpha, target_modules, and no string for the start."""
  config = json.loads((folder / "adapter_config.json").read_text())
  assert isinstance(config["r"], int)
  assert isinstance(config["lora_alpha"], (int, float))
  assert config["target_modules"]
  assert config["init_lora_weights"] is True
  names = list(load_file(folder / "adapter_model.safetensors"))
  assert all(name.startswith("base_model.model.") for name in names)
  assert config["use_dora"] == any(name.endswith("lora_magnitude_vector") for name in names)


# ----------------------------------------------------------------------------------------------------------------------
# What PEFT writes that is another function, and what it writes beside the factors.


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base weights"),
    ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' changes the base weights"),
    ({"lora_bias": True}, "lora_bias: a bias in lora_B"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: layers that share their base"),
  ],
  ids=str,
)
def test_other_methods_are_refused(config, message, tmp_path):
  pair = biased_llama()
  model = trained(pair, steps=1, target_modules=["q_proj"], **config)
  model.save_pretrained(tmp_path)
  with pytest.raises(jaxlora.peft.PeftError, match=message):
    pair.load(tmp_path)


def test_a_grouped_convolution_is_refused(tmp_path):
  net = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2))
  model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], r=2))
  model.save_pretrained(tmp_path)
  with pytest.raises(jaxlora.peft.PeftError, match=r"lora_A has shape \(2, 4, 3, 3\).*grouped convolution"):
    jaxlora.peft.load(tmp_path, {"conv": {"kernel": jnp.ones((3, 3, 2, 6))}}, names={"conv": "0"})


@pytest.mark.parametrize(
  "config",
  [
    {"lora_alpha": -8},
    {"alpha_pattern": {"q_proj": 0}},
    {"alpha_pattern": {r"model\.layers\.(?!0\.)\d+\.self_attn\.q_proj": 3}},
    {"alpha_pattern": {r".*?q_proj": 3}},
    {"alpha_pattern": {r"layers\.(0|1)+\.self_attn\.q_proj": 3}},
    {"alpha_pattern": {r"(?<!self_attn\.)\w_proj": 3, r"layers\.[^0]\.\b.*": 5}},
    {"use_rslora": None},
    {"init_lora_weights": None},
    {"init_lora_weights": "Gaussian"},
    {"use_dora": None, "lora_bias": None, "modules_to_save": None, "layer_replication": []},
  ],
  ids=str,
)
def test_fields_that_peft_loads(config, tmp_path):
  pair = llama()
  trained(pair, target_modules=["q_proj", "v_proj"], r=4).save_pretrained(tmp_path)
  path = tmp_path / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | config))
  assert_same(pair.apply(pair.load(tmp_path)), pair.logits(from_pretrained(pair, tmp_path)))


def test_weights_that_peft_subtracts(tmp_path):
  """`add_weighted_adapter` with negative weights, and folders of several adapters."""
  pair = llama()
  model = trained(pair, target_modules=["q_proj"], r=4, lora_alpha=8)
  model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False))
  model.add_weighted_adapter(["default", "other"], [1.0, -0.5], "less", combination_type="cat")
  model.save_pretrained(tmp_path)
  for name in ("default", "other", "less"):
    model.set_adapter(name)
    assert_same(pair.apply(pair.load(tmp_path, adapter_name=name)), pair.logits(model))
  state = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if "lora_" in key}
  safetensors_torch.save_file(state, tmp_path / "adapter_model.safetensors")
  model.set_adapter("default")
  assert_same(pair.apply(pair.load(tmp_path, adapter_name="default")), pair.logits(model))


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("fields", [{}, {"train": ["classifier"]}, {"targets": ".*(query|classifier)/kernel"}], ids=str)
def test_heads_of_classifiers(fields, task_type, tmp_path):
  """peft#2027, #577: PEFT takes the head from the file for some tasks, trained or not, and wants it whole."""
  pair = bert()
  tree = adapt(pair, **{"targets": ".*query/kernel", **fields})
  if fields.get("targets") and task_type in ("SEQ_CLS", "TOKEN_CLS"):
    with pytest.raises(jaxlora.peft.PeftError, match=r"peft, adapted-head: .*found classifier: adapted"):
      pair.save(tmp_path, tree, task_type=task_type)
    pair.save(tmp_path, tree)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": task_type}))
    assert [finding.rule.name for finding in jaxlora.peft.check(tmp_path, "peft")] == ["adapted-head"]
    with pytest.raises((KeyError, TypeError)):
      from_pretrained(pair, tmp_path)
    return
  pair.save(tmp_path, tree, task_type=task_type)
  assert not jaxlora.peft.check(tmp_path, "peft")
  expected = pair.apply(tree)
  assert_same(pair.logits(from_pretrained(pair, tmp_path).base_model), expected)
  assert_same(pair.apply(pair.load(tmp_path)), expected)


def test_the_head_of_question_answering(tmp_path):
  model = transformers.BertForQuestionAnswering(bert().torch_model.config)
  leaves = {
    f"{name.removesuffix('.weight')}.{'kernel' if tensor.ndim == 2 else 'bias'}".replace(".", "/"): tensor.numpy().T
    for name, tensor in model.state_dict().items()
    if "query.weight" in name or "qa_outputs" in name
  }
  leaves["qa_outputs/bias"] = leaves.pop("qa_outputs/bias/bias")
  tree = jaxlora.adapt(leaves, jaxlora.LoraConfig(rank=2, targets=".*query/kernel"), KEY)
  jaxlora.peft.save(tmp_path, tree, task_type="QUESTION_ANS")
  assert not jaxlora.peft.check(tmp_path, "peft")
  loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
  head = loaded.base_model.model.qa_outputs.modules_to_save["default"]
  np.testing.assert_array_equal(head.weight.detach().numpy().T, leaves["qa_outputs/kernel"])
  (tmp_path / "adapter_model.safetensors").rename(tmp_path / "all")
  held = {key: value for key, value in load_file(tmp_path / "all").items() if "qa_outputs" not in key}
  safetensors_torch.save_file({k: torch.from_numpy(v) for k, v in held.items()}, tmp_path / "adapter_model.safetensors")
  assert [finding.rule.name for finding in jaxlora.peft.check(tmp_path, "peft")] == ["head"]
  with pytest.raises(KeyError):
    peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)


def test_what_check_says_of_peft_is_what_peft_does(tmp_path):
  pair = bert()
  pair.save(tmp_path, adapt(pair, targets=".*query/kernel"))
  path = tmp_path / "adapter_config.json"
  config = json.loads(path.read_text())
  for fields in (
    {"task_type": "SEQ_CLS"},
    {"task_type": "CLS"},
    {"rank_pattern": None},
    {"modules_to_save": ["dense"]},
  ):
    path.write_text(json.dumps(config | fields))
    assert len(jaxlora.peft.check(tmp_path, "peft")) == 1
    with pytest.raises((KeyError, ValueError, AttributeError)):
      from_pretrained(pair, tmp_path)


def test_remedies_of_what_is_refused(tmp_path):
  """What messages advise to do in PEFT, done in PEFT."""
  pair = llama()
  model = trained(pair, target_modules=["q_proj"], r=4)
  model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
  with pytest.raises(
    jaxlora.peft.PeftError, match=r"adapter_model.bin, a pickle.*Save it again with PEFT's save_pretr"
  ):
    pair.load(tmp_path / "pickle")
  again = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch_model), tmp_path / "pickle")
  again.save_pretrained(tmp_path / "safe")
  assert_same(pair.apply(pair.load(tmp_path / "safe")), pair.logits(model))

  model = peft.get_peft_model(
    copy.deepcopy(pair.torch_model), peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="pissa")
  )
  model.peft_config["default"].init_lora_weights = True
  model.save_pretrained(tmp_path / "start")
  model.peft_config["default"].init_lora_weights = "pissa"
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.add_(0.1 * torch.randn_like(parameter))
  expected = pair.logits(model)
  model.save_pretrained(tmp_path / "pissa")
  with pytest.raises(
    jaxlora.peft.PeftError, match=r"save_pretrained\(folder, path_initial_model_for_weight_conversion"
  ):
    pair.load(tmp_path / "pissa")
  model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
  assert_same(pair.apply(pair.load(tmp_path / "plain")), expected)

  model = trained(biased_llama(), target_modules=["q_proj"], lora_bias=True)
  model.save_pretrained(tmp_path / "bias")
  with pytest.raises(jaxlora.peft.PeftError, match=r"lora_bias: .*merge it in PEFT \(merge_and_unload\)"):
    biased_llama().load(tmp_path / "bias")
  expected = biased_llama().logits(model)
  merged = dataclasses.replace(biased_llama(), torch_model=model.merge_and_unload())
  assert_same(merged.apply(merged.params), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[1, 5], {"embed_tokens": [3, 0]}], ids=str)
def test_trainable_tokens(indices, tied, tmp_path):
  """PEFT's light way to train added tokens; of a tied model the head takes the same rows."""
  pair = gpt2() if tied else llama()
  if tied and isinstance(indices, dict):
    indices = {"wte": indices["embed_tokens"]}
  targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if tied else {"target_modules": ["q_proj"]}
  model = trained(pair, r=4, trainable_token_indices=indices, **targets)
  model.save_pretrained(tmp_path)
  tree = pair.load(tmp_path)
  assert_same(pair.apply(tree), pair.logits(model))
  state = {
    key: value.contiguous().clone() for key, value in model.state_dict().items() if "lora" in key or "token" in key
  }
  safetensors_torch.save_file(state, tmp_path / "adapter_model.safetensors")
  if not tied:
    assert_same(pair.apply(pair.load(tmp_path)), pair.logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_were_trained_here_go_to_peft(tied, tmp_path):
  """Rows of an embedding, and of a tied head with it, or of a head of its own beside it."""
  pair = gpt2() if tied else llama()
  table, kernels = ("wte/embedding", "c_attn") if tied else ("embed_tokens/embedding|.*lm_head/kernel", "q_proj")
  tree = adapt(pair, targets=[kernels], tokens={f".*{table}": [5, 0, 3]})
  pair.save(tmp_path, tree)
  held = load_file(tmp_path / "adapter_model.safetensors")
  assert [x.shape[0] for key, x in held.items() if "trainable_tokens_delta" in key] == [3] * (1 if tied else 2)
  model = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch_model), tmp_path)
  assert_same(pair.apply(tree), pair.logits(model))
  assert_same(pair.apply(pair.load(tmp_path)), pair.logits(model))


@pytest.mark.parametrize(
  "config", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [32]}]
)
def test_tokens_that_were_added(config, tmp_path):
  pair, more = llama(), copy.copy(llama())
  more.torch_model = copy.deepcopy(pair.torch_model)
  more.torch_model.resize_token_embeddings(twins.VOCABULARY + 3)
  config = {key: [twins.VOCABULARY] if "indices" in key else value for key, value in config.items()}
  model = trained(more, target_modules=["q_proj"], r=4, **config)
  model.save_pretrained(tmp_path, save_embedding_layers=False)
  with pytest.raises(jaxlora.peft.PeftError, match="Tokens were added: resize the base to the adapter's vocabulary"):
    pair.load(tmp_path)
  tree = pair.load(tmp_path, jaxlora.peft.resized(pair.params, tmp_path))
  merged = model.merge_and_unload()
  found = np.asarray(jaxlora.merge(tree)["embed_tokens"]["embedding"])
  expected = merged.model.embed_tokens.weight.detach().numpy()
  np.testing.assert_allclose(found[: twins.VOCABULARY + 1], expected[: len(found)][: twins.VOCABULARY + 1], rtol=1e-6)


def test_half_precision_is_kept(tmp_path):
  pair = llama()
  model = trained(pair, target_modules=["q_proj"]).to(torch.bfloat16)
  model.save_pretrained(tmp_path)
  tree = pair.load(tmp_path)
  weight = tree["layers_0"]["self_attn"]["q_proj"]["kernel"]
  assert weight.a.dtype == jnp.bfloat16
  a = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight
  np.testing.assert_array_equal(np.asarray(weight.a, "float32"), a.float().detach().numpy())
  pair.save(tmp_path / "again", tree)
  again = load_file(tmp_path / "again" / "adapter_model.safetensors")
  assert {str(tensor.dtype) for tensor in again.values()} == {"bfloat16"}


def test_an_embedding_that_was_resized_comes_whole(tmp_path):
  pair = llama()
  model = trained(pair, target_modules=["q_proj"])
  with torch.no_grad():
    model.base_model.model.model.embed_tokens.weight += 1
  model.save_pretrained(tmp_path, save_embedding_layers=True)
  tree = pair.load(tmp_path)
  assert isinstance(tree["embed_tokens"]["embedding"], jaxlora.FullWeight)
  assert isinstance(tree["lm_head"]["kernel"], jax.Array)  # saved, too, and as it was
  assert_same(pair.apply(tree), pair.logits(model))


def test_an_adapter_of_another_model_is_refused(tmp_path):
  trained(llama(), steps=1, target_modules=["q_proj", "down_proj"]).save_pretrained(tmp_path)
  with pytest.raises(jaxlora.peft.PeftError, match="4 problem") as caught:
    gpt2().load(tmp_path)
  assert "model.layers.1.mlp.down_proj.weight: no leaf of the tree is called so. Nearest: h_" in str(caught.value)


def test_an_adapted_embedding_that_is_the_head_too_is_refused_where_the_probe_tells(tmp_path):
  pair = gpt2()
  trained(pair, steps=1, target_modules=["wte"]).save_pretrained(tmp_path)
  with pytest.raises(jaxlora.peft.PeftError, match=r"wte/embedding .*: PEFT adapts the look-up alone"):
    pair.load(tmp_path, probe=lambda p: pair.twin.apply({"params": p}, jnp.asarray(pair.inputs)))


def test_the_public_flax_gpt2_whose_kernels_are_the_other_way_round(tmp_path):
  pair = gpt2()
  flax = transformers.FlaxGPT2LMHeadModel(pair.torch_model.config, _do_init=False)
  state = pair.torch_model.state_dict()

  def leaf(path, _):
    *module, kind = (key.key for key in path)
    array = state[f"{'.'.join(module)}.{'bias' if kind == 'bias' else 'weight'}"].numpy()
    return jnp.asarray(array.T if kind == "kernel" else array)

  params = jax.tree_util.tree_map_with_path(leaf, flax.params_shape_tree)
  model = trained(pair, target_modules=["c_attn", "c_proj", "c_fc"], r=4, fan_in_fan_out=True)
  model.save_pretrained(tmp_path / "adapter")
  apply = jax.jit(lambda p: flax(pair.inputs, params=p).logits)
  told = jaxlora.peft.load(tmp_path / "adapter", params)  # by biases; the square c_proj by the other one
  tree = jaxlora.peft.load(tmp_path / "adapter", params, probe=apply)
  for loaded in (told, tree):
    assert loaded["transformer"]["h"]["0"]["attn"]["c_proj"]["kernel"].roles == "oi"
  assert_same(np.asarray(apply(jaxlora.merge(told))), pair.logits(model))
  assert_same(np.asarray(apply(jaxlora.merge(tree))), pair.logits(model))
  jaxlora.peft.save(tmp_path / "again", tree)
  assert_same(pair.logits(from_pretrained(pair, tmp_path / "again")), pair.logits(model))


def test_squares_on_a_tree_that_stores_weights_as_torch_does(tmp_path):
  """alpaca-lora's q_proj and v_proj, of a Llama without biases: the names alone tell (out, in)."""
  config = transformers.LlamaConfig(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=False,
  )  # fmt: skip
  torch_model = transformers.LlamaForCausalLM(config).eval()
  params: dict = {}
  for name, tensor in torch_model.state_dict().items():
    node = params
    for part in name.split(".")[:-1]:
      node = node.setdefault(part, {})
    node[name.split(".")[-1]] = jnp.asarray(tensor.numpy())
  model = peft.get_peft_model(torch_model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
  with torch.no_grad():
    for name, tensor in model.named_parameters():
      if "lora_" in name:
        tensor.normal_(0, 0.3)
  model.save_pretrained(tmp_path / "a")
  tree = jaxlora.peft.load(tmp_path / "a", params)
  merged = {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}
  for layer in "01":
    for projection in ("q_proj", "v_proj"):
      found = jaxlora.merge(tree)["model"]["layers"][layer]["self_attn"][projection]["weight"]
      np.testing.assert_allclose(found, merged[f"model.layers.{layer}.self_attn.{projection}.weight"], atol=1e-5)


def test_an_encoders_embedding_that_is_the_head_too(tmp_path):
  """BERT's, whose head is called otherwise: PEFT adapts the look-ups, and the merged model needs a head of its own."""
  config = transformers.BertConfig(vocab_size=37, hidden_size=16, intermediate_size=8, num_hidden_layers=1)
  config.num_attention_heads, config.initializer_range = 2, 0.2
  torch.manual_seed(0)
  base, ids = transformers.BertForMaskedLM(config).eval(), torch.arange(6).reshape(2, 3)
  base.save_pretrained(tmp_path / "base")
  model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["word_embeddings", "query"], r=2))
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora" in name:
        parameter.normal_(std=0.3)
  model.eval().save_pretrained(tmp_path / "adapter")
  command = ["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]
  assert _cli.main(command) == 1  # one tensor cannot hold it
  assert _cli.main([*command, "--untie"]) == 0
  again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
  with torch.no_grad():
    assert_same(again(ids).logits.numpy(), model(input_ids=ids).logits.numpy())


@pytest.mark.parametrize("train", [None, ["classifier"]], ids=str)
def test_a_head_of_several_layers(train, tmp_path):
  """RoBERTa's classifier: PEFT takes all of it from the file."""
  config = transformers.RobertaConfig(vocab_size=37, hidden_size=16, intermediate_size=8, num_hidden_layers=1)
  config.num_attention_heads, config.initializer_range = 2, 0.2
  torch.manual_seed(0)
  base, ids = transformers.RobertaForSequenceClassification(config).eval(), torch.arange(3, 9).reshape(2, 3)
  leaves = {}
  for name, tensor in base.state_dict().items():
    module, _, parameter = name.rpartition(".")
    linear = isinstance(base.get_submodule(module), torch.nn.Linear)
    leaf = "kernel" if linear and parameter == "weight" else {"weight": "scale"}.get(parameter, parameter)
    leaves[f"{module}.{leaf}".replace(".", "/")] = jnp.asarray(tensor.numpy().T if leaf == "kernel" else tensor.numpy())
  tree = jaxlora.adapt(leaves, jaxlora.LoraConfig(rank=2, targets=".*query/kernel", train=train), KEY)
  frozen, trainable = jaxlora.split(tree)
  random = np.random.default_rng(1)
  tree = jaxlora.join(frozen, jax.tree.map(lambda x: x + random.normal(0, 0.1, x.shape).astype(x.dtype), trainable))
  jaxlora.peft.save(tmp_path, tree, task_type="SEQ_CLS")
  model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
  found = {path: np.asarray(leaf) for path, leaf in jaxlora.merge(tree).items()}
  with torch.no_grad():
    for name, parameter in base.named_parameters():
      path = name.replace(".", "/")
      kernel = f"{path.removesuffix('/weight')}/kernel"
      value = (
        found[kernel].T if kernel in found else found.get(path, found.get(f"{path.removesuffix('/weight')}/scale"))
      )
      parameter.copy_(torch.from_numpy(np.array(value)))
    assert_same(model(input_ids=ids).logits.numpy(), base(ids).logits.numpy())


class Experts(torch.nn.Module):
  """All experts in one parameter for each of their two layers, as transformers has them."""

  def __init__(self, inputs_first):
    super().__init__()
    sized = lambda ins, outs: torch.randn((3, ins, outs) if inputs_first else (3, outs, ins))
    self.gate_up_proj, self.down_proj = (torch.nn.Parameter(sized(*size)) for size in ((4, 10), (5, 4)))
    self.is_transposed = inputs_first  # read by PEFT

  def forward(self, x):
    up, down = (w if self.is_transposed else w.mT for w in (self.gate_up_proj, self.down_proj))
    gate, h = torch.einsum("td,edf->etf", x, up).chunk(2, -1)
    return torch.einsum("etf,efd->td", torch.nn.functional.silu(gate) * h, down)


@pytest.mark.parametrize("inputs_first", [True, False])
def test_experts_in_one_parameter_go_both_ways_are_merged_and_extracted(inputs_first, tmp_path):
  torch.manual_seed(0)
  model = torch.nn.Module()
  model.experts = Experts(inputs_first)
  model.forward = lambda x: model.experts(x)
  fresh, x, roles = copy.deepcopy(model.experts), torch.randn(6, 4), {".*": "sio" if inputs_first else "soi"}
  params = {"experts": {name: jnp.asarray(w.detach().numpy().copy()) for name, w in fresh.named_parameters()}}
  config = peft.LoraConfig(
    r=2,
    lora_alpha=4,
    target_modules=[],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    init_lora_weights=False,
  )
  adapted = peft.get_peft_model(model, config)
  with torch.no_grad():
    y = adapted(x).numpy()
  adapted.save_pretrained(tmp_path / "peft")
  tree = jaxlora.peft.load(tmp_path / "peft", params, axes=roles)
  tuned = {name: w.detach().numpy() for name, w in adapted.merge_and_unload().experts.named_parameters()}
  merged = jaxlora.merge(tree)["experts"]
  for name, w in tuned.items():  # an update in each expert of each parameter
    np.testing.assert_allclose(merged[name], w, atol=1e-6)
    assert (np.abs(w - params["experts"][name]).max((1, 2)) > 0.01).all()
  config = jaxlora.LoraConfig(rank=2, targets=".*", axes=roles)
  found = jaxlora.svd.extract(params, {"experts": jax.tree.map(jnp.asarray, tuned)}, rank=2, config=config)
  for name, way in (("written", tree), ("extracted", found)):
    jaxlora.peft.save(tmp_path / name, way)
    again = torch.nn.Module()
    again.experts = copy.deepcopy(fresh)
    again.forward = lambda x, again=again: again.experts(x)
    with torch.no_grad():
      back = peft.PeftModel.from_pretrained(again, tmp_path / name)(x).numpy()
    np.testing.assert_allclose(back, y, atol=1e-4 * np.abs(y).max())
