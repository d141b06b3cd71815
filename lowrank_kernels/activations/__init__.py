"""What backward needs of the forward, and what it leaves, in fewer bytes."""

from .project import ProjectedLinears, project_linears
from .projected_gradients import ProjectedGradients
from .recompute import recompute_activations
from .release import release_gradients
from .report import saved_bytes

__all__ = [
    "ProjectedGradients",
    "ProjectedLinears",
    "project_linears",
    "recompute_activations",
    "release_gradients",
    "saved_bytes",
]
