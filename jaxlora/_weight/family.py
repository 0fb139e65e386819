"""The library's own variants, by name."""

from jaxlora._weight.dora import DORA, DORA_EXACT
from jaxlora._weight.lora import LORA, LORA_FA
from jaxlora._weight.products import LOHA, LOKR
from jaxlora._weight.variant import Variant
from jaxlora._weight.vectors import ADALORA, VERA

FAMILY: dict[str, Variant] = {
  "lora": LORA,
  "lora_fa": LORA_FA,
  "dora": DORA,
  "dora_exact": DORA_EXACT,
  "vera": VERA,
  "adalora": ADALORA,
  "loha": LOHA,
  "lokr": LOKR,
}
