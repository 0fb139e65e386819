"""Base weights between models' files and Flax trees.

    from jaxlora import hub

    params = hub.load("SmolLM2-135M", like)            # safetensors, one file, several with an index, or a folder
    params = hub.load("model.gguf", like)              # llama.cpp's files, in floats
    params = hub.load("model.gguf", like, codes=".*")  # the same, a base of the file's codes
    hub.save("out", params, beside="SmolLM2-135M")     # safetensors, with the configuration and the tokenizer

    params = hub.load("gemma-3-1b", like, **hub.preset("gemma", like))    # the Gemma package's tree; or "tunix"

    hub.save_gguf_adapter("adapter.gguf", tree, base="model.gguf")    # for llama.cpp; load_gguf_adapter is the way back

`like` is a tree of arrays or of shapes: Linen's parameters (`jax.eval_shape(model.init, ...)`), an NNX module
(`nnx.eval_shape`). Names and layouts are those of `jaxlora.peft`.
"""

from jaxlora.hub._gguf_lora import load_gguf_adapter, save_gguf_adapter
from jaxlora.hub._load import load
from jaxlora.hub._presets import preset
from jaxlora.hub._records import HubError
from jaxlora.hub._save import save

__all__ = ["HubError", "load", "load_gguf_adapter", "preset", "save", "save_gguf_adapter"]
