"""Models of transformers whose modules are no leaves of Flax's: adapters of the real PEFT, both ways.

Needs torch, as `test_peft.py` does, and is run like it: `USE_TORCH=1 python -m pytest tests/peft/test_peft_names.py`.
"""

import copy
import os

import pytest

if os.environ.get("USE_TORCH") != "1":
  pytest.skip("needs torch, in a run of its own: USE_TORCH=1 python -m pytest tests/peft", allow_module_level=True)
torch = pytest.importorskip("torch", reason="the interchange is tested against torch: jaxlora[interchange]")
peft = pytest.importorskip("peft", reason="the interchange is tested against peft: jaxlora[interchange]")
transformers = pytest.importorskip("transformers", reason="the models are those of transformers: jaxlora[interchange]")

import jax  # noqa: E402
import numpy as np  # noqa: E402

import jaxlora  # noqa: E402
from jaxlora._base.paths import flatten  # noqa: E402
from jaxlora.peft import Joined, Split, load, save  # noqa: E402

torch.set_num_threads(1)
pytestmark = [pytest.mark.usefixtures("lenient"), pytest.mark.filterwarnings("default")]
WIDTH, HEADS, INNER, LAYERS = 16, 4, 24, 2
SMALL = {"vocab_size": 29, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 29, (3, 7)))


def phi3():
  """q, k, v and gate, up of their own in Flax; `qkv_proj` and `gate_up_proj` in torch."""
  config = transformers.Phi3Config(
    **SMALL, num_attention_heads=HEADS, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
  )
  names = {
    r"layer_(\d)/(query|key|value)": Joined(r"model.layers.\1.self_attn.qkv_proj", ("query", "key", "value")),
    r"layer_(\d)/(gate|up)": Joined(r"model.layers.\1.mlp.gate_up_proj", ("gate", "up")),
    r"layer_(\d)/down": r"model.layers.\1.mlp.down_proj",
  }

  def layer(state, k):
    qkv, gate_up = (state[f"model.layers.{k}.{n}.weight"].T for n in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    parts = np.split(qkv, [16, 24], axis=1) + np.split(gate_up, 2, axis=1)
    found = dict(zip(("query", "key", "value", "gate", "up"), parts, strict=True))
    return found | {"down": state[f"model.layers.{k}.mlp.down_proj.weight"].T}

  return transformers.Phi3ForCausalLM(config), layer, names, ["qkv_proj", "gate_up_proj", "down_proj"], {}


def gpt_neox():
  """Heads of q, k, v interleaved in torch's `query_key_value`: (heads, 3, width)."""
  config = transformers.GPTNeoXConfig(**SMALL, num_attention_heads=HEADS, max_position_embeddings=32)
  names = {
    r"layer_(\d)/[qkv]": Joined(r"gpt_neox.layers.\1.attention.query_key_value", ("q", "k", "v"), groups=HEADS),
    r"layer_(\d)/up": r"gpt_neox.layers.\1.mlp.dense_h_to_4h",
  }

  def layer(state, k):
    qkv = state[f"gpt_neox.layers.{k}.attention.query_key_value.weight"].reshape(HEADS, 3, -1, WIDTH)
    parts = {name: qkv[:, j].transpose(2, 0, 1) for j, name in enumerate("qkv")}
    return parts | {"up": state[f"gpt_neox.layers.{k}.mlp.dense_h_to_4h.weight"].T}

  return (
    transformers.GPTNeoXForCausalLM(config),
    layer,
    names,
    ["query_key_value", "dense_h_to_4h"],
    {".*/[qkv]/kernel": "ioo"},
  )


def gemma(axes):
  """The Flax Gemma: `kv_einsum` (2, heads, in, width) and `gating_einsum` (2, out, in)."""
  config = transformers.GemmaConfig(**SMALL, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=4)
  names = {
    r"layer_(\d)/q_einsum": r"model.layers.\1.self_attn.q_proj",
    r"layer_(\d)/kv_einsum": Split((r"model.layers.\1.self_attn.k_proj", r"model.layers.\1.self_attn.v_proj")),
    r"layer_(\d)/gating_einsum": Split((r"model.layers.\1.mlp.gate_proj", r"model.layers.\1.mlp.up_proj")),
  }

  def layer(state, k):
    weight = lambda name: state[f"model.layers.{k}.{name}_proj.weight"]
    heads = lambda name: weight(f"self_attn.{name}").reshape(-1, 4, WIDTH).transpose(0, 2, 1)
    return {
      "q_einsum": heads("q"),
      "kv_einsum": np.stack([heads("k"), heads("v")]),
      "gating_einsum": np.stack([weight("mlp.gate"), weight("mlp.up")]),
    }

  targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
  return transformers.GemmaForCausalLM(config), layer, names, targets, axes | {".*q_einsum/w": "oio"}


MODELS = {
  "phi3": phi3,
  "gpt_neox": gpt_neox,
  "gemma, one adapter for k and v": lambda: gemma({".*kv_einsum/w": "ooio", ".*gating_einsum/w": "ooi"}),
  "gemma, one for each": lambda: gemma({".*kv_einsum/w": "soio", ".*gating_einsum/w": "soi"}),
}


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def case(request):
  torch.manual_seed(0)
  return request.param()


def tree_of(model, layer):
  state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
  kernel = lambda name: "w" if "einsum" in name else "kernel"
  return {
    f"layer_{k}": {name: {kernel(name): np.ascontiguousarray(w)} for name, w in layer(state, k).items()}
    for k in range(LAYERS)
  }


def trained(model, targets, **config):
  config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **config)
  adapted = peft.get_peft_model(copy.deepcopy(model), config)
  with torch.no_grad():
    for parameter in adapted.parameters():
      if parameter.requires_grad:
        parameter.add_(torch.randn(parameter.shape) * 0.1)
  return adapted.eval()


def logits(model):
  with torch.no_grad():
    return model.eval()(IDS).logits.numpy()


def assert_merges_to(tree, model, layer):
  expected = dict(flatten(tree_of(copy.deepcopy(model).merge_and_unload(), layer))[0])
  found = dict(flatten(jaxlora.merge(tree))[0])
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_what_peft_trained_is_the_same_in_flax_and_back(case, config, tmp_path):
  model, layer, names, targets, axes = case
  adapted = trained(model, targets, **config)
  adapted.save_pretrained(tmp_path)
  tree = load(tmp_path, tree_of(model, layer), names=names, axes=axes)
  assert_merges_to(tree, adapted, layer)
  assert np.abs(logits(adapted) - logits(model)).max() > 1e-3
  save(tmp_path / "again", tree, names=names)
  again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "again")
  np.testing.assert_allclose(logits(again), logits(adapted), rtol=1e-5, atol=1e-5)


def test_what_was_trained_in_flax_is_the_same_in_peft(case, tmp_path):
  model, layer, names, _, axes = case
  base = tree_of(model, layer)
  config = jaxlora.LoraConfig(rank=2, alpha=3, targets=".*", axes=axes or None)
  tree = jaxlora.adapt(base, config, jax.random.key(0))
  frozen, factors = jaxlora.split(tree)
  random = np.random.default_rng(1)
  tree = jaxlora.join(frozen, jax.tree.map(lambda x: x + random.normal(0, 0.1, x.shape).astype(x.dtype), factors))
  save(tmp_path, tree, names=names)
  assert_merges_to(tree, peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path), layer)


# ----------------------------------------------------------------------------------------------------------------------
# Experts in one parameter. Models of transformers 5 say `is_transposed`, by which PEFT knows which axis is the inputs'.


def gpt_oss(inner, transposed):
  config = transformers.GptOssConfig(
    **{**SMALL, "intermediate_size": inner}, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=4,
    num_local_experts=3, num_experts_per_tok=2, sliding_window=8,
  )  # fmt: skip
  torch.manual_seed(0)
  model = transformers.GptOssForCausalLM(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0, 0.2)
  for layer in model.model.layers:
    layer.mlp.experts.is_transposed = transposed
  return model


def experts_of(model):
  kernel = lambda tensor: {"kernel": tensor.detach().numpy()}
  layers = {
    str(k): {
      "self_attn": {"q_proj": kernel(layer.self_attn.q_proj.weight.T)},
      "mlp": {"experts": {n: kernel(getattr(layer.mlp.experts, n)) for n in ("gate_up_proj", "down_proj")}},
    }
    for k, layer in enumerate(model.model.layers)
  }
  return {"model": {"layers": layers}}


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("inner", [INNER, WIDTH], ids=["", "square"])
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["gate_up_proj"]], ids=["both", "one"])
def test_packed_experts_are_the_same_in_flax_and_back(parameters, inner, transposed, tmp_path):
  model = gpt_oss(inner, transposed)
  targets = [f"mlp.experts.{name}" for name in parameters]
  adapted = trained(model, ["q_proj"], target_parameters=targets, rank_pattern={"experts.down_proj": 2})
  adapted.save_pretrained(tmp_path)
  tree = load(tmp_path, experts_of(model))
  expected = dict(flatten(experts_of(copy.deepcopy(adapted).merge_and_unload()))[0])
  for path, value in flatten(jaxlora.merge(tree))[0]:
    np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)
  assert np.abs(logits(adapted) - logits(model)).max() > 1e-3
  save(tmp_path / "again", tree)
  again = peft.PeftModel.from_pretrained(gpt_oss(inner, transposed=True), tmp_path / "again")
  np.testing.assert_allclose(logits(again), logits(adapted), rtol=1e-5, atol=1e-5)
