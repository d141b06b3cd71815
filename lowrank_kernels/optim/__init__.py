"""What users construct."""

from .lowrank_adamw import FiraAdamW, GaLoreAdamW, LowRankAdamW
from .param_groups import param_groups

__all__ = ["FiraAdamW", "GaLoreAdamW", "LowRankAdamW", "param_groups"]
