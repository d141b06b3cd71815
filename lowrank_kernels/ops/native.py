"""torch's matrix products, and one compiled pass over memory before, between and after them.

The passes are in `lowrank_kernels._native`. Operation 3 works tile by tile: the product of a tile
goes to a small buffer, and one pass reads it with W and G and writes W. So W is read, written and
rounded once, and nothing of W's size is allocated.
"""

import importlib.util
import itertools
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .codes import Stored, stored_of
from .contract import (
    MAX_KAPPA_HALF_PRECISION,
    AdamScalars,
    ChannelSums,
    Matrices,
    Projection,
    Residual,
    Scalar,
    Scalars,
    Side,
    rank_axis,
)
from .dry import device_type
from .noise import MOMENTS_SALT
from .products import (
    factors,
    fast_in_half,
    matrices_in_workspace,
    product_dtype,
    project,
    rows_are_dense,
    rows_or_columns_are_dense,
    squarable,
)

import_error: str | None = None
try:
    from .. import _native
except ImportError as error:
    # Python would take a module that is not there for one that is imported in a circle.
    import_error = str(error)
    if importlib.util.find_spec("lowrank_kernels._native") is None:
        import_error = "it was not built, as with LOWRANK_NATIVE=off"

# Of moments that the operations take as they are stored.
MOMENTS = (torch.float32, torch.float64, torch.bfloat16, torch.int8)

# A batch on a CPU holds at most this many elements of W.
BATCH_ELEMENTS = 2**20

# Of a gradient that is copied, in float32, at a time. The number for CUDA was not measured.
BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**23}

# A tile's product stays in the cache of the cores. Its rows are whole, which the passes like best,
# unless that left fewer than TILE_ROWS of them: too few for the products to run at full speed. The
# numbers for CUDA were not measured.
TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**23}
TILE_ROWS = {"cpu": 128, "cuda": 4096}

# Rows of products start at cache lines: odd strides cost MKL a third of its speed, and its bits may
# depend on alignment, which must not differ with the group.
ALIGNED_ELEMENTS = 32

_TRANSPOSED = attrgetter("T")
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def build_info() -> dict[str, Any]:
    """What the compiled module was built with and runs on; empty if it does not load."""
    return _native.build_info() if import_error is None else {}


class _NoPasses:
    """In the place of the compiled passes on the meta device, where only allocations count."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda **_: None


def batch_size(param: Tensor, grad: Tensor, rank: int) -> int:
    """Matrices a batch: as many as a cache holds, or a GPU's workspace with R, N, B and R again."""
    if device_type(param) == "cuda":
        return matrices_in_workspace(param.device, 16 * rank * max(param.shape))
    return max(1, BATCH_ELEMENTS // max(1, param.numel()))


class Operations:
    """See `contract.Operations`.

    Raises:
        TypeError: the moments are float64.
    """

    def __init__(self, matrices: Matrices) -> None:
        side, residual = matrices.side, matrices.residual
        param, grad, moment = matrices.params[0], matrices.grads[0], matrices.exp_avgs[0]
        if moment.dtype not in _FORMATS:
            raise TypeError(f"the native backend has no float64, exp_avg is {moment.dtype}")
        self._passes: Any = _NoPasses() if param.is_meta else _native
        self._device, device = param.device, device_type(param)
        self._channels_are_rows = side is Side.RIGHT
        self._has_format = moment.dtype is not torch.float32
        self._low_shape = (len(matrices.params), *moment.shape)

        dense = rows_or_columns_are_dense(grad)
        half = min(grad.itemsize, matrices.bases[0].itemsize) < 4 or not matrices.orthonormal
        self._forms_residual = residual is not None and (
            not dense or (half and residual.kappa > MAX_KAPPA_HALF_PRECISION)
        )
        converts = product_dtype(grad.dtype, device) is not grad.dtype
        self._forms_residual_in_half = self._forms_residual and fast_in_half(
            grad, matrices.bases[0], device
        )
        in_float32 = self._forms_residual and not self._forms_residual_in_half
        self._projects_in_blocks = in_float32 or converts or not dense
        self._block_elements = BLOCK_ELEMENTS[device]
        dtype = torch.float32 if self._projects_in_blocks else grad.dtype
        aligned = dtype is torch.float32 and moment.shape[1] % ALIGNED_ELEMENTS == 0
        self._product_of: torch.dtype | None = None if aligned else dtype

        self._grads_turned = not rows_are_dense(grad)
        # The passes walk along rows: a W whose columns are dense is updated as its transpose.
        self._turned = not rows_are_dense(param) and rows_are_dense(param.T)
        target, source = (param.T, grad.T) if self._turned else (param, grad)
        self._copies_params = not rows_are_dense(target)
        self._copies_grads = not rows_are_dense(source)
        self._product_dtype = product_dtype(param.dtype, device)
        self._is_one_product = (
            residual is None
            and matrices.salts is None
            and not self._copies_params
            and self._product_dtype is param.dtype
        )
        self._counts_versions = not param.is_inference()
        count, rows, cols = len(matrices.params), target.shape[0], target.shape[1]
        tile = _tile_shape(count, rows, cols, device)
        self._parts = _parts(count, rows, cols, tile)
        self._tile, self._aligned = _aligned(*tile), _aligned(*self._low_shape)

    def project_moments(
        self, matrices: Matrices, adam: AdamScalars, step: int | Tensor = 0
    ) -> Projection:
        correction1, correction2 = _numbers(
            bias_correction1=adam.bias_correction1, bias_correction2=adam.bias_correction2
        )
        residual = matrices.residual
        count, rows, cols = self._low_shape
        projected = torch.empty(self._low_shape, dtype=torch.float32, device=self._device)
        direction = torch.empty_like(projected)
        sums = None
        if residual is not None:
            sums = ChannelSums(*projected.new_empty(3, count, (cols, rows)[matrices.side]))
        products: list[Tensor] | Tensor = matrices.grads
        if not matrices.projected:
            products = self._projected(matrices, projected, sums)
        self._passes.adam_moments(
            product=_arguments(products),
            projected=_addresses(projected),
            exp_avg=list(map(Tensor.data_ptr, matrices.exp_avgs)),
            exp_avg_sq=list(map(Tensor.data_ptr, matrices.exp_avg_sqs)),
            direction=_addresses(direction),
            direction_sq=None if sums is None else _addresses(sums.direction),
            projected_sq=None if sums is None else _addresses(sums.projected),
            rows=rows,
            cols=cols,
            channels_are_rows=self._channels_are_rows,
            beta1=adam.beta1,
            beta2=adam.beta2,
            eps=adam.eps,
            bias_correction1=correction1,
            bias_correction2=correction2,
            **(
                _format(stored_of(matrices), matrices.moment_salts, step)
                if self._has_format
                else {}
            ),
            **self._place(),
        )
        if sums is not None and self._forms_residual_in_half:
            assert isinstance(products, Tensor)
            self._form_residuals(matrices, products, projected, sums.residual)
        elif residual is not None and sums is not None and not self._forms_residual:
            grads, turned = matrices.grads, self._grads_turned
            if turned:
                grads = list(map(_TRANSPOSED, grads))
            own = (sums.residual, sums.projected, residual.kappa)
            self._residual_sums(grads, self._channels_are_rows is not turned, *own)
        return Projection(direction, projected, sums)

    def _projected(self, matrices: Matrices, projected: Tensor, sums: ChannelSums | None) -> Tensor:
        """R of each matrix: in `projected`, or of another dtype or with rows at cache lines."""
        pairs, products = zip(matrices.grads, matrices.bases, strict=True), projected
        if self._product_of is not None:
            products = torch.empty_strided(
                *self._aligned, dtype=self._product_of, device=self._device
            )
        if self._projects_in_blocks:
            residual = matrices.residual if self._forms_residual else None
            for index, (grad, basis) in enumerate(pairs):
                outside = None if sums is None else sums.residual[index]
                own = (residual, products[index], outside)
                self._project_in_blocks(grad, basis, matrices.side, *own)
            return products
        for (grad, basis), product in zip(pairs, products.unbind(), strict=True):
            # The call alone costs a microsecond where there is nothing to convert.
            basis = basis if basis.dtype is grad.dtype else basis.to(grad.dtype)
            if matrices.side is Side.LEFT:
                torch.mm(basis.T, grad, out=product)
            else:
                torch.mm(grad, basis, out=product)
        return products

    def channel_scale(self, matrices: Matrices, sums: ChannelSums) -> Tensor:
        factor = torch.empty_like(sums.direction)
        self._passes.channel_scale(
            direction_sq=_addresses(sums.direction),
            projected_sq=_addresses(sums.projected),
            residual_sq=_addresses(sums.residual),
            limiter_norm=list(map(Tensor.data_ptr, matrices.limiter_norms)),
            factor=_addresses(factor),
            channels=factor.shape[1],
            **self._place(),
        )
        return factor

    def back_project_update(
        self,
        matrices: Matrices,
        projection: Projection,
        factor: Tensor | None,
        scalars: Scalars,
    ) -> None:
        step_size, decay, step = _numbers(
            step_size=scalars.step_size, decay=scalars.decay, step=scalars.step
        )
        low, bases = self._combined(matrices, projection, factor, scalars.scale), matrices.bases
        if bases[0].dtype is not low.dtype:
            bases = [basis.to(low.dtype) for basis in bases]
        if matrices.side is Side.LEFT:
            lefts, rights = bases, list(low.unbind())
        else:
            lefts, rights = list(low.unbind()), list(map(_TRANSPOSED, bases))
        if self._is_one_product:
            # Of GaLore's update nothing is left but a product, which BLAS adds to W as it goes.
            for param, left, right in zip(matrices.params, lefts, rights, strict=True):
                param.addmm_(left, right, beta=1 - decay, alpha=-(1 - decay) * step_size)
            return
        if self._turned:
            lefts, rights = list(map(_TRANSPOSED, rights)), list(map(_TRANSPOSED, lefts))
        self._update_in_tiles(matrices, lefts, rights, factor, step_size, decay, int(step))
        if self._counts_versions:
            increment_version(matrices.params)

    def _combined(
        self, matrices: Matrices, projection: Projection, factor: Tensor | None, scale: float
    ) -> Tensor:
        """B = scale N - rho kappa phi' (x) R of each matrix, ready for the product."""
        residual = matrices.residual
        combined = torch.empty_strided(
            *self._aligned, dtype=self._product_dtype, device=self._device
        )
        self._passes.combine(
            direction=_addresses(projection.direction),
            projected=_addresses(projection.projected),
            factor=None if factor is None else _addresses(factor),
            combined=_arguments(combined),
            rows=self._low_shape[1],
            cols=self._low_shape[2],
            channels_are_rows=self._channels_are_rows,
            scale=scale,
            rho_kappa=0.0 if residual is None else residual.rho * residual.kappa,
            **self._place(),
        )
        return combined

    def _update_in_tiles(
        self,
        matrices: Matrices,
        lefts: list[Tensor],
        rights: list[Tensor],
        factor: Tensor | None,
        step_size: float,
        decay: float,
        step: int,
    ) -> None:
        """A tile of a few matrices at a time: their products into a buffer, then a pass over W."""
        params, salts = matrices.params, matrices.salts
        # Without a residual they are not read, and may be R.
        grads = [] if factor is None else matrices.grads
        channels_are_rows = self._channels_are_rows is not self._turned
        if self._turned:
            params, grads = list(map(_TRANSPOSED, params)), list(map(_TRANSPOSED, grads))
        buffer = torch.empty_strided(*self._tile, dtype=self._product_dtype, device=self._device)
        for some, height, width, part in self._parts:
            targets, sources, left, right = params[some], grads[some], lefts[some], rights[some]
            product, phi = buffer[: len(targets)], None if factor is None else factor[some]
            if part is not None:
                rows, cols = part
                targets = [target[part] for target in targets]
                sources = [source[part] for source in sources]
                left, right = [one[rows] for one in left], [one[:, cols] for one in right]
                product = product[:, :height, :width]
                phi = None if phi is None else phi[:, rows if channels_are_rows else cols]
            for one in zip(left, right, product.unbind(), strict=True):
                torch.mm(*one[:2], out=one[2])
            tile = [target.contiguous() for target in targets] if self._copies_params else targets
            if phi is not None and self._copies_grads:
                sources = [source.contiguous() for source in sources]
            self._passes.update(
                param=_arguments(tile),
                product=_arguments(product),
                grad=None if phi is None else _arguments(sources),
                factor=None if phi is None else _addresses(phi),
                rows=height,
                cols=width,
                channels_are_rows=channels_are_rows,
                step_size=step_size,
                decay=decay,
                rho=0.0 if matrices.residual is None else matrices.residual.rho,
                salts=None if salts is None else salts[some],
                step=step % 2**32,
                first_row=0 if part is None else part[0].start,
                first_col=0 if part is None else part[1].start,
                **self._place(),
            )
            if tile is not targets:
                torch._foreach_copy_(targets, tile)

    def _project_in_blocks(
        self,
        grad: Tensor,
        basis: Tensor,
        side: Side,
        residual: Residual | None,
        projected: Tensor,
        residual_sq: Tensor | None,
    ) -> None:
        """R in float32 of any gradient, a few channels at a time; |e|^2, literally, if asked."""
        basis, axis = basis.float(), 1 - rank_axis(side)
        shape, blocks = self._channel_blocks(grad, axis)
        buffer = grad.new_empty(shape, dtype=torch.float32)
        for first, size in blocks:
            block = buffer.narrow(axis, 0, size)
            block.copy_(grad.narrow(axis, first, size))
            low = projected.narrow(axis, first, size)
            project(block, basis, side, low)
            if residual is not None and residual_sq is not None:
                # What is left out of R stays in the residual, which is then left out itself.
                low.mul_(squarable(low))
                block.addmm_(*factors(low, basis, side), alpha=-residual.kappa)
                own = residual_sq[None, first : first + size]
                self._residual_sums([block], self._channels_are_rows, own)

    def _form_residuals(
        self, matrices: Matrices, products: Tensor, projected: Tensor, residual_sq: Tensor
    ) -> None:
        """|e|^2 of each channel, literally, a few channels at a time in the gradients' dtype.

        Rounded are R, as `products` held it, and e, relative to itself: what cancels is not.
        """
        side, axis = matrices.side, 1 - rank_axis(matrices.side)
        kappa = 0.0 if matrices.residual is None else matrices.residual.kappa
        shape, blocks = self._channel_blocks(matrices.grads[0], axis)
        dtype = matrices.grads[0].dtype
        buffer = torch.empty_strided(*_aligned(1, *shape), dtype=dtype, device=self._device)[0]
        # The same R, but for entries that were left out.
        products.copy_(projected)
        each = zip(matrices.grads, matrices.bases, products.unbind(), residual_sq, strict=True)
        for grad, basis, low, total in each:
            for first, size in blocks:
                block, part = buffer.narrow(axis, 0, size), grad.narrow(axis, first, size)
                pair = factors(low.narrow(axis, first, size), basis, side)
                torch.addmm(part, *pair, alpha=-kappa, out=block)
                own = total[None, first : first + size]
                self._residual_sums([block], self._channels_are_rows, own)

    def _channel_blocks(
        self, grad: Tensor, axis: int
    ) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """The shape of a few channels of a gradient, and of each few the first and how many."""
        channels, depth = grad.shape[axis], grad.shape[1 - axis]
        at_once = max(1, self._block_elements // max(1, depth))
        largest = min(channels, at_once)
        blocks = [(first, min(at_once, channels - first)) for first in range(0, channels, at_once)]
        return ((depth, largest) if axis else (largest, depth)), blocks

    def _place(self) -> dict[str, int]:
        """Where a pass runs: torch's threads, or the current stream of the batch's device."""
        place = {"threads": torch.get_num_threads()}
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device).cuda_stream
            place.update(device=self._device.index, stream=stream)
        return place

    def _residual_sums(
        self,
        grads: list[Tensor],
        channels_are_rows: bool,
        residual_sq: Tensor,
        projected_sq: Tensor | None = None,
        kappa: float = 0.0,
    ) -> None:
        """|g|^2 of each channel, less what R holds of it, by the identity of `ChannelSums`."""
        rows, cols = grads[0].shape
        self._passes.residual_sums(
            matrix=_arguments(grads),
            residual_sq=_addresses(residual_sq),
            projected_sq=None if projected_sq is None else _addresses(projected_sq),
            rows=rows,
            cols=cols,
            channels_are_rows=channels_are_rows,
            kappa=kappa,
            **self._place(),
        )


def serves_adamw(param: Tensor, grad: Tensor, stored: Stored, scalars: Scalars) -> bool:
    """Whether `adamw` does: on a CPU, by scalars that the host knows."""
    adam = scalars.adam
    numbers = (*scalars[1:], adam.bias_correction1, adam.bias_correction2)
    return (
        import_error is None
        and param.device.type == "cpu"
        and param.dtype in _CODES
        and grad.dtype in _CODES
        and stored.exp_avg.dtype in _FORMATS
        and not any(isinstance(number, Tensor) for number in numbers)
    )


def adamw(param: Tensor, grad: Tensor, stored: Stored, scalars: Scalars, salt: int) -> None:
    """See `adamw.adamw`, for tensors on a CPU.

    Raises:
        TypeError: a scalar is a tensor.
    """
    step_size, decay, correction1, correction2 = _numbers(
        step_size=scalars.step_size,
        decay=scalars.decay,
        bias_correction1=scalars.adam.bias_correction1,
        bias_correction2=scalars.adam.bias_correction2,
    )
    elements = param.numel()
    _native.adamw(
        param=([param.data_ptr()], _CODES[param.dtype], elements),
        grad=([grad.data_ptr()], _CODES[grad.dtype], elements),
        exp_avg=[stored.exp_avg.data_ptr()],
        exp_avg_sq=[stored.exp_avg_sq.data_ptr()],
        elements=elements,
        step_size=step_size,
        decay=decay,
        beta1=scalars.adam.beta1,
        beta2=scalars.adam.beta2,
        eps=scalars.adam.eps,
        bias_correction1=correction1,
        bias_correction2=correction2,
        **_format([stored], (salt,), scalars.step),
        threads=torch.get_num_threads(),
    )
    if not param.is_inference():
        increment_version(param)


def _format(
    moments: list[Stored], salts: tuple[int, ...] | None, step: int | Tensor
) -> dict[str, Any]:
    """How M and V are held, where their scales are, and what rounds V.

    Raises:
        TypeError: V draws by a step that is a tensor.
    """
    first = moments[0]
    arguments: dict[str, Any] = {"format": _FORMATS[first.exp_avg.dtype]}
    if first.exp_avg.dtype is torch.int8:
        for name in ("exp_avg_scale", "exp_avg_sq_scale"):
            arguments[name] = [getattr(stored, name).data_ptr() for stored in moments]
    if salts is not None and first.exp_avg.dtype is not torch.float32:
        (number,) = _numbers(step=step)
        arguments["moment_salts"] = [(salt + MOMENTS_SALT) % 2**32 for salt in salts]
        arguments["step"] = int(number) % 2**32
    return arguments


def _numbers(**scalars: Scalar) -> list[float]:
    """The scalars.

    Raises:
        TypeError: one is a tensor.
    """
    numbers: list[float] = []
    for name, scalar in scalars.items():
        if isinstance(scalar, Tensor):
            raise TypeError(f"{name} is a tensor, which the native backend does not take")
        numbers.append(scalar)
    return numbers


def _tile_shape(count: int, rows: int, cols: int, device_type: str) -> tuple[int, int, int]:
    """Matrices, rows and cols of a tile."""
    elements = TILE_ELEMENTS[device_type]
    tile_rows = max(TILE_ROWS[device_type], elements // max(1, cols))
    tile_rows = max(1, min(rows, tile_rows // ALIGNED_ELEMENTS * ALIGNED_ELEMENTS))
    tile_cols = max(1, min(cols, elements // tile_rows // ALIGNED_ELEMENTS * ALIGNED_ELEMENTS))
    return min(count, max(1, elements // (tile_rows * tile_cols))), tile_rows, tile_cols


def _parts(
    count: int, rows: int, cols: int, tile: tuple[int, int, int]
) -> list[tuple[slice, int, int, tuple[slice, slice] | None]]:
    """Of a batch, tile by tile: which matrices, rows and cols of the tile, and where it lies in
    them; None for all of them.
    """
    at_once, tile_rows, tile_cols = tile
    starts = (range(0, size, step) for size, step in zip((count, rows, cols), tile, strict=True))
    parts = []
    for first, row, col in itertools.product(*starts):
        height, width = min(tile_rows, rows - row), min(tile_cols, cols - col)
        part = (slice(row, row + height), slice(col, col + width))
        whole = (height, width) == (rows, cols)
        parts.append((slice(first, first + at_once), height, width, None if whole else part))
    return parts


def _aligned(count: int, rows: int, cols: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of stacked matrices whose rows start at cache lines."""
    stride = -(-cols // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS
    return (count, rows, cols), (rows * stride, stride, 1)


def _addresses(tensors: list[Tensor] | Tensor) -> list[int]:
    """Of each matrix; of stacked ones too, which to take apart costs microseconds a matrix."""
    if isinstance(tensors, list):
        return list(map(Tensor.data_ptr, tensors))
    # Empty ones may be no distance apart, which is no step of a range.
    first, step = tensors.data_ptr(), max(1, tensors.stride(0)) * tensors.itemsize
    return list(range(first, first + step * len(tensors), step))


def _arguments(matrices: list[Tensor] | Tensor) -> tuple[list[int], int, int]:
    """Of matrices with dense rows: their addresses, the code of their dtype, their row stride."""
    first = matrices if isinstance(matrices, Tensor) else matrices[0]
    return _addresses(matrices), _CODES[first.dtype], max(first.stride(-2), first.shape[-1])
