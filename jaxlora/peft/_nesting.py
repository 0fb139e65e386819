"""The names of vision-language models: transformers has moved their parts, and files have both names."""

_LANGUAGE = ("language_model", "text_model")

# Parts that were beside the language model, and are beside it in `model` since transformers 4.52.
_BESIDE = (
  "visual", "vision_tower", "vision_model", "video_tower", "image_tower", "vqmodel", "multi_modal_projector",
  "image_newline", "vision_embed_tokens",
)  # fmt: skip


def unnested(parts: tuple[str, ...]) -> tuple[str, ...]:
  """The components of a name as the text model alone has it, and the parts beside it as they were.

  `language_model.model.layers` (files of the Hub) and `model.language_model.layers` (transformers since 4.52) are
  `model.layers`; `model.visual` is `visual`.

  Source: `_checkpoint_conversion_mapping` of the models in transformers 4.57.
  """
  for language in _LANGUAGE:
    if parts[:2] in ((language, "model"), ("model", language)):
      return ("model", *parts[2:])
    if parts[:2] == (language, "lm_head"):
      return parts[1:]
  return parts[1:] if parts[:1] == ("model",) and parts[1:2] and parts[1] in _BESIDE else parts
