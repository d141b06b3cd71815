"""Gradients and activations as small as the state."""

from .project import ProjectedLinears, project_linears

__all__ = ["ProjectedLinears", "project_linears"]
