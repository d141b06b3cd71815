"""Low-rank optimizers for PyTorch: every weight trained, with moments in a subspace."""

from importlib.metadata import version

from .activations import (
    ProjectedGradients,
    offload_activations,
    project_linears,
    recompute_activations,
    release_gradients,
    sample_linears,
    saved_bytes,
)
from .factors import FactoredLinear, densify, factorize, refactorize
from .ops import BackendUnavailable, backends
from .optim import (
    AdaRankGradAdamW,
    ApolloAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    LowRankAdamW,
    OrthoFiraAdamW,
    Restarts,
    param_groups,
)
from .subspace import Subspace

__version__ = version("lowrank-kernels")

__all__ = [
    "AdaRankGradAdamW",
    "ApolloAdamW",
    "BackendUnavailable",
    "FactoredLinear",
    "FiraAdamW",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "LowRankAdamW",
    "OrthoFiraAdamW",
    "ProjectedGradients",
    "Restarts",
    "Subspace",
    "backends",
    "densify",
    "factorize",
    "offload_activations",
    "param_groups",
    "project_linears",
    "recompute_activations",
    "refactorize",
    "release_gradients",
    "sample_linears",
    "saved_bytes",
]
