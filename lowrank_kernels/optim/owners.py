"""New bases of matrices that are spread over ranks: each is computed by one rank, its owner.

    owners     the largest matrix first, to the rank that has the least to do
    gather     an all-to-all a round and axis: to each owner the parts of all of its matrices; with
               an interpolation as many again, of the first moments
    compute    on the whole gradient, as one process does
    send       what became of all matrices, in one sum; then from each owner its bases
    take       every rank: moments of its rows follow the new basis

So bases are the same on all ranks, bit for bit, also on unlike devices; and an error on an owner is
known to all ranks before anybody waits for a basis.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.contract import basis_shape, projected_shape, rank_axis
from ..subspace import Due, Result, Subspace, found_bases, take, tell
from .collectives import Ranks, owners_of
from .exchange import to_owners

# Of gradients that an owner gathers at a time, unless one alone is larger: 256 MiB in float32.
ROUND_ELEMENTS = 2**26

# What is sent of a matrix: whether there is a basis, its rank and what it tells of itself.
HEADER = 6
# In the place of 1 in a header: no basis, and an error that is none of the gradient's.
NONE, FAILED = 0.0, -1.0

PROBLEM = "its owner found none, and says why"


def refresh_shared(
    due: Sequence[Due], shapes: Sequence[tuple[int, int]], ranks: Ranks, subspace: Subspace
) -> None:
    """Gives each matrix a new basis, or counts why it keeps the old one, the same on every rank.

    Args:
        due: the same matrices on all ranks; of gradients and moments what is here.
        shapes: of the whole matrices.
        ranks: among whom they are spread.
        subspace: where bases come from.

    Raises:
        RuntimeError: an owner failed in an unforeseen way; no state was changed since the last
            round.
    """
    sizes = [rows * columns for rows, columns in shapes]
    owners = owners_of(sizes, ranks.count)
    for places in _rounds(sizes, owners):
        _refresh_round(
            [due[place] for place in places],
            [shapes[place] for place in places],
            [owners[place] for place in places],
            ranks,
            subspace,
        )


def _rounds(sizes: Sequence[int], owners: Sequence[int]) -> list[list[int]]:
    """Places of the matrices that are gathered together: of each owner as many as have room."""
    loads: dict[int, int] = {}
    turns: dict[int, int] = {}
    rounds: list[list[int]] = []
    for place, (size, owner) in enumerate(zip(sizes, owners, strict=True)):
        if loads.get(owner, 0) and loads[owner] + size > ROUND_ELEMENTS:
            loads[owner], turns[owner] = 0, turns[owner] + 1
        loads[owner] = loads.get(owner, 0) + size
        turn = turns.setdefault(owner, 0)
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(place)
    return rounds


def _refresh_round(
    due: Sequence[Due],
    shapes: Sequence[tuple[int, int]],
    owners: Sequence[int],
    ranks: Ranks,
    subspace: Subspace,
) -> None:
    grads = to_owners(ranks, [item.grad for item in due], shapes, owners)
    found: dict[int, Result] = {}
    error: Exception | None = None
    means: dict[int, Tensor] = {}
    if subspace.interpolation:
        own_means = [item.state["exp_avg"] for item in due]
        wholes = [
            projected_shape(shape, ranks.side, mean.shape[rank_axis(ranks.side)])
            for shape, mean in zip(shapes, own_means, strict=True)
        ]
        means = to_owners(ranks.of_moments, own_means, wholes, owners)
    try:
        own = [_whole(due[place], grad, means.get(place)) for place, grad in grads.items()]
        found = dict(zip(grads, found_bases(own, subspace), strict=True))
    except Exception as failure:  # whatever it is, the others wait
        error = failure
    headers = torch.zeros(len(due), HEADER, dtype=torch.float64, device="cpu")
    for place in grads:
        header = [FAILED] + [0.0] * (HEADER - 1) if error else _header(found[place])
        headers[place] = torch.tensor(header, dtype=torch.float64, device="cpu")
    del grads, means
    every = ranks.sum_of_all(headers.to(ranks.device)).tolist()
    failed = [place for place, header in enumerate(every) if header[0] == FAILED]
    if failed:
        raise RuntimeError(
            f"rank {owners[failed[0]]} of {ranks.place.mesh} could not compute the basis of"
            f" {due[failed[0]].name}, and says why"
        ) from error
    bases: dict[int, Tensor] = {}
    for owner in range(ranks.count):
        theirs = [i for i, header in enumerate(every) if owners[i] == owner and header[0] != NONE]
        sizes = [basis_shape(shapes[place], ranks.side, int(every[place][1])) for place in theirs]
        own_bases = [result.basis for place in theirs if (result := found.get(place))]
        sent = _sent([b for b in own_bases if b is not None], sizes, due, owner, ranks)
        bases |= dict(zip(theirs, sent, strict=True))
    problems: dict[str, list[str]] = {}
    for place, item in enumerate(due):
        result = found.get(place, Result(PROBLEM))
        if place in bases:
            _, _, captured, slow, deficient, share = every[place]
            # Each rank computes the turn, which costs less than sending it.
            told = captured, bool(slow), bool(deficient), None, share
            result = Result("", bases[place], *told)
        take(item, result, subspace, problems)
    problems.pop(PROBLEM, None)
    tell(problems)


def _whole(item: Due, grad: Tensor, exp_avg: Tensor | None) -> Due:
    """A matrix on its owner, with what is gathered of it; its own state stays as it is."""
    kept = {} if exp_avg is None else {"exp_avg": exp_avg}
    return item._replace(grad=grad, state={**item.state, **kept})


def _header(result: Result) -> list[float]:
    if result.basis is None:
        return [NONE] * HEADER
    rank = float(result.basis.shape[1])
    return [1.0, rank, result.captured, result.slow, result.deficient, result.share]


def _sent(
    bases: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    due: Sequence[Due],
    owner: int,
    ranks: Ranks,
) -> list[Tensor]:
    """The bases of an owner on every rank, in one message.

    Args:
        bases: on the owner; on the others none.
        shapes: of them.
        due: matrices like theirs.
        owner: an index among the ranks.
        ranks: all.
    """
    if not shapes:
        return []
    held = due[0].state["basis"]
    dtype = held.dtype if held.dtype.is_floating_point else torch.float32
    sizes = [rows * rank for rows, rank in shapes]
    flat = torch.empty(sum(sizes), dtype=dtype, device=held.device)
    if bases:
        torch.cat([basis.reshape(-1) for basis in bases], out=flat)
    ranks.broadcast(flat, owner)
    parts = zip(torch.split(flat, sizes), shapes, strict=True)
    return [part.view(shape) for part, shape in parts]
