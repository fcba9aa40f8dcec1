"""Losses, gradients and weights that are not finite: caught, named, written down; never saved."""

from .checks import NonFiniteError, gradient_norms, require_finite
from .guard import StepGuard
from .report import at_step, replay

__all__ = ["NonFiniteError", "StepGuard", "at_step", "gradient_norms", "replay", "require_finite"]
