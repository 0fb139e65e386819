"""The command line."""

from jaxlora._cli.main import main

__all__ = ["main"]
