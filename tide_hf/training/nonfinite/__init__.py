"""Non-finite losses, gradients and weights: caught, named and written to a file, but never saved in a model."""

from .checks import NonFiniteError, gradient_norms, require_finite
from .guard import StepGuard
from .report import at_step, replay

__all__ = ["NonFiniteError", "StepGuard", "at_step", "gradient_norms", "replay", "require_finite"]
