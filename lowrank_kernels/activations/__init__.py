"""What backward needs of the forward, in fewer bytes."""

from .recompute import recompute_activations
from .report import saved_bytes

__all__ = ["recompute_activations", "saved_bytes"]
