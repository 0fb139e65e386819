"""Many adapters on one base: `stack` makes a bank of them, `route` runs a batch whose rows use different ones."""

from jaxlora.serving._adapters import pad
from jaxlora.serving._bank import Bank
from jaxlora.serving._route import route
from jaxlora.serving._stack import stack

__all__ = ["Bank", "pad", "route", "stack"]
