"""The norms of tokens' gradients in earlier epochs, from which the next draws its samples."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the mean of a sample's norms, what every token counts at least: gradients change.
FLOOR = 0.1


class GradientNorms:
    """Of one layer: |h| of each token of each sample, as it was when it came last.

    Args:
        samples: in the data set.
        length: tokens in a sample.
    """

    def __init__(self, samples: int, length: int) -> None:
        self.values = torch.zeros(samples, length, dtype=torch.bfloat16, device="cpu")

    @classmethod
    def from_values(cls, values: Tensor) -> GradientNorms:
        """Of `values` that others had."""
        found = cls(*values.shape)
        found.values.copy_(values)
        return found

    def of(self, index: Tensor) -> Tensor:
        """Batch x length, float32: what scores are multiplied by, the same for all tokens of
        samples that have not come yet.
        """
        known = self.values[index.cpu()].float()
        seen = known.sum(1, keepdim=True) > 0
        # Of the batch's others, whose scale a new sample then has.
        usual = known.sum() / (seen.sum() * known.shape[1]).clamp(min=1)
        means = known.mean(1, keepdim=True)
        return torch.maximum(known, FLOOR * means).where(seen, usual.where(usual > 0, 1.0))

    def note(self, index: Tensor, norms: Tensor) -> None:
        """Takes the norms of a batch, batch x length; what is not finite leaves the old ones."""
        here, norms = index.cpu(), norms.to("cpu", torch.bfloat16)
        self.values[here] = norms.where(norms.isfinite(), self.values[here])
