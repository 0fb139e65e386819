"""Adapters of mlx-lm, of diffusers and of kohya's scripts: read, and mlx-lm's written."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora import peft
from tests import helpers
from tests.peft.folders import assert_equal, normal

WIDTH = 4


def delta(leaf):
  return np.asarray(leaf.materialize() - leaf.base)


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# mlx-lm


def mlx_base():
  layers = {str(k): {"self_attn": {"q_proj": {"kernel": normal(WIDTH, 6)}}} for k in range(2)}
  model = {"layers": layers, "embed_tokens": {"embedding": normal(11, WIDTH)}}
  return {"model": model, "lm_head": {"kernel": normal(WIDTH, 11)}}


def write_mlx(folder, tensors, weights="adapters.safetensors", **config):
  save_file({key: np.asarray(tensor) for key, tensor in tensors.items()}, folder / weights)
  fields = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": 2.5, "dropout": 0.1}}
  (folder / "adapter_config.json").write_text(json.dumps(fields | config))


Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("weights", ["adapters.safetensors", "adapter_model.safetensors"])
def test_mlx_lms_folders_load(weights, tmp_path):
  a, b = normal(WIDTH, 3), normal(3, 6)
  table = {"model.embed_tokens.lora_a": normal(11, 3), "model.embed_tokens.lora_b": normal(3, WIDTH)}
  write_mlx(tmp_path, {f"{Q0}.lora_a": a, f"{Q0}.lora_b": b, **table}, weights)
  tree = peft.load(tmp_path, mlx_base())
  node = tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
  close(delta(node), 2.5 * a @ b)
  assert (node.rank, node.scale, node.dropout) == (3, 2.5, 0.1)
  close(delta(tree["model"]["embed_tokens"]["embedding"]), 2.5 * np.matmul(*table.values()))


def test_mlx_lms_experts_and_dora_load(tmp_path):
  a, b = normal(2, 3, WIDTH), normal(2, 6, 3)
  base = {"layers_0": {"mlp": {"experts": {"up_proj": {"kernel": normal(2, WIDTH, 6)}}}}}
  name = "model.layers.0.mlp.switch_mlp.up_proj"
  write_mlx(tmp_path, {f"{name}.lora_a": a, f"{name}.lora_b": b})
  found = peft.load(tmp_path, base)["layers_0"]["mlp"]["experts"]["up_proj"]["kernel"]
  close(delta(found), 2.5 * np.einsum("eri,eor->eio", a, b))
  assert found.roles == "sio"

  params = mlx_base()
  factors = {f"{Q0}.lora_a": normal(WIDTH, 3), f"{Q0}.lora_b": normal(3, 6), f"{Q0}.m": jnp.abs(normal(6))}
  write_mlx(tmp_path, factors, fine_tune_type="dora")
  tree = peft.load(tmp_path, params)
  weight = (
    params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    + 2.5 * factors[f"{Q0}.lora_a"] @ factors[f"{Q0}.lora_b"]
  )
  expected = weight / jnp.linalg.norm(weight, axis=0, keepdims=True) * factors[f"{Q0}.m"][None]
  close(tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"].materialize(), expected)


@pytest.mark.parametrize(
  "fields", [{}, {"overrides": {".*1/self_attn.*": {"rank": 2, "alpha": 5}}}, {"variant": "dora"}]
)
def test_what_is_written_for_mlx_lm_is_the_same_when_it_is_read(fields, tmp_path):
  targets = ".*" if "variant" not in fields else ".*q_proj/kernel"
  tree = helpers.adapted(mlx_base(), targets=targets, alpha=3, **fields)
  peft.save_mlx(tmp_path, tree)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert config["fine_tune_type"] == ("dora" if fields.get("variant") else "lora")
  assert config["lora_parameters"]["scale"] == 1.5
  assert "self_attn.q_proj" in config["lora_parameters"]["keys"]
  assert load_file(tmp_path / "adapters.safetensors")[f"{Q0}.lora_a"].shape == (WIDTH, 2)
  loaded = peft.load(tmp_path, jaxlora.strip(tree))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), jaxlora.merge(loaded), jaxlora.merge(tree)
  )
  if not fields:
    assert_equal(loaded, tree)


def test_what_mlx_lm_cannot_hold_is_refused(tmp_path):
  base = {
    "layers_0": {"experts": {"up": {"kernel": normal(2, WIDTH, 6)}}, "q": {"kernel": normal(WIDTH, 6)}},
    "conv": {"kernel": normal(3, 3, 2, 5)},
    "norm": {"scale": normal(WIDTH)},
  }
  tree = helpers.adapted(base, targets=".*kernel", axes={".*up/.*": "sio", "conv.*": "iiio"}, train=["norm"])
  with pytest.raises(peft.PeftError) as error:
    peft.save_mlx(tmp_path, tree)
  for message in ("trained whole", "this is a convolution", "experts, which mlx-lm stacks"):
    assert message in str(error.value)
  assert not list(tmp_path.iterdir())


def test_an_alpha_that_mlx_lm_leaves_aside_is_told(tmp_path):
  factors = {f"{Q0}.lora_a": normal(WIDTH, 3), f"{Q0}.lora_b": normal(3, 6)}
  write_mlx(tmp_path, factors, lora_parameters={"rank": 3, "alpha": 6, "scale": 10.0})
  with pytest.warns(peft.PeftWarning, match=r"alpha 6 is left aside.*the scale is 10.0.*write scale 10.0 \* 6 / 3"):
    tree = peft.load(tmp_path, mlx_base())
  assert tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"].scale == 10.0


@pytest.mark.parametrize(
  ("tensors", "config", "message"),
  [
    ({"a": 1}, {"lora_parameters": {"rank": 3, "alpha": 6}}, "scale: found None, expected a number"),
    ({"a": 1}, {"fine_tune_type": "full"}, "fine_tune_type: found 'full': a model's weights, and no adapter"),
    ({"a": None}, {}, "found lora_b; expected lora_a and lora_b"),
    ({"a": (3, WIDTH)}, {}, r"lora_a has shape \(3, 4\), lora_b \(3, 6\); expected \(in, rank\)"),
    ({"m": (6,)}, {}, "and m with DoRA alone"),
    ({"weight": (6,)}, {}, "q_proj.weight: unknown; expected lora_a and lora_b"),
  ],
)
def test_mlx_lms_folders_that_do_not_fit(tensors, config, message, tmp_path):
  held = {f"{Q0}.lora_a": normal(WIDTH, 3), f"{Q0}.lora_b": normal(3, 6)}
  for part, shape in tensors.items():
    key = f"{Q0}.lora_a" if part == "a" else f"{Q0}.{part}"
    if shape is None:
      del held[key]
    elif shape != 1:
      held[key] = normal(*shape)
  write_mlx(tmp_path, held, **config)
  with pytest.raises(peft.PeftError, match=message):
    peft.load(tmp_path, mlx_base())


def test_a_tied_embedding_is_one_module_of_mlx_lms(tmp_path):
  base = mlx_base()
  del base["lm_head"]
  tree = helpers.adapted(base, targets=".*")
  peft.save_mlx(tmp_path, tree)
  found = load_file(tmp_path / "adapters.safetensors")
  assert "model.embed_tokens.lora_a" in found
  assert not any("lm_head" in key for key in found)


# ----------------------------------------------------------------------------------------------------------------------
# diffusers and kohya's scripts, on the names of Flax' UNet.


def unet():
  attention = {
    "to_q": {"kernel": normal(WIDTH, 6)},
    "to_out_0": {"kernel": normal(6, WIDTH), "bias": normal(WIDTH)},
  }
  block = {"transformer_blocks_0": {"attn1": attention}, "proj_in": {"kernel": normal(1, 1, WIDTH, WIDTH)}}
  return {"down_blocks_0": {"attentions_1": block}, "time_embedding": {"linear_1": {"kernel": normal(WIDTH, 6)}}}


BLOCK = "down_blocks.0.attentions.1"
TO_Q, TO_OUT = f"{BLOCK}.transformer_blocks.0.attn1.to_q", f"{BLOCK}.transformer_blocks.0.attn1.to_out.0"
ATTN = TO_Q.removesuffix(".to_q")


def flat(name):
  return "lora_unet_" + name.replace(".", "_")


# By style: the keys of A and B of a module, and the key of its alpha.
STYLES = {
  "diffusers": lambda name: (f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight", None),
  "diffusers, before": lambda name: (f"unet.{name}.lora.down.weight", f"unet.{name}.lora.up.weight", None),
  "diffusers, with alpha": lambda name: (
    f"unet.{name}.lora.down.weight",
    f"unet.{name}.lora.up.weight",
    f"unet.{name}.alpha",
  ),
  "kohya": lambda name: (f"{flat(name)}.lora_down.weight", f"{flat(name)}.lora_up.weight", f"{flat(name)}.alpha"),
  "kohya, no alpha": lambda name: (f"{flat(name)}.lora_down.weight", f"{flat(name)}.lora_up.weight", None),
}


def attention_of(tree):
  return tree["down_blocks_0"]["attentions_1"]["transformer_blocks_0"]["attn1"]


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_loras_of_diffusion_models_load(style, as_file, tmp_path):
  tensors, expected = {}, {}
  for name, (ins, outs) in {TO_Q: (WIDTH, 6), TO_OUT: (6, WIDTH)}.items():
    a, b = normal(2, ins), normal(outs, 2)
    *keys, alpha = STYLES[style](name)
    tensors |= dict(zip(keys, (np.asarray(a), np.asarray(b)), strict=True))
    if alpha:
      tensors[alpha] = np.asarray(1.0, np.float32)
    expected[name] = (0.5 if alpha else 1.0) * (b @ a).T
  a, b = normal(2, WIDTH, 1, 1), normal(WIDTH, 2, 1, 1)
  keys = STYLES[style](f"{BLOCK}.proj_in")[:2]
  tensors |= dict(zip(keys, (np.asarray(a), np.asarray(b)), strict=True))
  file = tmp_path / ("pytorch_lora_weights.safetensors" if "diffusers" in style else "style.safetensors")
  save_file(tensors, file)
  tree = peft.load(file if as_file else tmp_path, unet())
  close(delta(attention_of(tree)["to_q"]["kernel"]), expected[TO_Q])
  close(delta(attention_of(tree)["to_out_0"]["kernel"]), expected[TO_OUT])
  found = delta(tree["down_blocks_0"]["attentions_1"]["proj_in"]["kernel"])
  close(found[0, 0], (b[:, :, 0, 0] @ a[:, :, 0, 0]).T)


def test_the_oldest_keys_of_diffusers(tmp_path):
  a, b, c, d = normal(2, WIDTH), normal(6, 2), normal(2, 6), normal(WIDTH, 2)
  halves = {"to_q_lora.down": a, "to_q_lora.up": b, "to_out_lora.down": c, "to_out_lora.up": d}
  tensors = {f"unet.{ATTN}.processor.{half}.weight": np.asarray(x) for half, x in halves.items()}
  save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
  tree = peft.load(tmp_path, unet())
  close(delta(attention_of(tree)["to_q"]["kernel"]), (b @ a).T)
  close(delta(attention_of(tree)["to_out_0"]["kernel"]), (d @ c).T)


SGM = {  # names of SDXL's LoRAs, and diffusers'
  "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
  "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
  "input_blocks_4_0_in_layers_2": "down_blocks.1.resnets.0.conv1",
  "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
  "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
  "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
  "middle_block_1_transformer_blocks_9_ff_net_2": "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
  "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
  "output_blocks_0_1_transformer_blocks_1_attn2_to_out_0": (
    "up_blocks.0.attentions.0.transformer_blocks.1.attn2.to_out.0"
  ),
  "output_blocks_5_1_proj_out": "up_blocks.1.attentions.2.proj_out",
  "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
  "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",  # of a block without attention
  "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
  "input_blocks_0_0": "conv_in",
  "time_embed_2": "time_embedding.linear_2",
  "label_emb_0_0": "add_embedding.linear_1",
  "out_2": "conv_out",
}


def test_sdxls_names_are_diffusers(tmp_path):
  tensors, base = {}, {}
  for k, (name, module) in enumerate(SGM.items()):
    tensors[f"lora_unet_{name}.lora_down.weight"] = np.full((1, 2), k + 1, np.float32)
    tensors[f"lora_unet_{name}.lora_up.weight"] = np.ones((3, 1), np.float32)
    node = base
    for part in re.sub(r"\.(\d+)", r"_\1", module).split("."):
      node = node.setdefault(part, {})
    node["kernel"] = jnp.zeros((2, 3))
  save_file(tensors, tmp_path / "xl.safetensors")
  merged = jaxlora.merge(peft.load(tmp_path / "xl.safetensors", base))
  for k, module in enumerate(SGM.values()):
    node = merged
    for part in re.sub(r"\.(\d+)", r"_\1", module).split("."):
      node = node[part]
    close(node["kernel"], np.full((2, 3), k + 1))


@pytest.mark.parametrize("key", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"])
@pytest.mark.parametrize("conv", [False, True])
def test_dora_of_diffusion_models(key, conv, tmp_path):
  name = f"{BLOCK}.proj_in" if conv else TO_Q
  a, b = (normal(2, WIDTH, 1, 1), normal(WIDTH, 2, 1, 1)) if conv else (normal(2, WIDTH), normal(6, 2))
  norms = jnp.abs(normal(len(b))) + 0.5
  shape = {"dora_scale": (-1, *(1 for _ in a.shape[1:]))}.get(key, (1, -1, 1, 1) if conv else (-1,))
  kohya = key == "dora_scale"
  stem, down, up = (flat(name), "lora_down", "lora_up") if kohya else (f"unet.{name}", "lora_A", "lora_B")
  tensors = {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b, f"{stem}.{key}": norms.reshape(shape)}
  save_file({k: np.asarray(x) for k, x in tensors.items()}, tmp_path / "x.safetensors")
  tree = peft.load(tmp_path / "x.safetensors", unet())["down_blocks_0"]["attentions_1"]
  node = tree["proj_in"]["kernel"] if conv else tree["transformer_blocks_0"]["attn1"]["to_q"]["kernel"]
  inputs_first = (node.base.reshape(WIDTH, -1), a.reshape(2, -1).T @ b.reshape(-1, 2).T)
  moved = np.asarray(inputs_first[0] + inputs_first[1])
  close(jaxlora.merge(node).reshape(WIDTH, -1), moved * np.asarray(norms) / np.linalg.norm(moved, axis=0))


def test_alphas_in_the_metadata(tmp_path):
  tensors = {f"unet.{TO_Q}.lora_A.weight": normal(2, WIDTH), f"unet.{TO_Q}.lora_B.weight": normal(6, 2)}
  tensors |= {f"unet.{TO_OUT}.lora_A.weight": normal(2, 6), f"unet.{TO_OUT}.lora_B.weight": normal(WIDTH, 2)}
  options = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"to_out.0": 1}, "text_encoder.lora_alpha": 3}
  metadata = {"lora_adapter_metadata": json.dumps(options)}
  save_file({key: np.asarray(x) for key, x in tensors.items()}, tmp_path / "x.safetensors", metadata)
  tree = peft.load(tmp_path, unet())
  assert (attention_of(tree)["to_q"]["kernel"].scale, attention_of(tree)["to_out_0"]["kernel"].scale) == (4.0, 0.5)


def test_one_component_of_several(tmp_path):
  tensors = {f"unet.{TO_Q}.lora_A.weight": normal(2, WIDTH), f"unet.{TO_Q}.lora_B.weight": normal(6, 2)}
  name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
  tensors |= {
    f"{name}.lora_linear_layer.down.weight": normal(2, 3),
    f"{name}.lora_linear_layer.up.weight": normal(5, 2),
  }
  save_file({key: np.asarray(x) for key, x in tensors.items()}, tmp_path / "x.safetensors")
  with pytest.raises(peft.PeftError, match=r"holds text_encoder, unet\. Say which: adapter_name='text_encoder'"):
    peft.load(tmp_path, unet())
  peft.load(tmp_path, unet(), adapter_name="unet")
  text = {"text_model": {"encoder": {"layers": {"0": {"self_attn": {"q_proj": {"kernel": normal(3, 5)}}}}}}}
  tree = peft.load(tmp_path, text, adapter_name="text_encoder")
  assert len(helpers.lora_weights(tree)) == 1
  with pytest.raises(peft.PeftError, match="found 'prior', the file holds text_encoder, unet"):
    peft.load(tmp_path, unet(), adapter_name="prior")


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    ({"lora_unet_x.hada_w1_a": (2, 2)}, "lora_unet_x.hada_w1_a: unknown; expected .*LoHa, LoKr and Tucker"),
    ({"lora_unet_x.lora_mid.weight": (2, 2)}, "unknown"),
    ({"lora_unet_x.lora_down.weight": (2, 4)}, r"x: found {'a': \(2, 4\)}, expected"),
    ({"lora_unet_x.lora_down.weight": (2, 4), "lora_unet_x.lora_up.weight": (4, 3)}, "x: found"),
    (
      {"lora_unet_x.lora_down.weight": (2, 3), "lora_unet_x.lora_up.weight": (4, 2), "lora_unet_x.dora_scale": (1, 3)},
      r"x: a magnitude of shape \(1, 3\), expected one number for each of 4 outputs",
    ),
    ({"lora_unet_y.lora_down.weight": (2, 4), "lora_unet_y.lora_up.weight": (4, 2)}, "y.weight: no leaf of the tree"),
  ],
)
def test_files_that_do_not_fit(tensors, message, tmp_path):
  save_file({key: np.asarray(normal(*shape)) for key, shape in tensors.items()}, tmp_path / "x.safetensors")
  with pytest.raises(peft.PeftError, match=message):
    peft.load(tmp_path, unet())


def test_a_flax_unet_is_saved_under_diffusers_names(tmp_path):
  tree = helpers.adapted(unet(), targets=".*kernel", axes={".*proj_in/kernel": "iiio"})
  peft.save(tmp_path, tree)
  names = {
    re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", key)
    for key in load_file(tmp_path / "adapter_model.safetensors")
  }
  assert names == {TO_Q, TO_OUT, f"{BLOCK}.proj_in", "time_embedding.linear_1"}
  assert_equal(peft.load(tmp_path, jaxlora.strip(tree)), tree)
