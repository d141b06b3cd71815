"""What is outside of the subspace, changed as a matrix: its signs or its orthogonal factor.

Of E = G - back(R), or of its mean over the last steps, which is held in a byte an element. Matrices
are stacked, B x rows x cols; on a CPU each is a stack by itself, so that its bits do not depend on
the others.

Of both only the orthogonal factor needs whole matrices. What comes before and after it goes by
channels, of which shards have all entries of some: `outside`, and `finished`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import Matrices, Side
from ..ops.codes import ROW_GROUPS, decoded, encode
from ..ops.contract import moment_dtype, rank_axis
from ..ops.dry import device_type
from ..ops.orthogonal import orthogonalized
from ..ops.products import stacked

State = dict[str, Any]

# In a projected state, with a momentum.
MOMENTUM = ("residual_avg", "residual_avg_scale")
# Of the length of what is in the span: rounding leaves less of it outside. Bases that are held in a
# byte leave nearly half of theirs.
NEGLIGIBLE_SHARE = 2**-6
NEGLIGIBLE_SHARE_OF_CODES = 2**-5
# The norm of a mean below which its steps fade, as with torch's Muon: without gradients it only
# becomes smaller, which its signs and its orthogonal factor would not show. Of signs that of a
# channel, which are independent of each other.
FADING_NORM = 1e-7


class Transformation(NamedTuple):
    """What becomes of E: its orthogonal factor or its signs; of its mean with a `momentum`."""

    orthogonal: bool
    momentum: float

    def of(
        self, matrices: Matrices, states: Sequence[State], projected: Tensor, usable: Tensor
    ) -> list[Tensor]:
        """That of each matrix; zero in channels that are left out.

        Args:
            matrices: the batch.
            states: of its parameters; the means in them go on.
            projected: R, B x its shape.
            usable: B x channels, 1 where the gradient is finite, else 0.
        """
        found: list[Tensor] = []
        for part in _parts(matrices):
            stack = _Stack.of(matrices, part, states[0])
            values = self._outside(stack, matrices, states, projected, usable, part)
            values = self.factor(values) if self.orthogonal else self._signs(values, stack)
            found += stack.cleared(values).unbind()
        return found

    def outside(
        self, matrices: Matrices, states: Sequence[State], projected: Tensor, usable: Tensor
    ) -> list[Tensor]:
        """E of each matrix, or its mean: what `factor` takes. See `of`."""
        found: list[Tensor] = []
        for part in _parts(matrices):
            stack = _Stack.of(matrices, part, states[0])
            found += self._outside(stack, matrices, states, projected, usable, part).unbind()
        return found

    def factor(self, values: Tensor) -> Tensor:
        """The orthogonal factor of whole matrices, B x rows x cols."""
        factors = orthogonalized(values)
        if self.momentum:
            factors = factors * _strength(values, (1, 2)).to(factors.dtype)
        return factors

    def finished(
        self, matrices: Matrices, states: Sequence[State], factors: Sequence[Tensor]
    ) -> list[Tensor]:
        """What operation 3 takes, of the channels of factors that belong to these matrices."""
        found: list[Tensor] = []
        for part in _parts(matrices):
            stack = _Stack.of(matrices, part, states[0])
            found += stack.cleared(stacked(factors[part])).unbind()
        return found

    def _outside(
        self,
        stack: "_Stack",
        matrices: Matrices,
        states: Sequence[State],
        projected: Tensor,
        usable: Tensor,
        part: slice,
    ) -> Tensor:
        """Of some of the matrices, stacked."""
        taken = usable[part].unsqueeze(stack.axis).bool()
        values = stacked(matrices.grads[part]).to(matrices.dtype).where(taken, 0.0)
        values = stack.without(values, projected[part].where(taken, 0.0))
        if self.momentum:
            values = _averaged(values, taken, states[part], self.momentum)
        # A mean was outside of earlier bases; and of what bases in a byte span, each time they
        # leave a hundredth.
        for _ in range(2):
            values = stack.without(values, stack.spanned(values))
        return values

    def _signs(self, values: Tensor, stack: "_Stack") -> Tensor:
        if not self.momentum:
            return values.sign()
        return values.sign() * _strength(values, stack.axis)


def negligible_share(state: State) -> float:
    """Of R's length, what of E's counts as nothing, in a channel."""
    return NEGLIGIBLE_SHARE_OF_CODES if "basis_scale" in state else NEGLIGIBLE_SHARE


class _Stack(NamedTuple):
    """The bases of stacked matrices, and the share of what they span that they leave outside."""

    side: Side
    bases: Tensor
    share: float

    @classmethod
    def of(cls, matrices: Matrices, part: slice, state: State) -> "_Stack":
        """Of some of the matrices, which all hold their bases as this state does."""
        bases = stacked(matrices.bases[part]).to(matrices.dtype)
        return cls(matrices.side, bases, negligible_share(state))

    @property
    def axis(self) -> int:
        """Along which a channel runs."""
        return 1 + rank_axis(self.side)

    def spanned(self, values: Tensor) -> Tensor:
        """What the bases span of the values, in the shape of R."""
        return self.bases.mT @ values if self.side is Side.LEFT else values @ self.bases

    def without(self, values: Tensor, low: Tensor) -> Tensor:
        """New values without what the bases span of them, `low`; zero in channels that they span
        but for what rounding leaves.
        """
        left = self.side is Side.LEFT
        products = (self.bases, low) if left else (low, self.bases.mT)
        outside = torch.baddbmm(values, *products, alpha=-1)
        # In float64 for the sake of its range.
        length, spanned = (
            torch.linalg.vector_norm(x, dim=self.axis, keepdim=True, dtype=torch.float64)
            for x in (outside, low)
        )
        return outside.where(length > self.share * spanned, 0.0)

    def cleared(self, values: Tensor) -> Tensor:
        """Values without what bfloat16 has rounded into the span, if they are in it: of that, the
        iterations make a tenth of a step.
        """
        if values.dtype is not torch.bfloat16:
            return values
        stack = self._replace(bases=self.bases.bfloat16())
        return stack.without(values, stack.spanned(values))


def _parts(matrices: Matrices) -> Iterator[slice]:
    """Of a batch, those that are stacked together."""
    count = len(matrices.grads)
    size = 1 if device_type(matrices.grads[0]) == "cpu" else count
    return (slice(start, start + size) for start in range(0, count, size))


def _strength(values: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """1, and less where the norm is next to nothing."""
    dtype = moment_dtype(values.dtype)
    norm = torch.linalg.vector_norm(values, dim=dim, keepdim=True, dtype=dtype)
    return (norm / FADING_NORM).clamp_(max=1.0)


def new_momentum(param: Tensor) -> State:
    """Of E, before the first step: codes of one byte in the weight's shape, and their scales."""
    scales = ROW_GROUPS.scales(param.shape)
    return {
        "residual_avg": torch.zeros_like(
            param, dtype=torch.int8, memory_format=torch.contiguous_format
        ),
        "residual_avg_scale": param.new_zeros(scales, dtype=torch.float32),
    }


def _averaged(values: Tensor, taken: Tensor, states: Sequence[State], momentum: float) -> Tensor:
    """The means of E with these ones, where they are taken, and zero elsewhere.

    Their bias is not corrected: neither transformation sees how large they are.
    """
    largest = torch.finfo(torch.float32).max
    means = []
    for value, finite, state in zip(values, taken, states, strict=True):
        codes, scales = (state[name] for name in MOMENTUM)
        mean = decoded(codes, scales, ROW_GROUPS).to(value.dtype)
        mean = mean.lerp(value, 1 - momentum).where(finite, mean).clamp_(-largest, largest)
        encode(codes, scales, mean.float(), ROW_GROUPS, None)
        means.append(mean)
    return stacked(means).where(taken, 0.0)
