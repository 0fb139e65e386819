"""The tree that most tests save."""

import jax
import pytest

import jaxlora
from tests.checkpoint.trees import CONFIG, make_params
from tests.helpers import trained


@pytest.fixture(scope="module")
def params():
  return make_params()


@pytest.fixture(scope="module")
def tree(params):
  return trained(jaxlora.adapt(params, CONFIG, jax.random.key(0)))
