"""What backward needs of the forward, and what it leaves, in fewer bytes."""

from .offload import OffloadActivations, offload_activations
from .project import ProjectedLinears, project_linears
from .projected_gradients import ProjectedGradients
from .recompute import recompute_activations
from .release import release_gradients
from .report import saved_bytes
from .sample import SampledLinears, sample_linears

__all__ = [
    "OffloadActivations",
    "ProjectedGradients",
    "ProjectedLinears",
    "SampledLinears",
    "offload_activations",
    "project_linears",
    "recompute_activations",
    "release_gradients",
    "sample_linears",
    "saved_bytes",
]
