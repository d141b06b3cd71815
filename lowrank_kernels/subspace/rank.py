"""How many directions a matrix needs."""

from collections.abc import Sequence


def adaptive_rank(
    energies: Sequence[float], residual_energy: float, least: int, multiple: int
) -> int:
    """The smallest rank that leaves at most a given share of the energy outside.

    AdaRankGrad's rule as printed takes the largest such rank, which always is the full one; the
    smallest is what can be meant. All ranks are judged by one sketch: a fresh one for every probe
    overshoots, since each misses something else.

    Args:
        energies: of each direction, as a share of the whole matrix', largest first; their number
            is the largest rank that may come out.
        residual_energy: eta, the share that may stay outside.
        least: the smallest rank that may come out.
        multiple: the rank is rounded up to a multiple of this, for the kernels' sake.

    Source: AdaRankGrad (arXiv 2410.17881), from secondary sources.
    """
    rank, outside = 0, 1.0
    while rank < len(energies) and outside > residual_energy:
        outside -= energies[rank]
        rank += 1
    rank = max(rank, least)
    return min(-(-rank // multiple) * multiple, len(energies))
