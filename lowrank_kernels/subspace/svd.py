"""The exact basis: leading singular vectors of the gradient, as GaLore takes them."""

import logging

import torch
from torch import Tensor

from ..ops.notices import notice_once


def left_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, bool]:
    """The first `rank` left singular vectors and values.

    Args:
        matrix: d x n, finite; computed in float32, or in float64 for a float64 matrix.
        rank: at most min(d, n).

    Returns:
        The vectors, d x rank, the values, and whether the SVD failed and the Gram matrix was taken
        instead; in the dtype of the computation.

    Raises:
        torch.linalg.LinAlgError: neither the SVD nor its fallback converged.

    Source: GaLore (arXiv 2403.03507), section 3.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
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
    rows, cols = exact.shape
    if rows <= cols:
        energies, vectors = torch.linalg.eigh(exact @ exact.mT)
        basis = vectors[:, -rank:].flip(-1)
    else:
        energies, vectors = torch.linalg.eigh(exact.mT @ exact)
        basis, _ = torch.linalg.qr(exact @ vectors[:, -rank:].flip(-1))
    values = energies[-rank:].flip(-1).clamp(min=0.0).sqrt()
    return basis.to(matrix.dtype), values.to(matrix.dtype)
