"""Names of the UNet in Stability's own code, which LoRAs of SDXL are called by, as diffusers has them. No files here.

    input_blocks_4_1_transformer_blocks_0_attn1_to_q -> down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q

Both have two layers in a block; diffusers numbers the blocks, and the layers in each, where Stability's code numbers
the layers of all blocks, with what leads to the next block among them.
"""

import re

_BLOCK = re.compile(r"(?P<side>input|output)_blocks_(?P<layer>\d+)_(?P<part>\d)_(?P<rest>.+)")

_MIDDLE = re.compile(r"middle_block_(?P<part>[012])_(?P<rest>.+)")

_IN_MIDDLE = ("resnets_0", "attentions_0", "resnets_1")

_PARTS = ("resnets", "attentions")  # of a layer, by number

_LAYERS = 3  # of a block, with what leads to the next one, or in the other half, with one that takes the skip

# The inner names of residual blocks, and what is outside of all blocks.
_RESNET = {
  "in_layers_0": "norm1", "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_0": "norm2",
  "out_layers_3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip

_OUTSIDE = {
  "input_blocks_0_0": "conv_in", "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
  "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2", "out_0": "conv_norm_out",
  "out_2": "conv_out",
}  # fmt: skip


def of_diffusers(name: str) -> str:
  """A module's name with `_` for dots as diffusers has it; one that is none of Stability's stays."""
  if name in _OUTSIDE:
    return _OUTSIDE[name]
  if (middle := _MIDDLE.fullmatch(name)) is not None:
    return f"mid_block_{_IN_MIDDLE[int(middle['part'])]}_{_inner(middle['rest'])}"
  if (found := _BLOCK.fullmatch(name)) is None:
    return name
  part, rest = int(found["part"]), found["rest"]
  if found["side"] == "input":
    block, layer = divmod(int(found["layer"]) - 1, _LAYERS)
    between = "downsamplers_0_conv" if rest == "op" else None
    half = "down_blocks"
  else:
    block, layer = divmod(int(found["layer"]), _LAYERS)
    between = "upsamplers_0_conv" if rest == "conv" else None
    half = "up_blocks"
  if between is None and part >= len(_PARTS):
    return name
  return f"{half}_{block}_{between or f'{_PARTS[part]}_{layer}_{_inner(rest)}'}"


def _inner(rest: str) -> str:
  return _RESNET.get(rest, rest)
