"""Adapted leaves: roles of axes, variants, `LoraWeight` and `FullWeight`, and trees that hold them."""

from jaxlora._weight.family import FAMILY
from jaxlora._weight.tokens import ROWS
from jaxlora._weight.variant import TOKENS, UNLISTED, VARIANTS

VARIANTS.update(FAMILY)
UNLISTED[TOKENS] = ROWS
