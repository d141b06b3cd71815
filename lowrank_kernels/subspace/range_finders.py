"""Where a basis comes from: the leading left singular directions of a matrix, or random ones.

Every range finder has one form, `RangeFinder`. It serves a batch of equal matrices A, d x n, whose
basis is d x r: the gradients of the left side as they are, of the right side transposed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .orthonormal import orthonormalized, product, touched_up, well_conditioned
from .svd import left_singular

# The sketch has more columns than the basis: a sixteenth more, and never fewer than 8. Each costs
# as much as a column of the basis; CONTRIBUTING has what they capture.
OVERSAMPLING = 8


class Request(NamedTuple):
    """What is asked for each matrix of a batch.

    Attributes:
        matrices: A, B x d x n, finite and not zero.
        norms: |A|_F, B, float64.
        rank: r, at most min(d, n).
        previous: the bases so far, d x k each with any k; None where there is none.
        seeds: a number each, from which alone randomness may come.
        power_iterations: passes over A and back.
        measured: whether the energies decide about a rank, so that they have to be right to float32
            even where a sketch in bfloat16 would do for the directions.
    """

    matrices: Tensor
    norms: Tensor
    rank: int
    previous: Sequence[Tensor | None]
    seeds: Sequence[int]
    power_iterations: int
    measured: bool = False


class Found(NamedTuple):
    """What a range finder found, at least in float32.

    Attributes:
        bases: P, B x d x r.
        energies: |P_i^T A|^2 of every direction, B x r, in units of |A|_F^2.
        slow: for each matrix, on the host, whether the fast factorization failed and the slow one
            had to be taken.
        noise: energies up to this are rounding errors.
        signed: the signs of the directions mean something and stay; else they follow the old basis.
    """

    bases: Tensor
    energies: Tensor
    slow: Tensor
    noise: float
    signed: bool = False


RangeFinder = Callable[[Request], Found]


def exact(request: Request) -> Found:
    """The leading left singular vectors, by a full SVD: GaLore's own choice, signs included; slow.

    Raises:
        torch.linalg.LinAlgError: neither the SVD nor its fallback converged.
    """
    found = [left_singular(matrix, request.rank) for matrix in request.matrices]
    bases, values, slow = zip(*found, strict=True)
    relative = torch.stack(values) / request.norms.unsqueeze(1)
    noise = _noise(bases[0].dtype, request)
    slow_ones = torch.tensor(slow, device="cpu")
    return Found(torch.stack(bases), relative.square(), slow_ones, noise, signed=True)


def randomized(request: Request) -> Found:
    """A Gaussian sketch, power iterations, and a rotation to singular directions.

    Each half of an iteration is orthonormalized: without that the condition number of the sketch is
    squared twice. Adam depends on the directions, not on their span alone, hence the rotation.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011),
    algorithms 4.4 and 5.1.
    """
    return _iterated(request, [None] * len(request.seeds))


def warm_started(request: Request) -> Found:
    """As `randomized`, from the previous basis and a few random columns beside it."""
    return _iterated(request, request.previous)


def random(request: Request) -> Found:
    """Random orthonormal directions, the same whatever the gradient is."""
    bases, slow = orthonormalized(_gaussian(request, request.matrices.shape[1], request.rank))
    return _found(request, _for_sketches(request), bases, slow)


def gaussian(request: Request) -> Found:
    """Random directions from N(0, 1/r), not orthonormal: E[P P^T] = 1, as in APOLLO and FLORA."""
    bases = _gaussian(request, request.matrices.shape[1], request.rank) * request.rank**-0.5
    nothing_slow = torch.zeros(len(bases), dtype=torch.bool, device="cpu")
    return _found(request, _for_sketches(request), bases, nothing_slow)


def sketch_bytes(
    batch: int,
    d: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    measured: bool,
) -> int:
    """Bytes of temporaries at the peak of `randomized` and `warm_started`, beside the matrices.

    The matrices are `batch` of d x n in a dtype; of the device only the kind matters.
    """
    columns, sketch = _columns(d, n, rank), _sketch_dtype(dtype, device, measured)
    wide = torch.promote_types(dtype, torch.float32).itemsize
    narrow = sketch.itemsize if sketch.itemsize < wide else 0  # products not yet widened
    tall, wide_one, square = d * columns, n * columns, columns**2
    gram = square * (8 + 8 + wide)  # Y^T Y and its factor in float64, the factor once more
    both = wide * (2 * tall + wide_one)  # images, left and right
    stages = (
        2 * wide * wide_one,  # random numbers are drawn, then stacked
        wide * wide_one + narrow * (wide_one + tall) + 2 * wide * tall,
        3 * wide * tall,  # previous bases are widened, stacked and joined
        2 * wide * tall + gram,
        2 * wide * (tall + wide_one) + narrow * (tall + wide_one),
        2 * wide * (tall + wide_one) + gram,
        both + narrow * wide_one + max(narrow, wide) * tall + wide * tall,
        both + wide * (square + columns * rank + 2 * d * rank) + 32 * rank**2,
        both + wide * (square + columns * rank + (d + 2 * n) * rank),
    )
    copied = d * n * sketch.itemsize if sketch is not dtype else 0
    vectors = 2 * wide * columns + 8 * 8  # squares, their roots; norms and flags of a matrix
    return batch * (copied + max(stages) + vectors)


def _iterated(request: Request, starts: Sequence[Tensor | None]) -> Found:
    matrices, rank = _for_sketches(request), request.rank
    scale = _scale(request, _wide(matrices))
    columns = _columns(matrices.shape[1], matrices.shape[2], rank)
    known = min(columns, *(0 if start is None else start.shape[1] for start in starts))
    images = _times(matrices, _gaussian(request, matrices.shape[2], columns - known)) * scale
    if known:
        images = _begun(starts, known, images)

    slow = torch.zeros(len(matrices), dtype=torch.bool, device="cpu")
    for _ in range(request.power_iterations):
        left, slow_left = well_conditioned(images)
        right, slow_right = well_conditioned(_times(matrices.mT, left) * scale)
        images = _times(matrices, right) * scale
        slow = slow | slow_left | slow_right

    squares, rotation = torch.linalg.eigh(product(images.mT, images))
    lengths = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt().unsqueeze(1)
    directions = (rotation / lengths)[..., -rank:].flip(-1)
    bases, slow_last = touched_up(product(images, directions))
    return _found(request, matrices, bases, slow | slow_last)


def _begun(starts: Sequence[Tensor | None], known: int, images: Tensor) -> Tensor:
    """The first columns of the previous bases, and random ones beside them."""
    begun = [start[:, :known].to(images.dtype) for start in starts if start is not None]
    return torch.cat([torch.stack(begun), images], dim=2)


def _found(request: Request, matrices: Tensor, bases: Tensor, slow: Tensor) -> Found:
    """With |P_i^T A|^2 / |A|^2 of every column."""
    low = _times(matrices.mT, bases) * _scale(request, bases.dtype)
    energies = torch.linalg.vector_norm(low, dim=1).square()
    return Found(bases, energies, slow, _noise(matrices.dtype, request))


def _scale(request: Request, dtype: torch.dtype) -> Tensor:
    """1 / |A|: gradients of 1e-20 exist, and in float32 their squares do not."""
    return (1 / request.norms).to(dtype).view(-1, 1, 1)


def _times(matrices: Tensor, tall: Tensor) -> Tensor:
    """A product in the dtype of the matrices, on the matrix units, returned in at least float32."""
    return product(matrices, tall.to(matrices.dtype)).to(_wide(matrices))


def _for_sketches(request: Request) -> Tensor:
    """A in bfloat16 where its products are faster, if all that they have to give is directions.

    Not in float16, which does not hold the range of a product.
    """
    matrices = request.matrices
    return matrices.to(_sketch_dtype(matrices.dtype, matrices.device, request.measured))


def _sketch_dtype(dtype: torch.dtype, device: torch.device, measured: bool) -> torch.dtype:
    if dtype is torch.float16 or measured:
        return torch.promote_types(dtype, torch.float32)
    if dtype is not torch.float32:
        return dtype
    if device.type != "cuda":
        fast = torch.cpu._is_avx512_bf16_supported()
    else:  # a workspace may be planned where there is no such device
        present = torch.cuda.is_available()
        fast = not present or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else dtype


def _columns(d: int, n: int, rank: int) -> int:
    """Of a sketch."""
    return min(d, n, rank + max(OVERSAMPLING, rank // 16))


def _wide(matrices: Tensor) -> torch.dtype:
    return torch.promote_types(matrices.dtype, torch.float32)


def _noise(dtype: torch.dtype, request: Request) -> float:
    """What a direction that A does not have gets from products, or an SVD, in this dtype.

    Rounding errors of unit vectors, spread over all directions; 32 covers the largest of many.
    """
    return float(32 * torch.finfo(dtype).eps ** 2 / request.matrices.shape[1])


def _gaussian(request: Request, rows: int, cols: int) -> Tensor:
    """Normal numbers that depend on the seeds alone, B x rows x cols."""
    device, dtype = request.matrices.device, _wide(request.matrices)
    generator = torch.Generator(device)
    draws = [
        torch.randn(
            rows, cols, generator=generator.manual_seed(seed), device=device, dtype=torch.float32
        )
        for seed in request.seeds
    ]
    return torch.stack(draws).to(dtype)


RANGE_FINDERS: dict[str, RangeFinder] = {
    "svd": exact,
    "randomized": randomized,
    "power": warm_started,
    "random": random,
    "gaussian": gaussian,
}
