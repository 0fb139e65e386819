"""All formats of quantised weights that are read."""

from jaxlora._files.bitsandbytes import BNB4, BNB8
from jaxlora._files.float4 import MXFP4, NVFP4
from jaxlora._files.format import Config, Format, Headers, Quantised, Read
from jaxlora._files.packed import AWQ, COMPRESSED, GPTQ
from jaxlora._files.scaled import FLOAT8, INT8

FORMATS: tuple[Format, ...] = (FLOAT8, INT8, BNB4, BNB8, GPTQ, AWQ, COMPRESSED, MXFP4, NVFP4)


def quantised_weights(tensors: Headers, config: Config, read: Read) -> dict[str, Quantised]:
  """The weights of a model that several tensors hold, by name.

  Args:
    tensors: of the model, by name: dtypes and shapes.
    config: the `quantization_config` of its config.json, or empty.
    read: the values of a tensor, by name; for small ones that describe others.

  Raises:
    FormatError: where tensors of a known format do not fit together.
  """
  return {weight.name: weight for form in FORMATS for weight in form.find(tensors, config, read)}
