"""`wrap`: programs on adapted weights. Importing the package registers the rules."""

from jaxlora._transform import rules

__all__ = ["rules"]
