"""What a step takes of the gradient outside of the subspace: the forms of `residual`.

With E = G - back(R), phi_j = |N_j| / |R_j| of a channel, and s = `residual_scale`:

    None         nothing                                            GaLore
    official     phi (x) (G - alpha back(R)), limited               Fira's code
    paper        alpha phi (x) E, limited                           Fira, algorithm 1
    scale        alpha phi (x) G, limited, and no back(N)           APOLLO; phi of the matrix: Mini
    normalize    s sqrt(d) e_j / |e_j|, d the length of a channel   after SCALE
    sign         s sign(E)                                          after FRUGAL
    orthogonal   s sqrt(max(rows, cols)) U Z^T, of E = U S Z^T      ours; after Muon and SWAN

An update is alpha back(N) plus that. All but the last two are factors of channels, which
operations 2 and 3 take; the last two change E itself, and go into operation 3 in the place of G.
Those may have a momentum, of which one byte an element is kept.

The last three make a step as large as any other of the smallest E. So e_j counts as zero where
|e_j| <= |R_j| / 64, or / 32 with bases in a byte: that much rounding leaves of a gradient in the
span of its basis.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import ChannelSums, Matrices, Operations, Projection, Residual, Scalars
from ..ops.contract import rank_axis
from ..ops.products import matrices_in_workspace
from ..ops.reference import channel_factors, channel_scale, limited
from .transformed import MOMENTUM, State, Transformation, negligible_share

ResidualForm = Literal["official", "paper", "scale", "normalize", "sign", "orthogonal"]
Per = Literal["channel", "matrix"]
# Fira's limiter keeps their norm from growing fast.
LIMITED = ("official", "paper", "scale")
# E itself is changed, as a matrix.
TRANSFORMED = ("sign", "orthogonal")
# Its size does not count.
AMPLIFIED = ("normalize", *TRANSFORMED)
# Of which operations 2 and 3 compute all.
AS_THEY_ARE = (None, "official", "paper")
RESIDUAL_FORMS = (*LIMITED, *AMPLIFIED)
PERS = ("channel", "matrix")
# An element, of E in float32, stacked, brought to a norm of 1, and in bfloat16 iterated.
TRANSFORMED_BYTES = 16
# s where none is given; of the other forms it is alpha.
ORTHOGONAL_SCALE = 0.4
# A code next to another is a 64th larger, or more.
MOST_MOMENTUM = 0.98


class Outside(NamedTuple):
    """What `LowRankAdamW` is told of it, by its names."""

    residual: ResidualForm | None = None
    residual_scale: float | None = None
    residual_momentum: float = 0.0
    per: Per = "channel"

    @property
    def is_limited(self) -> bool:
        return self.residual in LIMITED

    @property
    def entries(self) -> tuple[str, ...]:
        """What a projected state has for it beside what its moments and its subspace keep."""
        if self.is_limited:
            return ("limiter_norm",)
        return MOMENTUM if self.residual_momentum else ()

    def described(self) -> dict[str, object]:
        """The form, and options that are not as ever."""
        usual = {**self._field_defaults, "residual": ...}
        return {name: value for name, value in self._asdict().items() if value != usual[name]}

    def check(self) -> None:
        """Raises ValueError or TypeError if an option is unknown, or does not go with another."""
        if self.residual is not None and self.residual not in RESIDUAL_FORMS:
            raise ValueError(f"residual must be one of {', '.join(RESIDUAL_FORMS)} or None")
        if self.per not in PERS:
            raise ValueError(f"per must be one of {', '.join(PERS)}, got {self.per!r}")
        if self.per == "matrix" and self.residual != "scale":
            raise ValueError("per='matrix' goes with residual='scale'")
        momentum = self.residual_momentum
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
            raise TypeError(f"residual_momentum must be a number, got {momentum!r}")
        if not 0 <= momentum <= MOST_MOMENTUM:
            raise ValueError(
                f"residual_momentum must be in [0, {MOST_MOMENTUM}], got {momentum!r}: above that,"
                " a byte an element rounds away what a step adds"
            )
        if self.residual_momentum and self.residual not in TRANSFORMED:
            raise ValueError(f"residual_momentum goes with residual={' or '.join(TRANSFORMED)}")
        if self.residual_scale is None:
            return
        if self.residual not in AMPLIFIED:
            raise ValueError(
                "residual_scale goes with residual=normalize, sign or orthogonal; of the others"
                " it is the groups' scale"
            )
        if isinstance(self.residual_scale, bool) or not isinstance(
            self.residual_scale, (int, float)
        ):
            raise TypeError(f"residual_scale must be a number, got {self.residual_scale!r}")
        if not 0 <= self.residual_scale < math.inf:
            raise ValueError(
                f"residual_scale must be at least 0 and finite, got {self.residual_scale}"
            )

    def shares(self, sums: ChannelSums) -> tuple[Tensor, Tensor]:
        """Of a form whose growth is limited, from the channels of each matrix that are here.

        Returns:
            B x channels, by which `limits` of the whole are multiplied, and B x k in float64, whose
            sums over all parts of a matrix `limits` takes.
        """
        if self.per == "matrix":
            sums = _added_up(sums)
            finite = sums.residual < math.inf
            parts = [x.where(finite, 0.0) for x in sums]
            factors = finite.to(sums.residual.dtype)
        else:
            factors, *parts = channel_factors(sums)
        return factors, torch.stack([x.double().sum(1) for x in parts], dim=1)

    @property
    def shared(self) -> int:
        """How many numbers a matrix `shares` gives."""
        return 0 if not self.is_limited else 3 if self.per == "matrix" else 2

    def limits(self, totals: Tensor, limiter_norms: Sequence[Tensor]) -> Tensor:
        """A factor for each matrix; goes on with the norms that the limiter keeps.

        Args:
            totals: B x k.
            limiter_norms: of the matrices.
        """
        dtype = limiter_norms[0].dtype
        if self.per == "matrix":
            whole = ChannelSums(*(x.unsqueeze(1) for x in totals.to(dtype).unbind(1)))
            return channel_scale(whole, limiter_norms).squeeze(1)
        norm, ordinary_norm = totals.sqrt().to(dtype).unbind(1)
        return limited(norm, ordinary_norm, limiter_norms)

    @property
    def transformation(self) -> Transformation:
        """What becomes of E, of the forms that change it as a matrix."""
        return Transformation(self.residual == "orthogonal", self.residual_momentum)

    def matrices(self, param: Tensor) -> int | None:
        """As many of this shape as have room in a workspace, with E and what is made of it; None
        where no operation holds it.
        """
        if self.residual not in TRANSFORMED:
            return None
        return matrices_in_workspace(param.device, TRANSFORMED_BYTES * param.numel())

    def numbers(self, alpha: float, shape: Sequence[int]) -> Residual | None:
        """What operations 1 and 3 are told of it.

        Args:
            alpha: scale of the group.
            shape: of the weight.
        """
        scale = alpha if self.residual_scale is None else self.residual_scale
        if self.residual == "orthogonal":
            own = ORTHOGONAL_SCALE if self.residual_scale is None else self.residual_scale
            return Residual(0.0, own * math.sqrt(max(shape)))
        every = {
            "official": (alpha, 1.0),
            "paper": (1.0, alpha),
            "scale": (0.0, alpha),
            "normalize": (1.0, scale),
            "sign": (0.0, scale),
        }
        return None if self.residual is None else Residual(*every[self.residual])


class Updater:
    """Operations 2 and 3 of a batch, in a form that is not theirs as they are.

    Args:
        outside: the form.
        operations: what the batch was prepared with.
        backend: by which it was.
    """

    def __init__(self, outside: Outside, operations: Operations, backend: str) -> None:
        self._outside, self._operations, self._backend = outside, operations, backend
        # Where operation 3 takes other tensors than operation 1.
        self._last: Operations | None = None

    def update(
        self,
        matrices: Matrices,
        states: Sequence[State],
        projection: Projection,
        scalars: Scalars,
        factor: Tensor | None = None,
    ) -> None:
        """Changes the weights, and what the states keep of E.

        Args:
            matrices: the batch.
            states: of its parameters.
            projection: of operation 1.
            scalars: of the step.
            factor: of the form "scale", where it is known.
        """
        form, sums = self._outside.residual, projection.sums
        assert sums is not None
        if form == "normalize":
            factor = _normalizing(sums, matrices, negligible_share(states[0]))
            self._operations.back_project_update(matrices, projection, factor, scalars)
            return
        if form == "scale":
            if factor is None and self._outside.per == "matrix":
                factor = _scale_of_matrices(sums, matrices.limiter_norms)
            elif factor is None:
                factor = self._operations.channel_scale(matrices, sums)
            matrices, projection = _without_span(matrices, projection)
            scalars = scalars._replace(scale=0.0)
        else:
            usable = _usable(sums)
            outside = self._outside.transformation
            grads = outside.of(matrices, states, projection.projected, usable)
            self._update_by(grads, matrices, projection, usable, scalars)
            return
        self._finish(matrices, projection, factor, scalars)

    def begin(
        self, matrices: Matrices, states: Sequence[State], projection: Projection
    ) -> list[Tensor]:
        """Of shards of a form that needs whole matrices: what of them is here.

        Changes what the states keep of E. See `update`.
        """
        assert projection.sums is not None
        outside, usable = self._outside.transformation, _usable(projection.sums)
        return outside.outside(matrices, states, projection.projected, usable)

    def end(
        self,
        matrices: Matrices,
        states: Sequence[State],
        projection: Projection,
        scalars: Scalars,
        factors: Sequence[Tensor],
    ) -> None:
        """Changes the weights, by what has become of what `begin` gave."""
        assert projection.sums is not None
        grads = self._outside.transformation.finished(matrices, states, factors)
        self._update_by(grads, matrices, projection, _usable(projection.sums), scalars)

    def _update_by(
        self,
        grads: list[Tensor],
        matrices: Matrices,
        projection: Projection,
        usable: Tensor,
        scalars: Scalars,
    ) -> None:
        """Operation 3 with what is outside, changed, in the place of gradients."""
        matrices = matrices._replace(grads=grads)
        self._finish(matrices, projection._replace(grads=None), usable, scalars)

    def _finish(
        self, matrices: Matrices, projection: Projection, factor: Tensor, scalars: Scalars
    ) -> None:
        if self._last is None:
            self._last = ops.prepare(matrices, backend=self._backend)
        self._last.back_project_update(matrices, projection, factor, scalars)


def _usable(sums: ChannelSums) -> Tensor:
    """B x channels, 1 where what is outside is finite, else 0."""
    return (_added_up(sums).residual < math.inf).to(sums.residual.dtype)


def _added_up(sums: ChannelSums) -> ChannelSums:
    """B x channels of each."""
    return ChannelSums(*(x.sum(1) if x.dim() == 3 else x for x in sums))


def _scale_of_matrices(sums: ChannelSums, limiter_norms: Sequence[Tensor]) -> Tensor:
    """Operation 2 with each matrix as one channel; 0 in channels that are not finite."""
    sums = _added_up(sums)
    finite = sums.residual < math.inf
    whole = ChannelSums(*(x.where(finite, 0.0).sum(1, keepdim=True) for x in sums))
    return channel_scale(whole, limiter_norms) * finite


def _normalizing(sums: ChannelSums, matrices: Matrices, share: float) -> Tensor:
    """sqrt(d) / |e_j|; 0 for a channel that is zero, in the span, up to a share, or not finite."""
    _, spanned, squares = _added_up(sums)
    depth = matrices.params[0].shape[rank_axis(matrices.side)]
    least = (share**2 * spanned).clamp_(min=torch.finfo(squares.dtype).tiny)
    usable = (squares > least) & (squares < math.inf)
    return (math.sqrt(depth) / squares.where(usable, 1.0).sqrt_()).where(usable, 0.0)


def _without_span(matrices: Matrices, projection: Projection) -> tuple[Matrices, Projection]:
    """The same with bases of no direction, so that there is no product with them."""
    axis = rank_axis(matrices.side)

    def none_of(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.narrow(axis, 0, 0) for tensor in tensors]

    matrices = matrices._replace(
        bases=[basis[:, :0] for basis in matrices.bases],
        exp_avgs=none_of(matrices.exp_avgs),
        exp_avg_sqs=none_of(matrices.exp_avg_sqs),
        exp_avg_scales=none_of(matrices.exp_avg_scales),
        exp_avg_sq_scales=none_of(matrices.exp_avg_sq_scales),
    )
    return matrices, projection._replace(
        direction=projection.direction.narrow(1 + axis, 0, 0),
        projected=projection.projected.narrow(1 + axis, 0, 0),
    )
