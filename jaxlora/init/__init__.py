"""Factors that start from data: what flows through the model, or back through it."""

from jaxlora.init._from_data import init_from_data

__all__ = ["init_from_data"]
