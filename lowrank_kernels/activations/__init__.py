"""Gradients and activations in fewer bytes."""

from .project import ProjectedLinears, project_linears
from .recompute import recompute_activations
from .report import saved_bytes

__all__ = ["ProjectedLinears", "project_linears", "recompute_activations", "saved_bytes"]
