"""An orthonormal basis of the columns of tall matrices, from matrix products where they suffice."""

import torch
from torch import Tensor

from ..ops.dry import on_host

# Of the second pass' Gram matrix from the identity. Below it the second pass ends at rounding
# errors; above it the columns were too nearly dependent for the first.
MAX_DEVIATION = 0.1


def orthonormalized(tall: Tensor) -> tuple[Tensor, Tensor]:
    """CholeskyQR2, and Householder's QR for those matrices where it fails.

    Args:
        tall: B x d x q with d >= q, finite, float32 or float64.

    Returns:
        B x d x q with orthonormal columns that span the given ones (a rank-deficient matrix is
        completed by arbitrary directions), and for each matrix, on the host, whether it took
        Householder's QR.

    Source: Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 44 (2015).
    """
    once, worked, _ = _cholesky_qr(tall)
    twice, worked_again, gram = _cholesky_qr(once)
    return _with_householder(twice, tall, worked & worked_again & _nearly_identity(gram))


def well_conditioned(tall: Tensor) -> tuple[Tensor, Tensor]:
    """The same span in columns that are independent enough for a product: one pass of the two."""
    once, worked, _ = _cholesky_qr(tall)
    return _with_householder(once, tall, worked)


def reorthonormalized(tall: Tensor) -> tuple[Tensor, Tensor]:
    """`orthonormalized` of columns that nearly are: the second pass of the two."""
    twice, worked, gram = _cholesky_qr(tall)
    return _with_householder(twice, tall, worked & _nearly_identity(gram))


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of each matrix of a batch; bmm would copy what lies transposed."""
    if len(left) == 1:
        return (left[0] @ right[0]).unsqueeze(0)
    return left @ right


def _with_householder(done: Tensor, tall: Tensor, worked: Tensor) -> tuple[Tensor, Tensor]:
    failed = ~on_host(worked)
    for index in failed.nonzero().flatten().tolist():
        done[index] = torch.linalg.qr(tall[index])[0]
    return done, failed


def _cholesky_qr(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: Y L^-T with L L^T = Y^T Y; whether it worked; Y^T Y.

    The factorization is in float64, which costs q^3 of d q^2 and halves the error.
    """
    gram = product(tall.mT, tall).double()
    factor, info = torch.linalg.cholesky_ex(gram)
    result = torch.linalg.solve_triangular(factor.mT.to(tall.dtype), tall, upper=True, left=False)
    return result, info == 0, gram


def _nearly_identity(gram: Tensor) -> Tensor:
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return (gram - identity).abs().amax((-2, -1)) < MAX_DEVIATION
