"""Linear layers whose weights are products of two factors, and what is done with them."""

from .factorize import Factorized, densify, factorize
from .linear import FactoredLinear
from .refactorize import refactorize

__all__ = ["FactoredLinear", "Factorized", "densify", "factorize", "refactorize"]
