"""The exact basis: leading singular vectors of the gradient, as GaLore takes them."""

import logging

import torch
from torch import Tensor

from ..ops import Side
from ..ops.notices import notice_once


def svd_basis(grad: Tensor, side: Side, rank: int) -> Tensor:
    """The first `rank` left or right singular vectors of the gradient.

    Args:
        grad: G, rows x cols, finite; computed in float32, or in float64 for a float64 gradient.
        side: LEFT for left singular vectors (rows x rank), RIGHT for right ones (cols x rank).
        rank: at most min(rows, cols).

    Returns:
        The basis, orthonormal, in the dtype of the computation.

    Raises:
        torch.linalg.LinAlgError: neither the SVD nor its fallback converged.

    Source: GaLore (arXiv 2403.03507), section 3.
    """
    matrix = grad.to(torch.promote_types(grad.dtype, torch.float32))
    try:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        notice_once(
            logging.WARNING, "torch.linalg.svd did not converge; using the Gram matrix's eigh"
        )
        return _gram_basis(matrix, side, rank)
    return left[:, :rank] if side is Side.LEFT else right[:rank].mT


def _gram_basis(matrix: Tensor, side: Side, rank: int) -> Tensor:
    """The same vectors from the smaller Gram matrix, in float64 since it squares the condition."""
    wide = matrix.double() if side is Side.LEFT else matrix.double().mT
    rows, cols = wide.shape
    if rows <= cols:
        _, vectors = torch.linalg.eigh(wide @ wide.mT)
        basis = vectors[:, -rank:].flip(-1)
    else:
        _, vectors = torch.linalg.eigh(wide.mT @ wide)
        basis, _ = torch.linalg.qr(wide @ vectors[:, -rank:].flip(-1))
    return basis.to(matrix.dtype)
