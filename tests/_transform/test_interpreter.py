"""The walk over a program: what nothing after an equation reads is let go."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._transform.interpreter import Handler, interpret


class Value:
  """Stands for an array, and can be referred to weakly."""


class Living(Handler):
  """Takes down how many of the values it made are alive at each equation; none waits for the collector of cycles."""

  def __init__(self):
    self.living = []
    self.alive = []

  def primitive(self, eqn, values):
    self.living = [value for value in self.living if value() is not None]
    self.alive.append(len(self.living))
    out = [Value() for _ in eqn.outvars]
    self.living += map(weakref.ref, out)
    return out


def test_values_go_after_their_last_use():
  def chain(x):
    first = jnp.sin(x)
    for _ in range(8):
      x = jnp.cos(x)
    return x + first

  handler = Living()
  interpret(jax.make_jaxpr(chain)(np.ones(3, np.float32)), [Value()], handler)
  assert handler.alive == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2]  # `first`, and the one before
