"""The rank of each matrix: one number for all, patterns of names, or a rule of the user's."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from glob import escape

from torch import Tensor

from .values import positive_int

RankRule = Callable[[str, Tensor], int | None]
Ranks = int | Mapping[str, int | None] | RankRule


def ranks_of(ranks: Ranks, weights: Mapping[str, Tensor]) -> dict[str, int | None]:
    """The rank that each of some weights is given, None for none.

    Args:
        ranks: a number; patterns as of `fnmatch`, of which the first that matches a weight's name
            counts, and none leaves it without a rank; or a function of name and weight.
        weights: by name, matrices that a rank would project.

    Raises:
        TypeError, ValueError: a rank is no int, or below 1; a pattern matches no name, or only
            those that patterns before it match. The text names the weight or the pattern.
    """
    if isinstance(ranks, Mapping):
        return _by_patterns(ranks, weights)
    if callable(ranks):
        return {
            name: _checked(ranks(name, weight), f"rank of {name}")
            for name, weight in weights.items()
        }
    return dict.fromkeys(weights, positive_int(ranks, "rank"))


def _by_patterns(
    patterns: Mapping[str, int | None], weights: Mapping[str, Tensor]
) -> dict[str, int | None]:
    if not patterns:
        raise ValueError("rank={} has no pattern; one for all weights is '*'")
    found: dict[str, int | None] = {}
    for pattern, value in patterns.items():
        if not isinstance(pattern, str):
            raise TypeError(f"rank: patterns are text, got {pattern!r}")
        rank = _checked(value, f"rank of the pattern {pattern!r}")
        matched = [name for name in weights if fnmatchcase(name, pattern)]
        new = [name for name in matched if name not in found]
        # For "*", the rest, there may be nothing left.
        if weights and not new and (pattern != "*" or not matched):
            why = "that none before it matches, of which the first counts" if matched else "at all"
            bracketed = "[" in pattern and next((name for name in weights if "[" in name), None)
            hint = f", of which the pattern is {escape(bracketed)!r}" if bracketed else ""
            raise ValueError(
                f"rank: the pattern {pattern!r} matches no weight that would be projected {why};"
                f" they are called as {bracketed or next(iter(weights))!r}{hint}"
            )
        found |= dict.fromkeys(new, rank)
    return {name: found.get(name) for name in weights}


def _checked(rank: object, name: str) -> int | None:
    return None if rank is None else positive_int(rank, name)
