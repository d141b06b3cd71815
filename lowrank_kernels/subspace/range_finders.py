"""Where a basis comes from: the leading left singular directions of a matrix, or random ones.

Every range finder has one form, `RangeFinder`. It serves a batch of equal matrices A, d x n, whose
basis is d x r: the gradients of the left side as they are, of the right side transposed.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.dry import device_type
from ..ops.notices import notice_once
from .orthonormal import orthonormalized, product, reorthonormalized, well_conditioned

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
        blends: what a warm start iterates on in the place of A, B x d x n in at least float32; None
            for A itself.
    """

    matrices: Tensor
    norms: Tensor
    rank: int
    previous: Sequence[Tensor | None]
    seeds: Sequence[int]
    power_iterations: int
    measured: bool = False
    blends: Tensor | None = None


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

    Source: GaLore (arXiv 2403.03507), section 3.
    """
    found = [left_singular(matrix, request.rank) for matrix in request.matrices]
    bases, values, slow = zip(*found, strict=True)
    energies = (torch.stack(values) / request.norms.unsqueeze(1)).square()
    slow_ones = torch.tensor(slow, device="cpu")
    noise = _noise(bases[0].dtype, request)
    return Found(torch.stack(bases), energies, slow_ones, noise, signed=True)


def left_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, bool]:
    """The first `rank` left singular vectors and values, and whether the SVD failed, so that the
    Gram matrix was taken instead; in at least float32.
    """
    wide = matrix.to(_wide(matrix))
    # A gradient of the right side comes transposed: factored as it lies, like the official code
    # does, it gets the same signs, on which moments that are kept depend.
    lies_transposed = matrix.stride(1) != 1 or matrix.stride(0) < matrix.shape[1]
    try:
        left, values, right = torch.linalg.svd(wide.mT if lies_transposed else wide, False)
    except torch.linalg.LinAlgError:
        notice_once(
            logging.WARNING, "torch.linalg.svd did not converge; using the Gram matrix's eigh"
        )
        return *_from_gram(wide, rank), True
    vectors = right.mT if lies_transposed else left
    return vectors[:, :rank], values[:rank], False


def _from_gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same from the smaller Gram matrix, in float64 since it squares the condition."""
    exact = matrix.double()
    tall = exact.shape[0] > exact.shape[1]
    energies, vectors = torch.linalg.eigh(exact.mT @ exact if tall else exact @ exact.mT)
    basis = vectors[:, -rank:].flip(-1)
    if tall:
        basis, _ = torch.linalg.qr(exact @ basis)
    values = energies[-rank:].flip(-1).clamp(min=0.0).sqrt()
    return basis.to(matrix.dtype), values.to(matrix.dtype)


def randomized(request: Request) -> Found:
    """A Gaussian sketch, power iterations, and a rotation to singular directions.

    Each half of an iteration is orthonormalized: without that the condition number of the sketch is
    squared twice. Adam depends on the directions, not on their span alone, hence the rotation.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011),
    algorithms 4.4 and 5.1.
    """
    return _iterated(request, [None] * len(request.seeds))


def warm_started(request: Request) -> Found:
    """As `randomized`, from the previous basis and a few random columns beside it.

    The energies are those of A also where the directions are those of a blend.

    Source of the blends: LDAdam (arXiv 2410.16103), from secondary sources. Its iteration has no
    random columns, and leaves the directions as QR makes them.
    """
    if request.blends is None:
        return _iterated(request, request.previous)
    norms = torch.linalg.vector_norm(request.blends, dim=(1, 2), dtype=torch.float64)
    blended = request._replace(matrices=request.blends, norms=norms)
    found = _iterated(blended, request.previous)
    return _found(request, *_for_sketches(request), found.bases, found.slow)


def random(request: Request) -> Found:
    """Random orthonormal directions, the same whatever the gradient is."""
    bases, slow = orthonormalized(_gaussian(request, request.matrices.shape[1], request.rank))
    return _found(request, *_for_sketches(request), bases, slow)


def gaussian(request: Request) -> Found:
    """Random directions from N(0, 1/r), not orthonormal: E[P P^T] = 1, as in APOLLO and FLORA."""
    bases = _gaussian(request, request.matrices.shape[1], request.rank) * request.rank**-0.5
    nothing_slow = torch.zeros(len(bases), dtype=torch.bool, device="cpu")
    return _found(request, *_for_sketches(request), bases, nothing_slow)


def _iterated(request: Request, starts: Sequence[Tensor | None]) -> Found:
    matrices, scale = _for_sketches(request)
    rank, (d, n) = request.rank, matrices.shape[1:]
    columns = min(d, n, rank + max(OVERSAMPLING, rank // 16))
    known = min(columns, *(0 if start is None else start.shape[1] for start in starts))
    images = _times(matrices, scale, _gaussian(request, n, columns - known))
    if known:
        begun = [start[:, :known].to(images.dtype) for start in starts if start is not None]
        images = torch.cat([torch.stack(begun), images], dim=2)

    slow = torch.zeros(len(matrices), dtype=torch.bool, device="cpu")
    for _ in range(request.power_iterations):
        left, slow_left = well_conditioned(images)
        right, slow_right = well_conditioned(_times(matrices.mT, scale, left))
        images = _times(matrices, scale, right)
        slow = slow | slow_left | slow_right

    squares, rotation = torch.linalg.eigh(product(images.mT, images))
    lengths = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt().unsqueeze(1)
    directions = (rotation / lengths)[..., -rank:].flip(-1)
    bases, slow_last = reorthonormalized(product(images, directions))
    return _found(request, matrices, scale, bases, slow | slow_last)


def _found(request: Request, matrices: Tensor, scale: Tensor, bases: Tensor, slow: Tensor) -> Found:
    """With |P_i^T A|^2 / |A|^2 of every column."""
    energies = torch.linalg.vector_norm(_times(matrices.mT, scale, bases), dim=1).square()
    return Found(bases, energies, slow, _noise(matrices.dtype, request))


def _times(matrices: Tensor, scale: Tensor, tall: Tensor) -> Tensor:
    """A product in the dtype of the matrices, on the matrix units, returned in at least float32."""
    return product(matrices, tall.to(matrices.dtype)).to(scale.dtype) * scale


def _for_sketches(request: Request) -> tuple[Tensor, Tensor]:
    """A, in bfloat16 where its products are faster, if all that they have to give is directions;
    and 1 / |A|: gradients of 1e-20 exist, and in float32 their squares do not.

    Not in float16, which does not hold the range of a product.
    """
    matrices, wide = request.matrices, _wide(request.matrices)
    scale = (1 / request.norms).to(wide).view(-1, 1, 1)
    if matrices.dtype is torch.float16 or request.measured:
        return matrices.to(wide), scale
    if matrices.dtype is not torch.float32:
        return matrices, scale
    if device_type(matrices) != "cuda":
        fast = torch.cpu._is_avx512_bf16_supported()
    elif torch.cuda.is_available():
        device = None if matrices.is_meta else matrices.device
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = True  # a dry run for a GPU that is not here
    return matrices.to(torch.bfloat16) if fast else matrices, scale


def _wide(matrices: Tensor) -> torch.dtype:
    return torch.promote_types(matrices.dtype, torch.float32)


def _noise(dtype: torch.dtype, request: Request) -> float:
    """What a direction that A does not have gets from products, or an SVD, in this dtype.

    Rounding errors of unit vectors, spread over all directions; 32 covers the largest of many.
    """
    return float(32 * torch.finfo(dtype).eps ** 2 / request.matrices.shape[1])


def _gaussian(request: Request, rows: int, cols: int) -> Tensor:
    """Normal numbers that depend on the seeds alone, B x rows x cols."""
    matrices, device = request.matrices, request.matrices.device
    generator = torch.Generator("cpu" if matrices.is_meta else device)
    draws = [
        torch.randn(
            rows, cols, generator=generator.manual_seed(seed), device=device, dtype=torch.float32
        )
        for seed in request.seeds
    ]
    return torch.stack(draws).to(_wide(matrices))


RANGE_FINDERS: dict[str, RangeFinder] = {
    "svd": exact,
    "randomized": randomized,
    "power": warm_started,
    "random": random,
    "gaussian": gaussian,
}
