"""The Hub: what is there before a run starts."""

from .availability import NotAvailableError, require_available

__all__ = ["NotAvailableError", "require_available"]
