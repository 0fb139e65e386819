"""Random programs: importing the package registers every kind of step."""

from tests._transform.fuzz import control, layouts, uses

__all__ = ["control", "layouts", "uses"]
