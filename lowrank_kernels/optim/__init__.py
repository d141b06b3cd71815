"""What users construct."""

from .lowrank_adamw import LowRankAdamW
from .methods import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW
from .param_groups import param_groups

__all__ = ["AdaRankGradAdamW", "FiraAdamW", "GaLoreAdamW", "LowRankAdamW", "param_groups"]
