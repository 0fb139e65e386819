"""Adapted leaves: roles of axes, variants, `LoraWeight` and `FullWeight`, and trees that hold them."""

from jaxlora._weight.dora import DORA, DORA_EXACT
from jaxlora._weight.lora import LORA, LORA_FA
from jaxlora._weight.products import LOHA, LOKR
from jaxlora._weight.variant import register_variant
from jaxlora._weight.vectors import ADALORA, VERA

for _name, _variant in (
  ("lora", LORA),
  ("lora_fa", LORA_FA),
  ("dora", DORA),
  ("dora_exact", DORA_EXACT),
  ("vera", VERA),
  ("adalora", ADALORA),
  ("loha", LOHA),
  ("lokr", LOKR),
):
  register_variant(_name, _variant)
