"""Low-rank optimizers for PyTorch: every weight trained, with moments in a subspace."""

from importlib.metadata import version

from .ops import BackendUnavailable, backends
from .optim import FiraAdamW, GaLoreAdamW, LowRankAdamW, param_groups

__version__ = version("lowrank-kernels")

__all__ = [
    "BackendUnavailable",
    "FiraAdamW",
    "GaLoreAdamW",
    "LowRankAdamW",
    "backends",
    "param_groups",
]
