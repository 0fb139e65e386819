"""Trees on meshes: `specs` says how every part is partitioned, `materialize` makes a tree where it belongs,
`follow` puts an optimizer's counters beside it.

shapes = jax.eval_shape(init, key)                                        # no weight is made
shapes = jax.tree.map(with_its_sharding, shapes)
abstract = jaxlora.adapt(shapes, config, key)                              # every factor has a sharding
tree = jaxlora.sharding.materialize(abstract, lambda key: jaxlora.adapt(init(key), config, key), key)
"""

from jaxlora.sharding._follow import follow
from jaxlora.sharding._materialize import materialize
from jaxlora.sharding._specs import specs

__all__ = ["follow", "materialize", "specs"]
