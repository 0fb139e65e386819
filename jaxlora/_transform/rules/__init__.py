"""One rule per family of primitives. Importing the package registers them."""

from jaxlora._transform.rules import conv, dot, frozen, gather, layout, linear, placement, ragged, registered

__all__ = ["conv", "dot", "frozen", "gather", "layout", "linear", "placement", "ragged", "registered"]
