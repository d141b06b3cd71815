"""Where a basis comes from and when it changes."""

from .refresh import RANGE_FINDERS, ZERO_GRADIENT, is_due, refresh_basis

__all__ = ["RANGE_FINDERS", "ZERO_GRADIENT", "is_due", "refresh_basis"]
