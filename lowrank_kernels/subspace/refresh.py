"""New bases for matrices that are due, and what happens when there is none."""

import logging
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import Alike, Side
from ..ops.contract import moment_dtype
from ..ops.notices import notice_once
from .moments import Corrections, Moments, moved
from .options import Subspace
from .range_finders import RANGE_FINDERS, Found, Request, sketch_bytes
from .rank import adaptive_rank
from .when import lazier

State = dict[str, Any]
Problems = dict[str, list[str]]

ZERO_GRADIENT = "the gradient is zero"

# Of the gradients that are stacked for one batched factorization. It bounds the memory of a
# refresh: about three matrices of the largest size, however many are due.
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
    """

    name: str
    grad: Tensor
    state: State
    rank: int
    completed: int
    seed: int
    betas: tuple[float, float]


def new_record() -> State:
    """The part of a matrix' state that tells of its bases.

    basis_step     completed steps when the basis was computed, -1 for none yet
    moments_step   completed steps when the moments were last reset
    refreshes      bases so far
    captured       energy of the gradient that the basis held when it was computed, 0 to 1
    overlap        |P_new^T P_old|^2 / min(r_new, r_old) of the last change, 0 for none
    kept           refreshes that failed and left the old basis
    fallbacks      refreshes whose fast factorization failed, so that the slow one was taken
    deficient      refreshes from a gradient of a lower rank than the basis
    gap_factor     lazy refreshes: by how much the interval has grown
    """
    return {
        "basis_step": -1,
        "moments_step": 0,
        "refreshes": 0,
        "captured": 0.0,
        "overlap": 0.0,
        "kept": 0,
        "fallbacks": 0,
        "deficient": 0,
        "gap_factor": 1,
    }


def refresh_bases(due: Sequence[Due], subspace: Subspace) -> None:
    """Gives each matrix a new basis, or counts why it keeps the old one.

    A basis is never computed from a zero or non-finite gradient, and a failed factorization changes
    nothing but `kept`. Equal matrices are factored together. The device is waited for a few times a
    batch: to look at the gradients, at the factorizations, at the energies and at the overlaps.
    """
    problems: Problems = {}
    for batch in _batches([item for item in due if item.grad.numel()]):
        _refresh_batch(batch, subspace, problems)
    for problem, names in problems.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        # Checkpoint libraries create the state by a step with zero gradients.
        level = logging.INFO if problem == ZERO_GRADIENT else logging.WARNING
        notice_once(level, f"a basis was not renewed: {problem}: {names[0]}{others}")


def _batches(due: Sequence[Due]) -> Iterator[list[Due]]:
    alike: dict[Hashable, list[Due]] = {}
    for item in due:
        grad = item.grad
        layout = grad.shape, grad.stride(), grad.dtype, grad.device
        previous = _previous(item)
        # A warm start takes as many columns from each of a batch, and its result must not depend on
        # who else is there.
        known = 0 if previous is None else previous.shape[1]
        kind = *layout, item.state["side"], item.rank, known
        alike.setdefault(kind, []).append(item)
    for equal in alike.values():
        size = _batch_size(equal[0].grad.numel())
        for start in range(0, len(equal), size):
            yield equal[start : start + size]


def _batch_size(elements: int) -> int:
    return max(1, BATCH_ELEMENTS // elements)


def workspace_bytes(alike: Alike, subspace: Subspace) -> int:
    """Bytes of temporaries at the peak of a refresh by "randomized" or "power", an upper bound.

    A basis computed by a slow factorization, after a fast one failed, can take more.
    """
    batch = min(alike.matrices, _batch_size(alike.numel))
    rank, device = min(alike.rank, *alike.shape), torch.device(alike.device_type)
    stack = batch * alike.numel * alike.dtype.itemsize if batch > 1 else 0
    measured = subspace.residual_energy is not None
    sketches = sketch_bytes(batch, alike.depth, alike.channels, rank, alike.dtype, device, measured)
    return stack + max(sketches, _taken_bytes(alike, batch, rank, subspace))


def _taken_bytes(alike: Alike, batch: int, rank: int, subspace: Subspace) -> int:
    """Of what was found and the overlaps, and of one matrix' previous basis and moved moments."""
    wide = moment_dtype(alike.dtype).itemsize
    basis, low = alike.depth * rank, alike.channels * rank
    moved = {"keep": 0, "carry_ldadam": 6}.get(subspace.moments, 4) * low
    found = batch * (wide + alike.dtype.itemsize) * basis + wide * batch * rank**2
    return found + wide * (2 * rank**2 + max(2 * basis, moved))


def _refresh_batch(batch: list[Due], subspace: Subspace, problems: Problems) -> None:
    # A norm of a large half-precision gradient overflows in its own dtype.
    norms = torch.stack([torch.linalg.vector_norm(i.grad, dtype=torch.float64) for i in batch])
    usable = []
    for index, norm in enumerate(norms.tolist()):
        if 0 < norm < float("inf"):
            usable.append(index)
        else:
            _keep(
                batch[index], ZERO_GRADIENT if norm == 0 else "its gradient is not finite", problems
            )
    _factor([batch[index] for index in usable], norms[usable], subspace, problems)


def _factor(batch: list[Due], norms: Tensor, subspace: Subspace, problems: Problems) -> None:
    if not batch:
        return
    side = Side(batch[0].state["side"])
    grads = [item.grad for item in batch]
    stack = grads[0].unsqueeze(0) if len(grads) == 1 else torch.stack(grads)
    request = Request(
        matrices=stack if side is Side.LEFT else stack.mT,
        norms=norms,
        rank=min(batch[0].rank, *stack.shape[1:]),
        previous=[_previous(item) for item in batch],
        seeds=[item.seed for item in batch],
        power_iterations=subspace.power_iterations,
        measured=subspace.residual_energy is not None,
    )
    try:
        found = RANGE_FINDERS[subspace.range_finder](request)
    except torch.linalg.LinAlgError as error:
        if len(batch) == 1:
            _keep(batch[0], f"the factorization failed: {error}", problems)
            return
        for index, item in enumerate(batch):
            _factor([item], norms[index : index + 1], subspace, problems)
        return
    finite = found.bases.isfinite().all((1, 2)) & found.energies.isfinite().all(1)
    taken = []
    for index, usable in enumerate(finite.tolist()):
        if usable:
            taken.append(index)
        else:
            _keep(batch[index], "the factorization is not finite", problems)
    _take([batch[index] for index in taken], found, taken, subspace)


def _keep(item: Due, problem: str, problems: Problems) -> None:
    item.state["kept"] += 1
    problems.setdefault(problem, []).append(item.name)


class _Change(NamedTuple):
    """A new basis in the dtype of the state's, and C = P_new^T P_old if there was an old one."""

    basis: Tensor
    overlap: Tensor | None


def _take(batch: list[Due], found: Found, places: list[int], subspace: Subspace) -> None:
    """Writes the new bases and all that hangs on them."""
    every_energy = found.energies.tolist()
    energies = [every_energy[place] for place in places]
    changes = []
    for item, place, each in zip(batch, places, energies, strict=True):
        rank = len(each)
        if subspace.residual_energy is not None:
            rank = adaptive_rank(
                each, subspace.residual_energy, subspace.min_rank, subspace.rank_multiple
            )
        changes.append(_changed(item, found.bases[place, :, :rank], found.signed))
    shares = _shares([change.overlap for change in changes])
    for item, place, each, change, share in zip(
        batch, places, energies, changes, shares, strict=True
    ):
        state, (basis, overlap) = item.state, change
        rank = basis.shape[1]
        if overlap is not None:
            state["overlap"] = share
            _move_moments(item, overlap, subspace.moments)
            _note_overlap(state, share, subspace)
        elif rank != state["basis"].shape[1]:
            # Before the first basis the moments are zero: moving them only gives them their shape.
            _move_moments(item, basis.new_zeros(rank, state["basis"].shape[1]), "keep")
        _put(state, "basis", basis)
        state["rank"] = rank
        state["basis_step"] = item.completed
        state["refreshes"] += 1
        state["captured"] = min(1.0, sum(each[:rank]))
        state["fallbacks"] += int(found.slow[place])
        state["deficient"] += int(each[-1] <= found.noise)


def _changed(item: Due, directions: Tensor, signed: bool) -> _Change:
    basis, previous = directions.to(item.state["basis"].dtype), _previous(item)
    overlap = None
    if previous is not None:
        wide = item.state["exp_avg"].dtype
        overlap = basis.to(wide).mT @ previous.to(wide)
    if not signed:
        signs = _signs(basis, overlap)
        basis = basis.mul_(signs)
        overlap = None if overlap is None else overlap.mul_(signs.unsqueeze(1))
    return _Change(basis, overlap)


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


def _shares(overlaps: list[Tensor | None]) -> list[float]:
    """|C|^2 / min(r_new, r_old) of each, 0 where there was no old basis."""
    known = [c.square().sum() / min(c.shape) for c in overlaps if c is not None]
    shares = iter(torch.stack(known).tolist() if known else [])
    return [0.0 if overlap is None else next(shares) for overlap in overlaps]


def _previous(item: Due) -> Tensor | None:
    basis: Tensor = item.state["basis"]
    return basis if item.state["basis_step"] >= 0 else None


def _move_moments(item: Due, overlap: Tensor, how: str) -> None:
    if how == "keep" and overlap.shape[0] == overlap.shape[1]:
        return
    state, steps = item.state, item.completed - item.state["moments_step"]
    corrections = Corrections(*(1 - beta**steps for beta in item.betas))
    old = Moments(state["exp_avg"], state["exp_avg_sq"])
    new = moved(how, old, overlap, Side(state["side"]), corrections)
    for name, moment in new._asdict().items():
        _put(state, name, moment)
    if how == "reset":
        state["moments_step"] = item.completed


def _put(state: State, name: str, value: Tensor) -> None:
    """In place where it fits, as captured graphs need it; else as a new tensor, all its own."""
    if state[name].shape == value.shape:
        state[name].copy_(value)
    else:
        state[name] = value.clone(memory_format=torch.contiguous_format)


def _note_overlap(state: State, share: float, subspace: Subspace) -> None:
    if subspace.lazy is None:
        return
    overlaps = state["overlaps"].roll(-1)
    overlaps[-1] = share
    state["overlaps"] = overlaps
    state["gap_factor"] = lazier(
        state["overlaps"], state["refreshes"], state["gap_factor"], subspace
    )
