"""torch's own operations over a whole batch, on every device that torch has.

What `reference` specifies, with few launches and no temporary of W's size. Products, and sums over
channels, go matrix by matrix from memory of one alignment, so that the bits of a matrix do not
depend on its batch; all else goes over the batch.

    operation 1   R by one product, unless it is given; M, V and N a block at a time; |g_j|^2 by
                  one pass over G
    operation 3   GaLore: the product is added to W as it is formed
                  Fira: phi' (x) G a tile at a time, the product on top of it, and W read and
                  rounded once
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .contract import (
    MAX_KAPPA_HALF_PRECISION,
    AdamScalars,
    ChannelSums,
    Matrices,
    Projection,
    Scalar,
    Scalars,
    Side,
    rank_axis,
    scalar_of,
)
from .dry import device_type
from .products import (
    factors,
    fast_in_half,
    product_dtype,
    project,
    rows_or_columns_are_dense,
    squarable,
    stacked,
)
from .reference import channel_scale, stochastically_rounded

# Of moments that the operations take as they are stored.
MOMENTS = (torch.float32, torch.float64)

# Elements of a block or a tile, which bound every temporary but those of R's or the basis' size.
# On a CPU a tile in float32 stays in the last cache; the number for other devices was not measured.
BLOCK_ELEMENTS = {"cpu": 2**20}
BLOCK_ELEMENTS_ELSEWHERE = 2**23
# A product of fewer rows does not run at full speed.
TILE_ROWS = 512
# The bits of a product may depend on the alignment of its operands.
ALIGNED_ELEMENTS = 256


def batch_size(param: Tensor, grad: Tensor, rank: int) -> int:
    """Matrices a batch: as many as keep R, and so N, within a block."""
    return max(1, _block_elements(param) // max(1, rank * max(param.shape)))


class Operations:
    """See `contract.Operations`. Prepared are the ways that layouts and dtypes leave open."""

    def __init__(self, matrices: Matrices) -> None:
        param, grad, basis = matrices.params[0], matrices.grads[0], matrices.bases[0]
        residual = matrices.residual
        half = min(grad.itemsize, basis.itemsize) < 4 or not matrices.orthonormal
        forms_residual = half and residual is not None and residual.kappa > MAX_KAPPA_HALF_PRECISION
        self._forms_residual_in_half = forms_residual and fast_in_half(
            grad, basis, device_type(grad)
        )
        self._dtype = matrices.exp_avgs[0].dtype
        self._side, self._axis = matrices.side, rank_axis(matrices.side)
        self._block = _block_elements(param)
        self._projects_in_blocks = (
            not rows_or_columns_are_dense(grad)
            or product_dtype(grad.dtype, device_type(grad)) is not grad.dtype
            # The product would round the basis.
            or (grad.itemsize < 4 and basis.dtype is not grad.dtype)
            or (forms_residual and not self._forms_residual_in_half)
        )
        self._update_dtype = product_dtype(param.dtype, device_type(param))
        self._adds_to_param = (
            residual is None
            and matrices.salts is None
            and rows_or_columns_are_dense(param)
            and self._update_dtype is param.dtype
        )

    def project_moments(
        self, matrices: Matrices, adam: AdamScalars, step: int | Tensor = 0
    ) -> Projection:
        side, residual, residual_sq = matrices.side, matrices.residual, None
        pairs = list(zip(matrices.grads, matrices.bases, strict=True))
        if matrices.projected:
            # A copy, even of one: entries that are left out become 0 in it.
            projected = torch.stack(matrices.grads).to(self._dtype)
        elif self._projects_in_blocks:
            kappa = None if residual is None else residual.kappa
            lows, squares = zip(
                *(self._project_in_blocks(*pair, side, kappa) for pair in pairs), strict=True
            )
            projected = stacked(lows)
            residual_sq = None if residual is None else stacked(squares)
        else:
            products = [project(grad, basis.to(grad.dtype), side) for grad, basis in pairs]
            projected = stacked(products).to(self._dtype)
        direction = self._adam_moments(matrices, projected, adam)
        if residual is None:
            return Projection(direction, projected, None)
        direction_sq, projected_sq = map(self._channel_sums, (direction, projected))
        if self._forms_residual_in_half:
            residual_sq = self._residual_sq_in_half(pairs, projected, residual.kappa)
        elif residual_sq is None:
            spanned = 2 * residual.kappa - residual.kappa**2
            residual_sq = self._channel_sums(matrices.grads)
            residual_sq.sub_(projected_sq, alpha=spanned).clamp_(min=0.0)
        return Projection(
            direction, projected, ChannelSums(direction_sq, projected_sq, residual_sq)
        )

    def channel_scale(self, matrices: Matrices, sums: ChannelSums) -> Tensor:
        return channel_scale(sums, matrices.limiter_norms)

    def back_project_update(
        self,
        matrices: Matrices,
        projection: Projection,
        factor: Tensor | None,
        scalars: Scalars,
    ) -> None:
        residual, direction = matrices.residual, projection.direction
        keep = 1 - self._stackable(scalars.decay)
        change = -keep * self._stackable(scalars.step_size)
        bases = [basis.to(self._update_dtype) for basis in matrices.bases]
        if self._adds_to_param and not isinstance(keep, Tensor) and not isinstance(change, Tensor):
            alpha, lows = change * scalars.scale, self._operands(direction)
            for param, basis, low in zip(matrices.params, bases, lows, strict=True):
                param.addmm_(*factors(low, basis, matrices.side), beta=keep, alpha=alpha)
            return
        combined = _aligned_empty(direction.shape, self._dtype, direction.device)
        torch.mul(direction, scalars.scale, out=combined)
        weights = None
        if residual is not None and factor is not None:
            phi = factor.unsqueeze(1 + self._axis)
            combined.addcmul_(projection.projected, phi, value=-residual.rho * residual.kappa)
            weights = (residual.rho * change * phi).expand(-1, *matrices.params[0].shape)
        lows = self._operands(combined)
        pairs = [factors(low, basis, matrices.side) for low, basis in zip(lows, bases, strict=True)]
        for tile in _tiles(len(bases), matrices.params[0].shape, self._block):
            self._update_tile(tile, matrices, pairs, weights, change, keep, scalars.step)

    def _update_tile(
        self,
        tile: tuple[slice, slice, slice],
        matrices: Matrices,
        pairs: list[tuple[Tensor, Tensor]],
        weights: Tensor | None,
        change: Scalar,
        keep: Scalar,
        step: int | Tensor,
    ) -> None:
        """W <- keep W + change A B + weights (x) G in equal parts of some matrices.

        `pairs` are A and B of each; `weights` are spread over W's shape, None without a residual;
        `change` and `keep` are numbers or one value a matrix, B x 1 x 1.
        """
        some, rows, cols = tile
        params = [param[rows, cols] for param in matrices.params[some]]
        update = _aligned_empty((len(params), *params[0].shape), self._dtype, params[0].device)
        if weights is None:
            update.zero_()
        else:
            grads = [grad[rows, cols] for grad in matrices.grads[some]]
            torch.mul(stacked(grads), weights[tile], out=update)
            # What is not finite is of a channel left out: elsewhere phi' would be 0.
            update.nan_to_num_(0.0, 0.0, 0.0)
        parts = [(left[rows], right[:, cols]) for left, right in pairs[some]]
        if self._update_dtype is self._dtype and not isinstance(change, Tensor):
            for target, part in zip(update, parts, strict=True):
                target.addmm_(*part, alpha=change)
        else:
            products = stacked([left @ right for left, right in parts])
            _add_scaled(update, products, scalar_of(change, some))
            del products
        _add_scaled(update, stacked(params), scalar_of(keep, some))
        values = list(update.unbind())
        if matrices.salts is not None:
            values = [
                stochastically_rounded(
                    value,
                    matrices.side,
                    matrices.salts[number],
                    scalar_of(step, number),
                    first=(rows.start, cols.start),
                )
                for number, value in enumerate(values, some.start)
            ]
        torch._foreach_copy_(params, values)

    def _project_in_blocks(
        self, grad: Tensor, basis: Tensor, side: Side, kappa: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """R of any gradient in the moments' dtype, and with kappa also |e_j|^2, literally."""
        basis, lows, squares = basis.to(self._dtype), [], []
        for part in torch.split(grad, channels_of_block(grad, side), 1 - self._axis):
            block = part.to(self._dtype, copy=True)
            low = project(block, basis, side)
            lows.append(low)
            if kappa is not None:
                # What is left out of R stays in the residual, which is then left out itself.
                low.mul_(squarable(low))
                squares.append(residual_sq_in(block, low, basis, side, kappa))
        return _joined(lows, 1 - self._axis), _joined(squares) if squares else None

    def _residual_sq_in_half(
        self, pairs: Sequence[tuple[Tensor, Tensor]], projected: Tensor, kappa: float
    ) -> Tensor:
        """|e_j|^2, literally, by products in the gradients' dtype, to which e is rounded."""
        grad = pairs[0][0]
        # R is what the first product was rounded to, but for entries that were left out.
        lows = _aligned_empty(projected.shape, grad.dtype, projected.device).copy_(projected)
        at_once, axis = channels_of_block(grad, self._side), 1 - self._axis
        squares = []
        for (grad, basis), low in zip(pairs, lows, strict=True):
            sums = []
            blocks = torch.split(grad, at_once, axis), torch.split(low, at_once, axis)
            for block, part in zip(*blocks, strict=True):
                outside = torch.addmm(block, *factors(part, basis, self._side), alpha=-kappa)
                sums.append(self._channel_sums([outside])[0])
            squares.append(_joined(sums))
        return stacked(squares)

    def _adam_moments(self, matrices: Matrices, projected: Tensor, adam: AdamScalars) -> Tensor:
        """N, from M, V and R, which change in place; an entry of R without a finite square is 0.

        There the moments move by a share of 0.
        """
        correction1 = self._stackable(adam.bias_correction1)
        correction2 = self._stackable(adam.bias_correction2)
        # N of an entry left out is 0 M / eps, which 0 / 0 would spoil.
        eps = max(adam.eps, torch.finfo(self._dtype).tiny)
        exp_avgs, exp_avg_sqs = stacked(matrices.exp_avgs), stacked(matrices.exp_avg_sqs)
        direction = _aligned_empty(projected.shape, self._dtype, projected.device)
        stacks = (exp_avgs, exp_avg_sqs, projected, direction)
        rows = max(1, self._block // max(1, len(projected) * projected.shape[2]))
        for m, v, r, n in zip(*(torch.split(stack, rows, 1) for stack in stacks), strict=True):
            usable = squarable(r)
            r.nan_to_num_(0.0, 0.0, 0.0).mul_(usable)
            share = usable * (1 - adam.beta1)
            m.lerp_(r, share)
            torch.mul(usable, 1 - adam.beta2, out=share)
            v.lerp_(torch.square(r, out=n), share)

            if _is_one(correction2):
                torch.sqrt(v, out=n).add_(eps)
            else:
                torch.div(v, correction2, out=n).sqrt_().add_(eps)
            if not _is_one(correction1):
                n.mul_(correction1)
            torch.div(m, n, out=n).mul_(usable)
        if len(projected) > 1:
            torch._foreach_copy_(matrices.exp_avgs, exp_avgs.unbind())
            torch._foreach_copy_(matrices.exp_avg_sqs, exp_avg_sqs.unbind())
        return direction

    def _channel_sums(self, matrices: Sequence[Tensor] | Tensor) -> Tensor:
        """Squared norms of the channels, B x channels."""
        if device_type(matrices[0]) != "cpu":
            dtype = torch.promote_types(matrices[0].dtype, self._dtype)
            norms = [torch.linalg.vector_norm(x, dim=self._axis, dtype=dtype) for x in matrices]
            return stacked(norms).to(self._dtype).square_()
        # There a norm over the first axis takes 20 times as long as squares and a sum.
        sums = []
        for matrix in matrices:
            blocks = torch.split(matrix, channels_of_block(matrix, self._side), 1 - self._axis)
            squares = [block.to(self._dtype).square().sum(self._axis) for block in blocks]
            sums.append(_joined(squares))
        return stacked(sums)

    def _stackable(self, scalar: Scalar) -> Scalar:
        """A scalar that multiplies a stack of matrices."""
        return scalar.to(self._dtype).view(-1, 1, 1) if isinstance(scalar, Tensor) else scalar

    def _operands(self, lows: Tensor) -> Tensor:
        """An aligned stack in the dtype of the products with bases."""
        if lows.dtype is self._update_dtype:
            return lows
        return _aligned_empty(lows.shape, self._update_dtype, lows.device).copy_(lows)


def _block_elements(tensor: Tensor) -> int:
    return BLOCK_ELEMENTS.get(device_type(tensor), BLOCK_ELEMENTS_ELSEWHERE)


def channels_of_block(matrix: Tensor, side: Side) -> int:
    """How many channels of a matrix make a block."""
    return max(1, _block_elements(matrix) // max(1, matrix.shape[rank_axis(side)]))


def residual_sq_in(block: Tensor, low: Tensor, basis: Tensor, side: Side, kappa: float) -> Tensor:
    """|e|^2 of each channel of G in a block, literally; the block is overwritten."""
    return block.addmm_(*factors(low, basis, side), alpha=-kappa).square_().sum(rank_axis(side))


def _tiles(count: int, shape: Sequence[int], block: int) -> Iterator[tuple[slice, slice, slice]]:
    """Matrices, rows and columns of tiles of at most a block, together all of the batch."""
    rows, cols = shape
    height = max(1, min(rows, max(TILE_ROWS, block // max(1, cols))))
    width = max(1, min(cols, block // height))
    at_once = max(1, block // (height * width))
    for first, row, col in itertools.product(
        range(0, count, at_once), range(0, rows, height), range(0, cols, width)
    ):
        yield (
            slice(first, min(count, first + at_once)),
            slice(row, row + height),
            slice(col, col + width),
        )


def _joined(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    """As torch.cat, but one part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def _aligned_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A stack of dense matrices, each of which begins where an allocation might."""
    count, rows, cols = shape
    size = -(-rows * cols // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS
    whole = torch.empty(count, size, dtype=dtype, device=device)
    return whole[:, : rows * cols].view(count, rows, cols)


def _add_scaled(total: Tensor, stack: Tensor, scale: Scalar) -> None:
    if isinstance(scale, Tensor):
        total.addcmul_(stack, scale)
    else:
        total.add_(stack, alpha=scale)


def _is_one(scalar: Scalar) -> bool:
    return not isinstance(scalar, Tensor) and scalar == 1.0
