"""Which rows of a layer's input stand for all of them in the gradient of its weight.

G = H^T X is a sum over t rows, of h_i^T x_i. Of k of them, drawn with weights w,

    G^ = sum over the drawn j of w_j h_j^T x_j,        E G^ = G

Scores a_i are what is known of |h_i| |x_i| beforehand; p_i = a_i / sum a, and P_c is the sum of the
c largest p. What is drawn, w, and E|G^ - G|^2 where a_i = |h_i| |x_i|:

    uniform   k different rows, all as likely; t / k
    crs       k times by p; 1 / (k p_j); ((sum a)^2 - |G|^2) / k
    wta       the c largest for certain, w = 1, then k - c times by p among the others,
              (1 - P_c) / ((k - c) p_j); ((sum of the others' a)^2 - |G of the others|^2) / (k - c).
              c is argmin (1 - P_c) / (k - c) over 0 <= c < k
    pps       k different rows, j with probability pi_j = min(1, tau a_j), sum pi = k: 1 / pi_j;
              about (sum of the a with pi < 1)^2 / (k - c) - (sum of their a^2), c those with pi = 1

Rows with a score of 0 are never drawn with a weight: for uniform, too. Shapes depend on t and k
alone, and no host waits for a device. Sources: column-row sampling (Drineas et al., 2006), WTA-CRS
(arXiv 2305.15265), systematic sampling proportional to size (Madow, 1949), and RAD (arXiv
2007.10412) for random signs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TINY, LARGEST = torch.finfo(torch.float64).tiny, torch.finfo(torch.float64).max


class Sample(NamedTuple):
    """Drawn rows.

    Attributes:
        places: of the rows, k, int64.
        weights: k, float64; 0 where fewer than k rows have a score.
    """

    places: Tensor
    weights: Tensor


def sample_rows(
    scores: Tensor, count: int, method: str, generator: torch.Generator | None = None
) -> Sample:
    """Draws rows by one of `ROW_METHODS`.

    Args:
        scores: of t rows, at least 0; what is not finite counts more than all others together.
        count: k, from 1 to t.
        method: see above.
        generator: on the scores' device; None for torch's own.
    """
    scores = scores.double()
    finite = scores.isfinite()
    # A gradient that is not finite has to be seen, and not to make all others 0.
    scores = scores.where(finite, 2 * scores.where(finite, 0.0).sum() + 1)
    return ROW_METHODS[method](scores, count, generator)


def _pps(scores: Tensor, count: int, generator: torch.Generator | None) -> Sample:
    ordered = scores.sort(descending=True).values
    # Of all from a place on.
    left = ordered.flip(0).cumsum(0).flip(0)[:count]
    open_draws = count - torch.arange(count, device=scores.device)
    # The first from which on nobody's share would be more than 1: those before are certain.
    certain = (open_draws * ordered[:count] <= left).int().argmax().view(1)
    # Finite, for rows of no score to have no share where nothing is left.
    tau = (open_draws[certain] / left[certain].clamp(min=TINY)).clamp(max=LARGEST)
    shares = (tau * scores).clamp(max=1.0)
    shuffled = torch.randperm(len(scores), device=scores.device, generator=generator)
    ends = shares[shuffled].cumsum(0)
    start = torch.rand(1, dtype=torch.float64, device=scores.device, generator=generator)
    points = start + torch.arange(count, device=scores.device)
    found = torch.searchsorted(ends, points, right=True).clamp(max=len(scores) - 1)
    places = shuffled[found]
    return Sample(places, (1 / shares[places]).where(points < ends[-1], 0.0))


def _uniform(scores: Tensor, count: int, generator: torch.Generator | None) -> Sample:
    return _pps((scores != 0).double(), count, generator)


def _crs(scores: Tensor, count: int, generator: torch.Generator | None) -> Sample:
    ends = scores.cumsum(0)
    draws = torch.rand(count, dtype=torch.float64, device=scores.device, generator=generator)
    places = torch.searchsorted(ends, draws * ends[-1], right=True).clamp(max=len(scores) - 1)
    return Sample(places, _over(ends[-1] / count, scores[places]))


def _wta(scores: Tensor, count: int, generator: torch.Generator | None) -> Sample:
    ordered, order = scores.sort(descending=True)
    ends, places = ordered.cumsum(0), torch.arange(count, device=scores.device)
    left = ordered.flip(0).cumsum(0).flip(0)[:count]
    certain = certain_rows(left, count)
    rest = left[certain]
    draws = torch.rand(count, dtype=torch.float64, device=scores.device, generator=generator)
    points = ends[-1] - (1 - draws) * rest
    drawn = torch.searchsorted(ends, points, right=True).clamp(max=len(scores) - 1)
    is_certain = places < certain
    chosen = places.where(is_certain, torch.maximum(drawn, certain))
    weights = _over(rest / (count - certain), ordered[chosen])
    return Sample(order[chosen], weights.masked_fill(is_certain, 1.0))


def certain_rows(left: Tensor, count: int) -> Tensor:
    """WTA-CRS' c, one element: the argmin of (1 - P_c) / (k - c).

    Args:
        left: of c = 0 to k - 1 the sum of all scores but the c largest.
        count: k.
    """
    return (left / (count - torch.arange(count, device=left.device))).argmin().view(1)


def _over(numerator: Tensor, scores: Tensor) -> Tensor:
    """A quotient, and 0 where nothing can have been drawn."""
    return (numerator / scores).where(scores != 0, 0.0)


ROW_METHODS: dict[str, Callable[[Tensor, int, torch.Generator | None], Sample]] = {
    "uniform": _uniform,
    "crs": _crs,
    "wta": _wta,
    "pps": _pps,
}


def random_signs(rows: int, count: int, seed: int, like: Tensor) -> Tensor:
    """Omega, rows x count, of +-1 / sqrt(count), so that E Omega Omega^T = I.

    Args:
        rows: features of an input.
        count: what is kept of them.
        seed: the same one gives the same signs.
        like: of the dtype and on the device that are wanted.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    bits = torch.randint(
        2, (rows, count), generator=generator, device=like.device, dtype=torch.int8
    )
    return bits.to(like.dtype).mul_(2).sub_(1).mul_(count**-0.5)
