"""Trees on meshes: how they are partitioned, trees made where they belong, and optimizers' counters beside them.

    shapes = jax.eval_shape(init, key)                                        # no weight is made
    shapes = jax.tree.map(with_its_sharding, shapes)
    abstract = jaxlora.adapt(shapes, config, key)                             # every factor has a sharding
    tree = jaxlora.sharding.materialize(abstract, lambda key: jaxlora.adapt(init(key), config, key), key)

`specs` says how every part of a tree is partitioned, `follow` puts what an optimizer keeps beside what it trains.
"""

from jaxlora.sharding._follow import follow
from jaxlora.sharding._materialize import materialize
from jaxlora.sharding._specs import specs

__all__ = ["follow", "materialize", "specs"]
