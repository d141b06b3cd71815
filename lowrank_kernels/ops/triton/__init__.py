"""The Triton backend: two launches a batch for GaLore, three for Fira, four where half precision
has B formed by itself, and no temporary of W's size.

In the channel coordinates of `project`, both sides are the same kernels with strides swapped.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import (
    CHANNELS_A_SCALE,
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
from ..foreach import channels_of_block, residual_sq_in
from ..noise import MOMENTS_SALT
from ..notices import notice_once
from ..products import matrices_in_workspace
from ..reference import LIMITER_GROWTH, NORM_EPS, NOTHING_STORED, STORABLE_SHARE
from .addresses import Addresses, addresses_of, current_stream, device_table, keep_for_graphs
from .combine import combine_kernel
from .config import (
    COMBINE_TILE,
    COMBINE_WARPS,
    LARGEST_TILE,
    MOMENTS_RANK,
    MOMENTS_WARPS,
    PAD_BLOCK,
    PAD_FROM,
    PAD_WARPS,
    SCALE_BLOCK,
    SCALE_SWEEP,
    SCALE_WARPS,
    Config,
    Problem,
    config_of,
    forced,
    gpu_of,
    sources,
)
from .launch import Grid, Launcher, Rest
from .moments import moments_kernel
from .pad import pad_rows_kernel
from .project import project_kernel
from .scale import channel_scale_kernel
from .update import resident_update_kernel, update_kernel

__all__ = ["Operations", "batch_size", "forced", "obstacle", "sources"]

# Of moments that the operations take as they are stored.
MOMENTS = (torch.float32, torch.bfloat16, torch.int8)

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def obstacle(param: Tensor, grad: Tensor) -> str | None:
    """Why the kernels do not serve these matrices, None if they do.

    They would be right for any weight of short strides, but slow for one that is not dense: its
    lines are read in full, whatever share of them is the weight's.
    """
    if not (param.is_contiguous() or param.T.is_contiguous()):
        return f"the triton backend takes dense weights, not strides {param.stride()}"
    for name, matrix in (("weight", param), ("gradient", grad)):
        if LARGEST_TILE * sum(map(abs, matrix.stride())) >= 2**31:
            return (
                f"the triton backend has 32-bit offsets within {LARGEST_TILE} rows and columns,"
                f" too few for the strides {matrix.stride()} of the {name}"
            )
    # The strides of what has the size of R or of a copy with padding.
    if LARGEST_TILE * max(param.shape) >= 2**31:
        return (
            f"the triton backend has 32-bit offsets within {LARGEST_TILE} rows and columns, too few"
            f" for the moments of a weight of shape {tuple(param.shape)}"
        )
    return None


def batch_size(param: Tensor, grad: Tensor, rank: int) -> int:
    """As many matrices as have room in a workspace, at least 1.

    A launch of many tiles leaves few processors without work in its last wave. That G could stay in
    L2 from operation 1 to 3 is not counted on: M, V, N and R pass through in between.
    """
    each = (4 + 4 + param.itemsize) * max(param.shape) * rank  # N, R and B
    if _rows(grad, PAD_FROM) is not None:
        each += grad.itemsize * grad.numel()
    return matrices_in_workspace(param.device, each)


class _Low(NamedTuple):
    """Where stacked matrices of R's shape have their elements."""

    shape: tuple[int, int, int]
    strides: tuple[int, int, int]  # of matrices, along the channels and along the directions
    sizes: tuple[int, int]  # along the channels and the directions, with the padding


def _low(matrices: int, rows: int, cols: int, side: Side) -> _Low:
    across, along = ((cols, rows), (1, cols)), ((rows, cols), (cols, 1))
    sizes, strides = across if side is Side.LEFT else along
    return _Low((matrices, rows, cols), (rows * cols, *strides), sizes)


def rereads_gradients(device: torch.device) -> bool:
    """Whether operation 1 has to read what it squares anew, and not with its product.

    On sm_90 a product reads shared memory while the next instructions run. Triton, 3.6 to 3.9,
    keeps a slot for that, but only of tiles which nothing else reads: over another it copies the
    next tile while a product still reads it. Elsewhere the second load is of no use, and spills.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _scales(matrices: Matrices) -> tuple[Sequence[Tensor], ...]:
    """Of M and of V, where those are codes."""
    coded = matrices.exp_avgs[0].dtype is torch.int8
    return (matrices.exp_avg_scales, matrices.exp_avg_sq_scales) if coded else ()


class _Rows(NamedTuple):
    """Of gradients, the lines along which they are contiguous, and of their copies."""

    lines: int
    length: int
    pitch: int
    padded: int
    strides: tuple[int, int]  # of a copy, as the gradient's axes are
    sizes: tuple[int, int]


def _rows(grad: Tensor, matrices: int) -> _Rows | None:
    """What is copied with padding: large batches in half precision with rows at odd places."""
    # Of a single row both strides can be 1.
    along = max((0, 1), key=lambda axis: (grad.stride()[axis] == 1, grad.shape[axis]))
    length, count, pitch = grad.shape[along], grad.shape[1 - along], grad.stride(1 - along)
    if grad.itemsize > 2 or pitch % 16 == 0 or matrices * grad.numel() < PAD_FROM:
        return None
    padded = -(-length // 16) * 16
    strides, sizes = (
        ((1, padded), (padded, count)) if along == 0 else ((padded, 1), (count, padded))
    )
    return _Rows(count, length, pitch, padded, strides, sizes)


def _stacked(copy: Tensor) -> Addresses:
    """Where stacked matrices lie, whose rows are padded."""
    matrices, rows, padded = copy.shape
    table = tuple(range(0, matrices * rows * padded // 16, rows * padded // 16))
    return Addresses(copy, device_table(table, copy.device), 16)


class _Tiles(NamedTuple):
    """How operations 1 and 3 are cut up."""

    project: Config
    update: Config
    project_grid: Grid
    update_grid: Grid
    slots: int  # rank tiles of operation 1, with channel sums of their own


class Operations:
    """See `contract.Operations`; the channel sums come as slots, one row a rank tile.

    On the meta device they allocate what they do on a GPU, and launch nothing.
    """

    def __init__(self, matrices: Matrices) -> None:
        param, basis = matrices.params[0], matrices.bases[0]
        # Operation 3 does not read what arrives projected, and takes it for gradients like weights.
        grad = param if matrices.projected else matrices.grads[0]
        moment, axis = matrices.exp_avgs[0], rank_axis(matrices.side)
        self._device = param.device
        self._problem = Problem(
            matrices.side,
            channels=param.shape[1 - axis],
            depth=param.shape[axis],
            rank=basis.shape[1],
            matrices=len(matrices.params),
            dtypes=(grad.dtype, basis.dtype),
            residual=matrices.residual is not None,
            moments=moment.dtype,
        )
        rows, cols = moment.shape
        self._low = _low(len(matrices.params), rows, cols, matrices.side)
        self._coded = moment.dtype is torch.int8
        # Along groups of channels and along the directions.
        groups = triton.cdiv(self._problem.channels, CHANNELS_A_SCALE)
        self._scale_strides = (1, groups) if matrices.side is Side.LEFT else (cols, 1)
        self._moment_salts: tuple[int, ...] | None = None
        if matrices.moment_salts is not None and moment.dtype is not torch.float32:
            self._moment_salts = tuple(salt + MOMENTS_SALT for salt in matrices.moment_salts)
        self._empty = torch.empty(0, dtype=matrices.dtype, device=param.device).new_empty
        # What operation 3 multiplies by a basis in half precision: rows at multiples of 16 bytes.
        self._padded = _low(len(matrices.params), rows, -(-cols // 16) * 16, matrices.side)
        self._empty_half = torch.empty(0, dtype=basis.dtype, device=param.device).new_empty
        self._half = basis.dtype.itemsize < 4
        self._copies_grads = not matrices.projected and 1 not in grad.stride()
        if self._copies_grads:
            notice_once(
                logging.WARNING,
                f"gradients with strides {grad.stride()} are copied at every step: the triton"
                " backend reads rows or columns that are contiguous",
            )
        (readable,) = self._readable([grad])
        self._rows = None if matrices.projected else _rows(readable, len(matrices.grads))
        pitches, sizes = readable.stride(), tuple(readable.shape)
        if self._rows is not None:
            pitches, sizes = self._rows.strides, self._rows.sizes
        # Along the channels and along the other axis.
        self._grad_strides, self._grad_sizes, self._param_strides = (
            (pair[1 - axis], pair[axis]) for pair in (pitches, sizes, param.stride())
        )
        self._placed: tuple[int | None, list[int]] | None = None
        self._tiles = [self._cut(matrices, wide) for wide in (False, True)]
        self._arrived: Tensor | None = None
        self._pad = Launcher(pad_rows_kernel, param.device)
        self._project = Launcher(project_kernel, param.device)
        self._moments = Launcher(moments_kernel, param.device)
        self._scale = Launcher(channel_scale_kernel, param.device)
        self._combine = Launcher(combine_kernel, param.device)
        self._update = Launcher(update_kernel, param.device)
        self._resident = Launcher(resident_update_kernel, param.device)

    def _cut(self, matrices: Matrices, wide: bool) -> _Tiles:
        """The tiles for gradients that are wide (see `Addresses`) or not."""

        def all_wide(*roles: Sequence[Tensor]) -> bool:
            return wide and all(addresses_of(tensors).wide for tensors in (matrices.bases, *roles))

        problem, gpu = self._problem, gpu_of(self._device)

        def even(*pitches: int) -> bool:
            return all(pitch % 16 == 0 for pitch in (*pitches, problem.rank))

        grads, params = max(self._grad_strides), max(self._param_strides)
        one = problem._replace(
            wide=all_wide(matrices.exp_avgs, matrices.exp_avg_sqs, *_scales(matrices)),
            even=even(grads, self._low.shape[-1]),
        )
        three = problem._replace(
            wide=all_wide(matrices.params),
            even=even(grads, params),
            dtypes=(matrices.bases[0].dtype,) * 2,
        )
        project, update = config_of("project", one, gpu), config_of("update", three, gpu)
        slots = triton.cdiv(problem.rank, project.rank)
        rows = problem.matrices * triton.cdiv(problem.channels, project.channels)
        tiles = problem.matrices * triton.cdiv(problem.channels, update.channels)
        if update.resident:
            grid = tiles, update.split, 1
        else:
            grid = tiles * triton.cdiv(problem.depth, update.depth), 1, 1
        return _Tiles(project, update, (rows * slots, project.split, 1), grid, slots)

    @property
    def tiles(self) -> tuple[Config, Config]:
        """Of operations 1 and 3 where matrices begin at multiples of 16 bytes.

        In whatever number of parts is the same code: 2 stand for more.
        """
        one, three = self._tiles[True].project, self._tiles[True].update
        return one._replace(split=min(one.split, 2)), three._replace(split=min(three.split, 2))

    def project_moments(
        self, matrices: Matrices, adam: AdamScalars, step: int | Tensor = 0
    ) -> Projection:
        if matrices.projected:
            return self._step_moments(matrices, adam, step)
        problem, residual = self._problem, matrices.residual
        stream, grads = current_stream(self._device), self._readable(matrices.grads)
        base, offsets, unit = located = self._located(grads, stream)
        copy = None
        if self._rows is not None:
            copy = self._copied(self._rows, located, stream)
            base, offsets, unit = located = _stacked(copy)
        tiles = self._tiles[located.wide]
        config, (programs, split, _) = tiles.project, tiles.project_grid
        precision = _precision(*problem.dtypes)
        salts = self._moment_salts
        noise_step = None if salts is None else step
        projected = self._empty(*self._low.shape)
        # GaLore's N goes into operation 3's product as it is.
        rounds = self._half and residual is None
        placed = self._padded if rounds else self._low
        direction = (self._empty_half if rounds else self._empty)(*placed.shape)
        sums = parts = parts_sq = direction
        if residual:
            sums = self._empty(3, problem.matrices, tiles.slots, problem.channels)
        if split > 1:
            pieces = programs * split * config.channels
            parts, parts_sq = self._empty(pieces * config.rank), self._empty(pieces)

        def rest() -> Rest:
            kappa = residual.kappa if residual else 0.0
            grad_dtype, basis_dtype = problem.dtypes
            # Two operands of one kind stay as they are; anything mixed is float32.
            operand = grad_dtype if grad_dtype is basis_dtype else torch.float32
            # Anything else goes through registers on its way into the product.
            as_copied = grad_dtype is basis_dtype and (
                grad_dtype.itemsize < 4 or precision == "tf32"
            )
            reread = residual is not None and as_copied and rereads_gradients(self._device)
            arguments = (
                self._counters(stream),
                unit,
                addresses_of(matrices.bases),
                *self._moment_addresses(matrices),
                self._grad_strides,
                self._grad_sizes,
                matrices.bases[0].stride(),
                self._low.strides[1:],
                self._scale_strides if self._coded else None,
                placed.strides,
                placed.sizes,
                problem.channels,
                problem.depth,
                problem.rank,
                split,
                2 * kappa - kappa**2,
            )
            options = {
                "OPERAND": _OPERANDS[operand],
                "PRECISION": precision,
                "SUMS": residual is not None,
                "SPLIT": split > 1,
                "REREAD": reread,
                "DEVICE_SCALARS": isinstance(adam.bias_correction1, Tensor),
                "GROUP": CHANNELS_A_SCALE if self._coded else 0,
                "NOISE": salts is not None,
                "DEVICE_STEP": isinstance(noise_step, Tensor),
            }
            return Rest(tiles.project_grid, arguments, options | config.options())

        if programs:
            self._project(
                (precision, unit),
                stream,
                (direction, projected, sums, parts, parts_sq, base, offsets),
                (*_adam_arguments(adam), noise_step),
                rest,
            )
        if residual is None:
            if rounds:
                direction = direction[..., : self._low.shape[-1]]
            return Projection(direction, projected, None, copy)
        channel_sums = ChannelSums(*sums.unbind())
        # The kernel's difference is lost in what R and its basis were rounded to.
        rounded = precision == "tf32" or min(dtype.itemsize for dtype in problem.dtypes) < 4
        rounded = rounded or not matrices.orthonormal
        if rounded and residual.kappa > MAX_KAPPA_HALF_PRECISION:
            _form_residuals(
                matrices._replace(grads=grads), residual.kappa, projected, channel_sums.residual
            )
        return Projection(direction, projected, channel_sums, copy)

    def _step_moments(
        self, matrices: Matrices, adam: AdamScalars, step: int | Tensor
    ) -> Projection:
        """Operation 1 where R is given."""
        problem, stream = self._problem, current_stream(self._device)
        base, offsets, unit = self._located(matrices.grads, stream)
        salts = self._moment_salts
        noise_step = None if salts is None else step
        projected = self._empty(*self._low.shape)
        placed = self._padded if self._half else self._low
        direction = (self._empty_half if self._half else self._empty)(*placed.shape)
        programs = problem.matrices * triton.cdiv(problem.channels, CHANNELS_A_SCALE)
        programs *= triton.cdiv(problem.rank, MOMENTS_RANK)

        def rest() -> Rest:
            arguments = (
                unit,
                *self._moment_addresses(matrices),
                self._low.strides[1:],
                self._scale_strides if self._coded else None,
                placed.strides,
                placed.sizes,
                problem.channels,
                problem.rank,
            )
            options = {
                "DEVICE_SCALARS": isinstance(adam.bias_correction1, Tensor),
                "CODED": self._coded,
                "NOISE": salts is not None,
                "DEVICE_STEP": isinstance(noise_step, Tensor),
                "BC": CHANNELS_A_SCALE,
                "BR": MOMENTS_RANK,
                "num_warps": MOMENTS_WARPS,
            }
            return Rest((programs, 1, 1), arguments, options)

        if programs:
            self._moments(
                unit,
                stream,
                (direction, projected, base, offsets),
                (*_adam_arguments(adam), noise_step),
                rest,
            )
        return Projection(direction[..., : self._low.shape[-1]], projected, None)

    def _moment_addresses(self, matrices: Matrices) -> list[Addresses | Tensor | None]:
        """Of M and V, of their scales, and the salts that round V."""
        scales = _scales(matrices)
        held = [matrices.exp_avgs, matrices.exp_avg_sqs, *scales]
        found: list[Addresses | Tensor | None] = [*map(addresses_of, held)]
        found += [None] * (2 - len(scales))
        salts = self._moment_salts
        return [*found, None if salts is None else device_table(salts, self._device)]

    def channel_scale(self, matrices: Matrices, sums: ChannelSums) -> Tensor:
        count, channels = self._problem.matrices, self._problem.channels
        slots = sums.direction.shape[1] if sums.direction.dim() == 3 else 1
        programs = -(-channels // SCALE_BLOCK)
        factor = self._empty(count, channels)
        stream = current_stream(self._device)

        def rest() -> Rest:
            bounds = (LIMITER_GROWTH, NORM_EPS, STORABLE_SHARE, NOTHING_STORED)
            arguments = (
                self._counters(stream),
                addresses_of(matrices.limiter_norms),
                channels,
                slots,
                *bounds,
            )
            options = {"BC": SCALE_BLOCK, "SWEEP": SCALE_SWEEP, "num_warps": SCALE_WARPS}
            return Rest((count * programs, 1, 1), arguments, options)

        if programs:
            shares = self._empty(2, count, programs)
            self._scale(slots, stream, (*sums, factor, shares), (), rest)
        return factor

    def back_project_update(
        self,
        matrices: Matrices,
        projection: Projection,
        factor: Tensor | None,
        scalars: Scalars,
    ) -> None:
        problem, residual, basis = self._problem, matrices.residual, matrices.bases[0]
        stream, (low, projected, _, copy) = current_stream(self._device), projection
        tiles, base, offsets, unit = self._tiles[True], low, low, 1
        if residual:
            grads = self._readable(matrices.grads)  # copies have to live until the launch
            located = self._located(grads, stream) if copy is None else _stacked(copy)
            if self._rows is not None and copy is None:
                # They are others than operation 1 had.
                copy = self._copied(self._rows, located, stream)
                located = _stacked(copy)
            base, offsets, unit = located
            tiles = self._tiles[located.wide]
        resident = tiles.update.resident
        forms = residual is not None and (resident or not self._half)
        placed = self._padded if self._half and not forms else self._low
        if residual and not forms:
            low = self._combined(projection, factor, scalars.scale, residual)
        salts, noise_step = projected, 0 if matrices.salts is None else scalars.step
        if matrices.salts is not None:
            salts = device_table(matrices.salts, self._device)
        precision = _precision(basis.dtype, basis.dtype)

        def rest() -> Rest:
            arguments = (
                unit,
                addresses_of(matrices.params),
                addresses_of(matrices.bases),
                self._param_strides,
                self._grad_strides,
                self._grad_sizes,
                basis.stride(),
                placed.strides,
                placed.sizes,
                problem.channels,
                problem.depth,
                problem.rank,
                residual.rho if residual else 0.0,
                residual.kappa if residual else 0.0,
                *((tiles.update.split,) if resident else ()),
            )
            options = {
                "OPERAND": _OPERANDS[basis.dtype],
                "PRECISION": precision,
                "RESIDUAL": residual is not None,
                "FORMS": forms,
                "PADDED": copy is not None,
                "DEVICE_SCALARS": isinstance(scalars.step_size, Tensor),
                "NOISE": matrices.salts is not None,
                "DEVICE_STEP": isinstance(noise_step, Tensor),
            }
            return Rest(tiles.update_grid, arguments, options | tiles.update.options())

        if tiles.update_grid[0]:
            factor = projected if factor is None else factor
            update = self._resident if resident else self._update
            update(
                (precision, unit),
                stream,
                (low, projected, factor, salts, base, offsets),
                (scalars.scale, scalars.step_size, scalars.decay, noise_step),
                rest,
            )

    def _combined(
        self, projection: Projection, factor: Tensor | None, scale: float, residual: Residual
    ) -> Tensor:
        """B of Fira in half precision, its rows padded."""
        problem, combined = self._problem, self._empty_half(*self._padded.shape)
        # The contiguous axis is the longer one of a tile.
        long, short = COMBINE_TILE
        tile = (short, long) if problem.side is Side.RIGHT else (long, short)
        programs = problem.matrices * triton.cdiv(problem.channels, tile[0])
        programs *= triton.cdiv(problem.rank, tile[1])

        def rest() -> Rest:
            arguments = (
                self._padded.strides,
                self._padded.sizes,
                self._low.strides[1:],
                problem.channels,
                problem.rank,
                residual.rho * residual.kappa,
            )
            options = {"BC": tile[0], "BR": tile[1], "num_warps": COMBINE_WARPS}
            return Rest((programs, 1, 1), arguments, options)

        if programs:
            assert factor is not None
            tensors = combined, projection.direction, projection.projected, factor
            self._combine((), current_stream(self._device), tensors, (scale,), rest)
        return combined

    def _counters(self, stream: int | None) -> Tensor:
        """Of programs that have arrived; the kernels put them back to 0.

        Launches of a batch follow one another, so that they share them, in a replayed graph too.
        """
        if self._arrived is None:
            arrivals = max(tiles.project_grid[0] for tiles in self._tiles)
            arrivals = max(arrivals, self._problem.matrices)
            counters = torch.zeros(arrivals, dtype=torch.int32, device=self._device)
            if stream is None:
                # The graph's own, which are 0 only when it is replayed: for no other launch.
                return counters
            self._arrived = counters
        if stream is None:
            keep_for_graphs(self._arrived)
        return self._arrived

    def _copied(self, rows: _Rows, located: Addresses, stream: int | None) -> Tensor:
        """The gradients with padded rows."""
        copy = located.base.new_empty((self._problem.matrices, rows.lines, rows.padded))
        programs = copy.shape[0] * rows.lines * triton.cdiv(rows.padded, PAD_BLOCK)

        def rest() -> Rest:
            arguments = (located.unit, rows.lines, rows.length, rows.pitch, rows.padded)
            return Rest((programs, 1, 1), arguments, {"BLOCK": PAD_BLOCK, "num_warps": PAD_WARPS})

        self._pad(located.unit, stream, (copy, located.base, located.offsets), (), rest)
        return copy

    def _readable(self, grads: list[Tensor]) -> list[Tensor]:
        """The gradients, copied if no axis is contiguous: each element would cost a line."""
        return [grad.contiguous() for grad in grads] if self._copies_grads else grads

    def _located(self, grads: list[Tensor], stream: int | None) -> Addresses:
        """Where the gradients lie, of which a table is made anew only if they have moved."""
        placed = stream, list(map(Tensor.data_ptr, grads))
        if stream is None or placed != self._placed:
            self._placed, (_, self._offsets, self._unit) = placed, addresses_of(grads)
        return Addresses(grads[0], self._offsets, self._unit)


def _form_residuals(
    matrices: Matrices, kappa: float, projected: Tensor, residual_sq: Tensor
) -> None:
    """|e|^2 of each channel, literally, into the first of its slots, and 0 into the others.

    By torch in float32, a block of channels at a time: G is read and multiplied once more.
    """
    residual_sq.zero_()
    side, axis = matrices.side, 1 - rank_axis(matrices.side)
    at_once = channels_of_block(matrices.grads[0], side)
    each = zip(matrices.grads, matrices.bases, projected, residual_sq[:, 0], strict=True)
    for grad, basis, low, total in each:
        wide = basis.float()
        blocks = torch.split(grad, at_once, axis), torch.split(low, at_once, axis)
        for block, part, sums in zip(*blocks, torch.split(total, at_once), strict=True):
            copy = block.to(torch.float32, copy=True)
            sums.copy_(residual_sq_in(copy, part, wide, side, kappa))


def _adam_arguments(adam: AdamScalars) -> tuple[Scalar, ...]:
    """As the kernels take them: 1 - beta is formed here, in float64."""
    betas = adam.beta1, 1 - adam.beta1, adam.beta2, 1 - adam.beta2
    return (*betas, adam.eps, adam.bias_correction1, adam.bias_correction2)


def _precision(grad: torch.dtype, basis: torch.dtype) -> str:
    """How float32 is multiplied: by what the user allows; nothing else has a choice.

    Triton 3.7.1 takes "ieee" for TF32 on sm_100 where it sees that an operand was half precision;
    three TF32 products, which keep 22 bits of either operand, it leaves alone.
    """
    if grad is basis and grad.itemsize < 4:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # torch raises on the old switch once the new one was set.
    switch = getattr(matmul, "fp32_precision", None)
    if matmul.allow_tf32 if switch is None else switch == "tf32":
        return "tf32"
    return "ieee" if grad is basis else "tf32x3"
