"""torch's matrix products, and one compiled pass over memory before, between and after them.

The passes are in `lowrank_kernels._native`. Operation 3 works tile by tile: the product of a tile
goes to a small buffer, and one pass reads it with W and G and writes W. So W is read, written and
rounded once, and nothing of W's size is allocated.
"""

import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .contract import (
    MAX_KAPPA_HALF_PRECISION,
    AdamScalars,
    Alike,
    ChannelSums,
    Noise,
    Projection,
    Residual,
    Scalar,
    Side,
    number,
    projected_shape,
    rank_axis,
)

import_error: str | None = None
try:
    from .. import _native
except ImportError as error:
    # Python would take a module that is not there for one that is imported in a circle.
    import_error = str(error)
    if importlib.util.find_spec("lowrank_kernels._native") is None:
        import_error = "it was not built, as with LOWRANK_NATIVE=off"

# A tile, like a group, holds at most this many elements: its product stays in the last cache. Its
# rows are whole, which the passes like best, unless that left fewer than TILE_ROWS of them: too few
# for the products to run at full speed. The numbers for CUDA were not measured.
TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**23}
TILE_ROWS = {"cpu": 512, "cuda": 4096}

# Rows of products start at cache lines: odd strides cost MKL a third of its speed, and its bits may
# depend on alignment, which must not differ with the group.
ALIGNED_ELEMENTS = 32

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def build_info() -> dict[str, Any]:
    """What the compiled module was built with and runs on; empty if it does not load."""
    return _native.build_info() if import_error is None else {}


def group_size(param: Tensor, grad: Tensor, rank: int) -> int:
    """Matrices a group: as many as a tile holds."""
    return _group_size(param.device.type, param.numel())


def workspace_bytes(alike: Alike, residual: Residual | None) -> int:
    """Bytes of temporaries at the peak.

    project   N, R and the sums; the products of half precision or unaligned rows, or a block
    update    N, R, the sums and phi'; B, and of Fira a tile
    """
    count = min(alike.matrices, _group_size(alike.device_type, alike.numel))
    product_dtype = _product_dtype(alike.dtype, alike.device_type)
    low_rows, low_cols = projected_shape(alike.shape, alike.side, alike.rank)
    aligned = count * low_rows * _aligned(low_cols)
    low = 2 * 4 * count * low_rows * low_cols
    channels = 4 * count * alike.channels
    widened_basis = 4 * alike.rank * alike.depth * (alike.dtype.itemsize < 4)

    half = alike.dtype.itemsize < 4
    in_blocks = residual is not None and half and residual.kappa > MAX_KAPPA_HALF_PRECISION
    if in_blocks or product_dtype is not alike.dtype:
        at_once = _channels_at_once(alike.device_type, alike.depth)
        products = widened_basis + 4 * alike.depth * min(alike.channels, at_once)
    elif half or low_cols % ALIGNED_ELEMENTS:
        products = aligned * alike.dtype.itemsize
    else:
        products = 0
    project = low + 3 * channels + products

    size = product_dtype.itemsize
    update = low + aligned * size
    if product_dtype is not alike.dtype:
        update += count * widened_basis
    if residual is not None:
        update += 4 * channels
    if residual is not None or product_dtype is not alike.dtype:
        at_once, tile_rows, tile_cols = _tile_shape(count, *alike.shape, alike.device_type)
        update += at_once * tile_rows * _aligned(tile_cols) * size
    return max(project, update)


def project_moments(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamScalars,
    residual: Residual | None,
) -> Projection:
    """As `reference.project_moments`.

    Raises:
        TypeError: a scalar is a tensor or the moments are not float32; nothing was written.
    """
    grad, moment = grads[0], exp_avgs[0]
    _check_float32("exp_avg", moment)
    correction1 = number("bias_correction1", adam.bias_correction1)
    correction2 = number("bias_correction2", adam.bias_correction2)
    count, (rows, cols) = len(grads), moment.shape
    projected = moment.new_empty(count, rows, cols)
    direction = torch.empty_like(projected)
    sums = ChannelSums(*moment.new_empty(3, count, moment.shape[1 - rank_axis(side)]))

    addressable = _rows_are_dense(grad) or _rows_are_dense(grad.T)
    half = grad.dtype.itemsize < 4 or bases[0].dtype.itemsize < 4
    products, kappa = projected, None
    if residual is not None and (
        not addressable or (half and residual.kappa > MAX_KAPPA_HALF_PRECISION)
    ):
        kappa = residual.kappa
    if (
        kappa is not None
        or not addressable
        or _product_dtype(grad.dtype, grad.device.type) is not grad.dtype
    ):
        for matrix, basis, *outputs in zip(grads, bases, projected, sums.residual, strict=True):
            _project_in_blocks(matrix, basis, side, kappa, *outputs)
    else:
        if grad.dtype is not torch.float32 or cols % ALIGNED_ELEMENTS:
            products = _aligned_empty(count, rows, cols, grad.dtype, grad.device)
        for matrix, basis, product in zip(grads, bases, products, strict=True):
            _project(matrix, basis.to(matrix.dtype), side, product)

    _native.adam_moments(
        product=_matrices(products),
        projected=_addresses(projected),
        exp_avg=_addresses(exp_avgs),
        exp_avg_sq=_addresses(exp_avg_sqs),
        direction=_addresses(direction),
        direction_sq=_addresses(sums.direction),
        projected_sq=_addresses(sums.projected),
        rows=rows,
        cols=cols,
        channels_are_rows=side is Side.RIGHT,
        beta1=adam.beta1,
        beta2=adam.beta2,
        eps=adam.eps,
        bias_correction1=correction1,
        bias_correction2=correction2,
        **_place(grad),
    )
    if residual is None:
        return Projection(direction, projected, None)
    if kappa is None:
        _residual_sums(grads, side, sums.residual, sums.projected, residual.kappa)
    return Projection(direction, projected, sums)


def channel_scale(sums: ChannelSums, limiter_norms: Sequence[Tensor]) -> Tensor:
    """As `reference.channel_scale`.

    Raises:
        TypeError: the sums are not float32; nothing was written.
    """
    _check_float32("sums", sums.direction)
    dense = ChannelSums(*((x.sum(1) if x.dim() == 3 else x).contiguous() for x in sums))
    factor = torch.empty_like(dense.direction)
    _native.channel_scale(
        direction_sq=_addresses(dense.direction),
        projected_sq=_addresses(dense.projected),
        residual_sq=_addresses(dense.residual),
        limiter_norm=_addresses(limiter_norms),
        factor=_addresses(factor),
        channels=factor.shape[1],
        **_place(factor),
    )
    return factor


def back_project_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    projection: Projection,
    residual: Residual | None,
    factor: Tensor | None,
    *,
    scale: float,
    step_size: Scalar,
    decay: Scalar,
    noise: Noise | None,
) -> None:
    """As `reference.back_project_update`; W is rounded once.

    Raises:
        TypeError: a scalar is a tensor or the projection is not float32; nothing was written.
    """
    _check_float32("projection", projection.direction)
    step_size, decay = number("step_size", step_size), number("decay", decay)
    salts, step = (None, 0) if noise is None else (noise.salts, noise.step)
    if isinstance(step, Tensor):
        raise TypeError("noise.step is a tensor, which the native backend does not take")
    rho = residual.rho if residual is not None else 0.0
    kappa = residual.kappa if residual is not None else 0.0
    product_dtype = _product_dtype(params[0].dtype, params[0].device.type)
    low = _combined(projection, factor, side, scale, rho * kappa, product_dtype)
    bases = [basis.to(low.dtype) for basis in bases]
    if side is Side.LEFT:
        products = list(zip(bases, low, strict=True))
    else:
        products = [(low_one, basis.T) for low_one, basis in zip(low, bases, strict=True)]

    addressable = _rows_are_dense(params[0]) or _rows_are_dense(params[0].T)
    if factor is None and noise is None and addressable and low.dtype is params[0].dtype:
        # Of GaLore's update nothing is left but a product, which BLAS adds to W as it goes.
        for param, (left, right) in zip(params, products, strict=True):
            param.addmm_(left, right, beta=1 - decay, alpha=-(1 - decay) * step_size)
        return

    _update_in_tiles(
        params,
        grads,
        products,
        side is Side.RIGHT,
        None if factor is None else factor.contiguous(),
        step_size=step_size,
        decay=decay,
        rho=rho,
        salts=salts,
        step=step,
    )
    for param in params:
        if not param.is_inference():
            increment_version(param)


def _update_in_tiles(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    products: Sequence[tuple[Tensor, Tensor]],
    channels_are_rows: bool,
    factor: Tensor | None,
    *,
    step_size: float,
    decay: float,
    rho: float,
    salts: tuple[int, ...] | None,
    step: int,
) -> None:
    """A tile of a few matrices at a time: their products into a buffer, then one pass over W."""
    # The passes walk along rows: a W whose columns are dense is updated as its transpose.
    if not _rows_are_dense(params[0]) and _rows_are_dense(params[0].T):
        channels_are_rows = not channels_are_rows
        params, grads = [param.T for param in params], [grad.T for grad in grads]
        products = [(right.T, left.T) for left, right in products]
    (rows, cols), (device, dtype) = params[0].shape, (params[0].device, products[0][0].dtype)
    at_once, tile_rows, tile_cols = _tile_shape(len(params), rows, cols, device.type)
    buffer = _aligned_empty(at_once, tile_rows, tile_cols, dtype, device)
    tiles = itertools.product(
        range(0, len(params), at_once), range(0, rows, tile_rows), range(0, cols, tile_cols)
    )
    for first, row, col in tiles:
        some = slice(first, first + at_once)
        part = slice(row, row + tile_rows), slice(col, col + tile_cols)
        targets = [param[part] for param in params[some]]
        tile = _dense_rows(targets)
        height, width = tile[0].shape
        product = buffer[: len(tile), :height, :width]
        for out, (left, right) in zip(product, products[some], strict=True):
            torch.mm(left[part[0]], right[:, part[1]], out=out)
        grad_tile = phi = None
        if factor is not None:
            grad_tile = _dense_rows([grad[part] for grad in grads[some]])
            phi = factor[some, part[0] if channels_are_rows else part[1]]
        _native.update(
            param=_matrices(tile),
            product=_matrices(product),
            grad=None if grad_tile is None else _matrices(grad_tile),
            factor=None if phi is None else _addresses(phi),
            rows=height,
            cols=width,
            channels_are_rows=channels_are_rows,
            step_size=step_size,
            decay=decay,
            rho=rho,
            salts=None if salts is None else salts[some],
            step=step,
            first_row=row,
            first_col=col,
            **_place(product),
        )
        if tile is not targets:
            torch._foreach_copy_(targets, tile)


def _group_size(device_type: str, elements: int) -> int:
    return max(1, TILE_ELEMENTS[device_type] // max(1, elements))


def _channels_at_once(device_type: str, depth: int) -> int:
    return max(1, TILE_ELEMENTS[device_type] // max(1, depth))


def _tile_shape(count: int, rows: int, cols: int, device_type: str) -> tuple[int, int, int]:
    """Matrices, rows and cols of a tile."""
    elements = TILE_ELEMENTS[device_type]
    tile_rows = max(1, min(rows, max(TILE_ROWS[device_type], elements // max(1, cols))))
    tile_cols = max(1, min(cols, elements // tile_rows // ALIGNED_ELEMENTS * ALIGNED_ELEMENTS))
    return min(count, max(1, elements // (tile_rows * tile_cols))), tile_rows, tile_cols


def _product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Of the products with a gradient or for a weight: CPUs hardly have any in float16."""
    return torch.float32 if dtype is torch.float16 and device_type == "cpu" else dtype


def _project(grad: Tensor, basis: Tensor, side: Side, projected: Tensor) -> None:
    if side is Side.LEFT:
        torch.mm(basis.T, grad, out=projected)
    else:
        torch.mm(grad, basis, out=projected)


def _project_in_blocks(
    grad: Tensor,
    basis: Tensor,
    side: Side,
    kappa: float | None,
    projected: Tensor,
    residual_sq: Tensor,
) -> None:
    """R in float32 of any gradient, a few channels at a time; with kappa also |e|^2, literally."""
    basis, axis = basis.float(), 1 - rank_axis(side)
    channels = grad.shape[axis]
    at_once = _channels_at_once(grad.device.type, grad.shape[1 - axis])
    shape = list(grad.shape)
    shape[axis] = min(channels, at_once)
    buffer = grad.new_empty(shape, dtype=torch.float32)
    for first in range(0, channels, at_once):
        size = min(at_once, channels - first)
        block = buffer.narrow(axis, 0, size)
        block.copy_(grad.narrow(axis, first, size))
        low = projected.narrow(axis, first, size)
        _project(block, basis, side, low)
        if kappa is not None:
            left, right = (basis, low) if side is Side.LEFT else (low, basis.T)
            block.addmm_(left, right, alpha=-kappa)
            _residual_sums([block], side, residual_sq[None, first : first + size], None, 0.0)


def _residual_sums(
    matrices: Sequence[Tensor],
    side: Side,
    residual_sq: Tensor,
    projected_sq: Tensor | None,
    kappa: float,
) -> None:
    """|g|^2 of each channel, less what R holds of it, by the identity of `ChannelSums`."""
    channels_are_rows = side is Side.RIGHT
    if not _rows_are_dense(matrices[0]):
        matrices = [matrix.T for matrix in matrices]
        channels_are_rows = not channels_are_rows
    rows, cols = matrices[0].shape
    _native.residual_sums(
        matrix=_matrices(matrices),
        residual_sq=_addresses(residual_sq),
        projected_sq=None if projected_sq is None else _addresses(projected_sq),
        rows=rows,
        cols=cols,
        channels_are_rows=channels_are_rows,
        kappa=kappa,
        **_place(residual_sq),
    )


def _combined(
    projection: Projection,
    factor: Tensor | None,
    side: Side,
    scale: float,
    rho_kappa: float,
    dtype: torch.dtype,
) -> Tensor:
    """B = scale N - rho kappa phi' (x) R of each matrix, ready for the product."""
    direction, projected = projection.direction.contiguous(), projection.projected.contiguous()
    factor = None if factor is None else factor.contiguous()
    count, rows, cols = direction.shape
    combined = _aligned_empty(count, rows, cols, dtype, direction.device)
    _native.combine(
        direction=_addresses(direction),
        projected=_addresses(projected),
        factor=None if factor is None else _addresses(factor),
        combined=_matrices(combined),
        rows=rows,
        cols=cols,
        channels_are_rows=side is Side.RIGHT,
        scale=scale,
        rho_kappa=rho_kappa,
        **_place(direction),
    )
    return combined


def _aligned_empty(
    count: int, rows: int, cols: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """count x rows x cols; each row starts at a cache line."""
    stride = _aligned(cols)
    whole = torch.empty(count, rows, stride, dtype=dtype, device=device)
    return whole if stride == cols else whole[:, :, :cols]


def _aligned(cols: int) -> int:
    return -(-cols // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS


def _rows_are_dense(matrix: Tensor) -> bool:
    """A pass can walk along its rows: elements of one are adjacent, and rows do not overlap."""
    (rows, cols), (row_stride, col_stride) = matrix.shape, matrix.stride()
    return (col_stride == 1 or cols <= 1) and (row_stride >= cols or rows <= 1)


def _dense_rows(tiles: list[Tensor]) -> list[Tensor]:
    """The tiles, or copies that a pass can walk along."""
    return tiles if _rows_are_dense(tiles[0]) else [tile.contiguous() for tile in tiles]


def _addresses(tensors: Sequence[Tensor] | Tensor) -> list[int]:
    if isinstance(tensors, Tensor):
        # Stacked: to take such a tensor apart costs microseconds a matrix.
        first, step = tensors.data_ptr(), tensors.stride(0) * tensors.itemsize
        return [first + index * step for index in range(tensors.shape[0])]
    return [tensor.data_ptr() for tensor in tensors]


def _matrices(matrices: Sequence[Tensor] | Tensor) -> tuple[list[int], int, int]:
    first = matrices if isinstance(matrices, Tensor) else matrices[0]
    return _addresses(matrices), _CODES[first.dtype], max(first.stride(-2), first.shape[-1])


def _place(tensor: Tensor) -> dict[str, int]:
    """Where a pass runs: on torch's threads, or on the current stream of the tensor's device."""
    place = {"threads": torch.get_num_threads()}
    if tensor.device.type == "cuda":
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        place.update(device=tensor.device.index, stream=stream)
    return place


def _check_float32(name: str, tensor: Tensor) -> None:
    if tensor.dtype is not torch.float32:
        raise TypeError(f"the native backend keeps float32 state, {name} is {tensor.dtype}")
