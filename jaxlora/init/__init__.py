"""How factors start: drawn, from the weight itself, or from data.

    config = jaxlora.LoraConfig(rank=8, init="pissa")                      # one of jaxlora.init.INITS, or a function
    tree = jaxlora.adapt(params, config, key)
    tree = jaxlora.init.init_from_data(tree, fn, batches, key)             # along the inputs of each weight

`kaiming`, `he_uniform` and `gaussian` draw A, where B is zero; a function of one's own, an `Initializer`, does as they
do: `(key, shape, dtype, fan_in, rank) -> A`. The other names give both factors, from the weight.
"""

from jaxlora._adapt.initializers import INITS, gaussian, he_uniform, kaiming
from jaxlora._weight.start import Initializer
from jaxlora.init._from_data import init_from_data

__all__ = ["INITS", "Initializer", "gaussian", "he_uniform", "init_from_data", "kaiming"]
