"""What becomes of the moments when the basis changes.

In the left form, M and V are r x n, the right form is the transpose. With C = P_new^T P_old:

    keep            M, V as they are (GaLore); cut or filled up with zeros where the rank changes
    reset           M = V = 0, and the bias correction starts anew (Glentis et al.)
    carry           M <- C M,  V <- (C o C) V
    carry_ldadam    M <- C M,  V <- c2 |(C o C)(V/c2 - (M/c1)^2) + (C M/c1)^2|   (LDAdam)
    carry_absolute  M <- C M,  V <- |C V|                                        (AdaRankGrad)

C M is the same vector of the full space in the new basis, as far as that holds it. V is no vector:
(C o C) V is the variance of C x for independent entries of x. AdaRankGrad prints V <- C V, which
turns a fifth to a third of the entries negative and their roots NaN; hence the absolute value.

Sources: LDAdam (arXiv 2410.16103), AdaRankGrad (arXiv 2410.17881), from secondary sources.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import Side

MOMENTS = ("keep", "reset", "carry", "carry_ldadam", "carry_absolute")


class Moments(NamedTuple):
    """M and V, in the shape of R."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class Corrections(NamedTuple):
    """1 - beta^t of both moments, after the steps that they have seen."""

    first: float
    second: float


def transferred(
    how: str, old: Moments, overlap: Tensor, side: Side, corrections: Corrections
) -> Moments:
    """The moments in the new basis, as new tensors.

    Args:
        how: one of `MOMENTS`.
        old: M and V in the old basis.
        overlap: C = P_new^T P_old, r_new x r_old.
        side: of the basis.
        corrections: of the old moments; used by LDAdam's formula.
    """
    exp_avg, exp_avg_sq = old if side is Side.LEFT else (old.exp_avg.mT, old.exp_avg_sq.mT)
    overlap = overlap.to(exp_avg.dtype)
    if how == "keep":
        new = Moments(_resized(exp_avg, len(overlap)), _resized(exp_avg_sq, len(overlap)))
    elif how == "reset":
        zeros = exp_avg.new_zeros(len(overlap), exp_avg.shape[1])
        new = Moments(zeros, zeros.clone())
    else:
        mean = overlap @ exp_avg
        if how == "carry_absolute":
            square = (overlap @ exp_avg_sq).abs()
        elif how == "carry" or not corrections.first:
            square = overlap.square() @ exp_avg_sq
        else:
            first, second = corrections
            variance = exp_avg_sq / second - (exp_avg / first).square()
            square = second * (overlap.square() @ variance + (mean / first).square()).abs()
        new = Moments(mean, square)
    return new if side is Side.LEFT else Moments(*(moment.mT.contiguous() for moment in new))


def _resized(moment: Tensor, rows: int) -> Tensor:
    if rows <= len(moment):
        return moment[:rows].clone()
    return torch.cat([moment, moment.new_zeros(rows - len(moment), moment.shape[1])])
