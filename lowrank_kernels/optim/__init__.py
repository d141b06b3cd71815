"""What users construct."""

from .lowrank_adamw import LowRankAdamW
from .methods import (
    AdaRankGradAdamW,
    ApolloAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    OrthoFiraAdamW,
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
    "OrthoFiraAdamW",
    "Restarts",
    "param_groups",
]
