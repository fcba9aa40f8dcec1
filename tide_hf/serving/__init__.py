"""Students in the form that inference engines read."""

from .export import export_for_serving

__all__ = ["export_for_serving"]
