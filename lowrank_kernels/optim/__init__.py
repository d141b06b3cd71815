"""What users construct."""

from .lowrank_adamw import LowRankAdamW
from .methods import (
    AdaRankGradAdamW,
    ApolloAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
)
from .param_groups import param_groups
from .restarts import Restarts

__all__ = [
    "AdaRankGradAdamW",
    "ApolloAdamW",
    "FiraAdamW",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "LowRankAdamW",
    "Restarts",
    "param_groups",
]
