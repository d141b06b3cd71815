"""New bases for matrices that are due, their rank, and what happens when there is none."""

import logging
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import Side
from ..ops.bases import basis_entries, loaded_basis
from ..ops.codes import Stored, channel_groups, loaded, new_stored, store
from ..ops.contract import moment_dtype
from ..ops.dry import device_type, on_host
from ..ops.notices import notice_once
from .moments import Corrections, Moments, transferred
from .options import Subspace
from .range_finders import RANGE_FINDERS, Found, Request
from .when import note_overlap

State = dict[str, Any]
Problems = dict[str, list[str]]

ZERO_GRADIENT = "the gradient is zero"

# Of the gradients that are stacked for one batched factorization. It bounds the memory of a
# refresh: about three matrices of the largest size, however many are due. A CPU takes one matrix at
# a time: from 512 x 512 on that is no slower there, and its batched products, and those of matrices
# at odd addresses, have other bits, so that a basis would depend on who else is due.
BATCH_ELEMENTS = 2**22


class Due(NamedTuple):
    """A matrix whose basis has to change.

    Attributes:
        name: of the parameter, for messages.
        grad: G, rows x cols.
        state: its state, changed in place; where the rank changes, with new tensors.
        rank: the largest rank.
        completed: steps that it has taken.
        seed: what randomness may depend on, the same on every rank of a distributed run.
        betas: of its moments.
        others: states of matrices that share its basis, whose gradients are in `grad` beside its
            own; changed as its own is.
        maximize: whether its moments are of -G.
    """

    name: str
    grad: Tensor
    state: State
    rank: int
    completed: int
    seed: int
    betas: tuple[float, float]
    others: tuple[State, ...] = ()
    maximize: bool = False

    @property
    def states(self) -> tuple[State, ...]:
        return self.state, *self.others

    @property
    def previous(self) -> Tensor | None:
        """The basis so far, None before the first one."""
        return loaded_basis(self.state) if self.state["basis_step"] >= 0 else None


class Result(NamedTuple):
    """A new basis of a matrix, or why there is none.

    Attributes:
        problem: why; empty if there is a basis.
        basis: P as the state will hold it, decoded; with as many columns as its rank.
        captured: energy of the gradient that it holds, 0 to 1.
        slow: whether the fast factorization failed.
        deficient: whether the gradient has a lower rank.
        turn: C = P_new^T P_old, or None: there is no old basis, or `take` computes it.
        share: |C|^2 / min(r_new, r_old), 0 without an old basis.
    """

    problem: str = ""
    basis: Tensor | None = None
    captured: float = 0.0
    slow: bool = False
    deficient: bool = False
    turn: Tensor | None = None
    share: float = 0.0


def new_record() -> State:
    """The part of a matrix' state that tells of its bases."""
    return {
        "basis_step": -1,  # completed steps when the basis was computed, -1 for none yet
        "moments_step": 0,  # completed steps when the moments were last reset
        "refreshes": 0,  # bases so far
        "captured": 0.0,  # energy of the gradient that the basis held when it was computed, 0 to 1
        "overlap": 0.0,  # |P_new^T P_old|^2 / min(r_new, r_old) of the last change, 0 for none
        "kept": 0,  # refreshes that failed and left the old basis
        "fallbacks": 0,  # refreshes whose fast factorization failed, so that the slow one was taken
        "deficient": 0,  # refreshes from a gradient of a lower rank than the basis
        "gap_factor": 1,  # lazy refreshes: by how much the interval has grown
    }


def refresh_bases(due: Sequence[Due], subspace: Subspace) -> None:
    """Gives each matrix a new basis, or counts why it keeps the old one.

    A basis is never computed from a zero or non-finite gradient, and a failed factorization changes
    nothing but `kept`. Equal matrices are factored together, except on a CPU. The device is waited
    for a few times a batch: to look at the gradients, at the factorizations, at the energies and at
    the overlaps.
    """
    problems: Problems = {}
    for batch in _batches([item for item in due if item.grad.numel()]):
        _refresh_batch(batch, subspace, problems)
    tell(problems)


def _refresh_batch(batch: list[Due], subspace: Subspace, problems: Problems) -> None:
    """In a function, so that nothing of a batch is held beside the next one."""
    for item, result in zip(batch, _found(batch, subspace), strict=True):
        take(item, result, subspace, problems)


def found_bases(due: Sequence[Due], subspace: Subspace) -> list[Result]:
    """What `refresh_bases` finds for each matrix, which has elements; no state is changed."""
    found: dict[int, Result] = {}
    for batch in _batches(due):
        results = _found(batch, subspace)
        found |= {id(item): result for item, result in zip(batch, results, strict=True)}
    return [found[id(item)] for item in due]


def tell(problems: Problems) -> None:
    """Logs why bases were not renewed; each reason once."""
    for problem, names in problems.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        # Checkpoint libraries create the state by a step with zero gradients.
        level = logging.INFO if problem == ZERO_GRADIENT else logging.WARNING
        notice_once(level, f"a basis was not renewed: {problem}: {names[0]}{others}")


def batch_size(grad: Tensor) -> int:
    """Gradients like this one that are factored together."""
    return 1 if device_type(grad) == "cpu" else max(1, BATCH_ELEMENTS // grad.numel())


def adaptive_rank(energies: Sequence[float], subspace: Subspace) -> int:
    """The smallest rank that leaves at most `residual_energy` outside; all of them without it.

    AdaRankGrad's rule as printed takes the largest such rank, which always is the full one; the
    smallest is what can be meant. All ranks are judged by one sketch: a fresh one for every probe
    overshoots, since each misses something else.

    Args:
        energies: of each direction, as a share of the whole matrix', largest first; their number
            is the largest rank that may come out.
        subspace: the share, the smallest rank, and of what the rank is a multiple.

    Source: AdaRankGrad (arXiv 2410.17881), from secondary sources.
    """
    if subspace.residual_energy is None:
        return len(energies)
    rank, outside = 0, 1.0
    while rank < len(energies) and outside > subspace.residual_energy:
        outside -= energies[rank]
        rank += 1
    rank, multiple = max(rank, subspace.min_rank), subspace.rank_multiple
    return min(-(-rank // multiple) * multiple, len(energies))


def _batches(due: Sequence[Due]) -> Iterator[list[Due]]:
    alike: dict[Hashable, list[Due]] = {}
    for item in due:
        grad, previous = item.grad, item.previous
        layout = grad.shape, grad.stride(), grad.dtype, grad.device
        # A warm start takes as many columns from each of a batch, and its result must not depend on
        # who else is there.
        known = 0 if previous is None else previous.shape[1]
        alike.setdefault((*layout, item.state["side"], item.rank, known), []).append(item)
    for equal in alike.values():
        size = batch_size(equal[0].grad)
        for start in range(0, len(equal), size):
            yield equal[start : start + size]


def _found(batch: list[Due], subspace: Subspace) -> list[Result]:
    # A norm of a large half-precision gradient overflows in its own dtype.
    norms = torch.stack([torch.linalg.vector_norm(i.grad, dtype=torch.float64) for i in batch])
    results, usable = [], []
    for index, norm in enumerate(on_host(norms).tolist()):
        if 0 < norm < float("inf"):
            usable.append(index)
        results.append(Result(ZERO_GRADIENT if norm == 0 else "its gradient is not finite"))
    if usable:
        found = _factored([batch[index] for index in usable], norms[usable], subspace)
        for index, result in zip(usable, found, strict=True):
            results[index] = result
    return results


def _factored(batch: list[Due], norms: Tensor, subspace: Subspace) -> list[Result]:
    grads = [item.grad for item in batch]
    stack = grads[0].unsqueeze(0) if len(grads) == 1 else torch.stack(grads)
    matrices = stack if batch[0].state["side"] == Side.LEFT else stack.mT
    request = Request(
        matrices=matrices,
        norms=norms,
        rank=min(batch[0].rank, *stack.shape[1:]),
        previous=[item.previous for item in batch],
        seeds=[item.seed for item in batch],
        power_iterations=subspace.power_iterations,
        measured=subspace.residual_energy is not None,
        blends=_blends(batch, matrices, subspace.interpolation),
    )
    try:
        found = RANGE_FINDERS[subspace.range_finder](request)
    except torch.linalg.LinAlgError as error:
        if len(batch) == 1:
            return [Result(f"the factorization failed: {error}")]
        each = enumerate(batch)
        return [_factored([item], norms[i : i + 1], subspace)[0] for i, item in each]
    return _judged(batch, found, subspace)


def _blends(batch: list[Due], matrices: Tensor, rho: float) -> Tensor | None:
    """rho P M / c1 + (1 - rho) G of each, in the form of `matrices`; None without a rho, and before
    the first basis.

    Source: LDAdam (arXiv 2410.16103), its rule for P, from secondary sources.
    """
    if not rho or batch[0].previous is None:
        return None
    blends = []
    for item, matrix in zip(batch, matrices, strict=True):
        side = Side(item.state["side"])
        exp_avg, _ = loaded(Stored.of(item.state), channel_groups(side))
        mean = exp_avg if side is Side.LEFT else exp_avg.mT
        # Of moments that have seen no step there is none, and they are zero.
        share = rho / (_corrections(item, item.state).first or 1.0)
        share = -share if item.maximize else share
        wide = moment_dtype(matrix.dtype)
        basis = loaded_basis(item.state).to(wide)
        blend = torch.addmm(matrix.to(wide), basis, mean.to(wide), beta=1 - rho, alpha=share)
        blends.append(blend)
    return blends[0].unsqueeze(0) if len(blends) == 1 else torch.stack(blends)


def _corrections(item: Due, state: State) -> Corrections:
    steps = item.completed - state["moments_step"]
    return Corrections(*(1 - beta**steps for beta in item.betas))


def take(item: Due, result: Result, subspace: Subspace, problems: Problems) -> None:
    """Writes a new basis and all that depends on it, or counts why there is none.

    Args:
        item: whose states are changed; of its gradient nothing is read.
        result: what was found for it.
        subspace: what becomes of the moments.
        problems: names of the matrices without a new basis, by the reason; one may be added.
    """
    basis, turn = result.basis, result.turn
    if basis is None:
        for state in item.states:
            state["kept"] += 1
        problems.setdefault(result.problem, []).append(item.name)
        return
    rank, previous = basis.shape[1], item.previous
    if turn is None and previous is not None:
        turn = _turn(basis, previous)
    for state in item.states:
        if turn is not None:
            state["overlap"] = result.share
            _transfer_moments(item, state, turn, subspace.moments)
            note_overlap(state, result.share, subspace)
        elif rank != state["basis"].shape[1]:
            # Before the first basis the moments are zero: this only gives them their shape.
            unknown = basis.new_zeros(rank, state["basis"].shape[1])
            _transfer_moments(item, state, unknown, "keep")
        state["rank"] = rank
        state["basis_step"] = item.completed
        state["refreshes"] += 1
        state["captured"] = result.captured
        state["fallbacks"] += int(result.slow)
        state["deficient"] += int(result.deficient)
    for name, value in basis_entries(basis, item.state["basis"].dtype).items():
        _store(item.state, name, value)
        for state in item.others:
            state[name] = item.state[name]


def _judged(batch: list[Due], found: Found, subspace: Subspace) -> list[Result]:
    """The bases with as many directions as they may keep, turned to the old ones."""
    finite = found.bases.isfinite().all((1, 2)) & found.energies.isfinite().all(1)
    usable = on_host(finite).tolist()
    every_energy = on_host(found.energies).tolist()
    results, turned = [], []
    for index, item in enumerate(batch):
        if not usable[index]:
            results.append(Result("the factorization is not finite"))
            continue
        energies = every_energy[index]
        rank = adaptive_rank(energies, subspace)
        basis, turn = _turned(item, found.bases[index, :, :rank], found.signed)
        slow, deficient = bool(found.slow[index]), energies[-1] <= found.noise
        captured = min(1.0, sum(energies[:rank]))
        results.append(Result("", basis, captured, slow, deficient, turn))
        if turn is not None:
            turned.append(index)
    shares = [_share(results[index].turn) for index in turned]
    known = on_host(torch.stack(shares)).tolist() if shares else []
    for index, share in zip(turned, known, strict=True):
        results[index] = results[index]._replace(share=share)
    return results


def _share(turn: Tensor | None) -> Tensor:
    assert turn is not None
    return turn.square().sum() / min(turn.shape)


def _turn(basis: Tensor, previous: Tensor) -> Tensor:
    wide = moment_dtype(basis.dtype)
    return basis.to(wide).mT @ previous.to(wide)


def _turned(item: Due, directions: Tensor, signed: bool) -> tuple[Tensor, Tensor | None]:
    """The basis in the dtype of the state's, turned to the old one, and C = P_new^T P_old."""
    # As it will be held, since all that follows is computed with that.
    basis = loaded_basis(basis_entries(directions, item.state["basis"].dtype))
    overlap, previous = None, item.previous
    if previous is not None:
        overlap = _turn(basis, previous)
    if not signed:
        signs = _signs(basis, overlap)
        basis = basis.mul_(signs)
        overlap = None if overlap is None else overlap.mul_(signs.unsqueeze(1))
    return basis, overlap


def _signs(basis: Tensor, overlap: Tensor | None) -> Tensor:
    """1 or -1 for every column, so that it points to the same side as the old one in its place, and
    without one so that its largest entry is positive.

    A factorization leaves the signs to its rounding errors, and moments that are kept would then
    point against half of the new directions.
    """
    sides = basis.gather(0, basis.abs().argmax(0, keepdim=True)).squeeze(0)
    if overlap is not None:
        aligned = overlap.diagonal()
        sides = torch.cat([aligned, sides[len(aligned) :].to(aligned.dtype)])
    return torch.ones_like(sides, dtype=basis.dtype).masked_fill_(sides < 0, -1.0)


def _transfer_moments(item: Due, state: State, overlap: Tensor, how: str) -> None:
    if how == "keep" and overlap.shape[0] == overlap.shape[1]:
        return
    side, stored = Side(state["side"]), Stored.of(state)
    groups = channel_groups(side)
    old = Moments(*loaded(stored, groups))
    new = transferred(how, old, overlap, side, _corrections(item, state))
    if new.exp_avg.shape != stored.exp_avg.shape:
        dtype, device = stored.exp_avg.dtype, stored.exp_avg.device
        stored = new_stored(new.exp_avg.shape, dtype, device, groups)
        state |= {key: value for key, value in stored._asdict().items() if value is not None}
    # To the nearest: once an interval, that stops nothing.
    store(stored, *new, groups)
    if how == "reset":
        state["moments_step"] = item.completed


def _store(state: State, name: str, value: Tensor) -> None:
    """In place where it fits, as captured graphs need it; else as a new tensor, all its own."""
    if state[name].shape == value.shape:
        state[name].copy_(value)
    else:
        state[name] = value.clone(memory_format=torch.contiguous_format)
