"""Flax's state dicts of our nodes, whenever flax is imported and wherever a tree comes from.

Each case is a process of its own, as it is about what a process has imported, and when.
"""

import pickle
import subprocess
import sys

import jax.numpy as jnp
import pytest

from tests.helpers import adapted

MAKE = """
params = {"w": jnp.arange(12.0).reshape(4, 3), "bias": jnp.ones(3)}
tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, variant="dora", train="bias"), jax.random.key(0))
"""

CHECK = """
kinds = {name: type(node).__name__ for name, node in tree.items()}
assert kinds == {"w": "LoraWeight", "bias": "FullWeight"}, kinds
state = serialization.to_state_dict(tree)
assert sorted(state["w"]) == ["a", "b", "base", "magnitude", "norm"], state
assert sorted(state["bias"]) == ["base", "value"], state
blank = jax.tree.map(lambda x: 0 * x, tree)
encoded = serialization.to_bytes(tree)
for back in (serialization.from_state_dict(blank, state), serialization.from_bytes(blank, encoded)):
  assert jax.tree.structure(back) == jax.tree.structure(tree), back
  assert all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))
"""

LOAD = "tree = pickle.load(open(sys.argv[1], 'rb'))"

FLAX = "from flax import serialization"

ORDERS = {
  "adapt, then flax": ["import jaxlora", MAKE, FLAX, CHECK],
  "flax before jaxlora": [FLAX, "import jaxlora", MAKE, CHECK],
  "unpickled, then flax": [LOAD, FLAX, CHECK],
  "flax, then unpickled": [FLAX, LOAD, CHECK],
  "flax loaded anew": [
    FLAX,
    "import jaxlora",
    MAKE,
    CHECK,
    "import importlib; importlib.reload(serialization)",
    "del sys.modules['flax.serialization']; import flax; del flax.serialization",
    "from flax import serialization as other; assert other is not serialization; serialization = other",
    "state = serialization.to_state_dict(tree['w']); assert sorted(state) == ['a', 'b', 'base', 'magnitude', 'norm']",
  ],
}


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
  """A file with the tree of `MAKE`."""
  params = {"w": jnp.arange(12.0).reshape(4, 3), "bias": jnp.ones(3)}
  file = tmp_path_factory.mktemp("pickled") / "tree"
  file.write_bytes(pickle.dumps(adapted(params, rank=2, variant="dora", train="bias")))
  return file


@pytest.mark.parametrize("order", ORDERS)
def test_in_every_order(order, pickled):
  lines = ["import pickle, sys, jax, jax.numpy as jnp", *ORDERS[order]]
  run = subprocess.run([sys.executable, "-c", "\n".join(lines), str(pickled)], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr


def test_jaxlora_alone_imports_no_flax(pickled):
  code = f"import pickle, sys\n{LOAD}\nprint(hash(type(tree['w'])) and 'flax' in sys.modules)"
  run = subprocess.run([sys.executable, "-c", code, str(pickled)], capture_output=True, text=True)
  assert run.stdout.strip() == "False", run.stderr
