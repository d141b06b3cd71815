"""What users construct."""

from .lowrank_adamw import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, LowRankAdamW
from .param_groups import param_groups

__all__ = ["AdaRankGradAdamW", "FiraAdamW", "GaLoreAdamW", "LowRankAdamW", "param_groups"]
