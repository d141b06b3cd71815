"""Factors that are out of balance are made anew: the same product, B^T B = A A^T."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.optimizer import Optimizer

from ..linears import without_autocast
from ..subspace.orthonormal import orthonormalized
from .linear import FactoredLinear, factored_in, is_plain, lower_rank

# Of factors whose copies, in float32, are there at the same time.
MOST_ELEMENTS = 2**25


class Balanced(NamedTuple):
    """Of a batch of products: left diag(values) right, with orthonormal columns and rows.

    Attributes:
        left: batch x m x r.
        values: batch x r, singular values, largest first.
        right: batch x r x n.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def refactorize(
    modules: nn.Module | Iterable[nn.Module],
    shrink: float = 0.0,
    *,
    optimizer: Optimizer | None = None,
    process_group: ProcessGroup | None = None,
) -> None:
    """Balances the factors of `FactoredLinear` modules, whose functions stay what they are.

    B <- U sqrt(s), A <- sqrt(s) Z^T of the singular value decomposition of B A, found from QR
    decompositions of B and A^T and the SVD of an r x r matrix; neither m x n nor W is formed.
    Equal shapes go together. It is computed in float32, of float64 factors in float64, and rounded
    to the factors' dtype: of bfloat16 ones the function changes by that. Sparse values, biases and
    `scale` stay. Factors whose product is 0, as B is at the start of a sparse one, are left alone:
    balanced ones would both be 0, and so their gradients, for ever.

    Gradients of the factors are dropped, since they are of the old ones. So is what an optimizer
    keeps of past ones, if it is given; `Restarts` gives its own.

    Shards of FSDP2 are gathered, computed on every rank, and spread anew. Under DDP all ranks
    compute the same; where they might not, in devices of several kinds, pass `process_group`.

    Args:
        modules: a model, or modules: all factored ones in there.
        shrink: what singular values of scale B A lose, until they are 0: the proximal step of so
            much times the nuclear norm. Directions that are 0 then are cut off, so that ranks fall,
            though never below 1; parameters stay the same objects, with a smaller shape. The idea
            is SoRA's (Ding et al., arXiv 2311.11696), whose gates it thresholds.
        optimizer: over the factors; needed with `shrink`, which its state could not follow.
        process_group: whose first rank sends its result to the others.

    Raises:
        TypeError: `modules` holds something else.
        ValueError: there is no factored module; factors are not finite, or on the meta device;
            `shrink` is negative or not finite, goes without an optimizer, with shards, or with
            several processes, whose DDP knows the old shapes; the optimizer has other parameters.
            Nothing was changed.

    Source: Glentis et al. (arXiv 2505.22922), which takes the SVD of the m x n product.
    """
    found = checked_modules(modules, shrink, optimizer, process_group)
    check_values(found)
    for alike in _batches(found.values()):
        _refactorize(alike, float(shrink), process_group)
    if optimizer is not None:
        for param in factors_of(found.values()):
            optimizer.state.pop(param, None)


def checked_modules(
    modules: nn.Module | Iterable[nn.Module],
    shrink: float,
    optimizer: Optimizer | None,
    process_group: ProcessGroup | None,
) -> dict[str, FactoredLinear]:
    """The factored modules, by name; raises what `refactorize` does, but for values."""
    found = factored_in(modules)
    if not found:
        raise ValueError(
            "there is no FactoredLinear among the modules: factorize(model, rank) makes them"
        )
    number = isinstance(shrink, (int, float)) and not isinstance(shrink, bool)
    if not number or not 0 <= shrink < math.inf:
        raise ValueError(f"shrink must be a finite number of at least 0, got {shrink!r}")
    if optimizer is not None:
        _check_optimizer(found, optimizer)
    if not shrink:
        return found
    if optimizer is None:
        raise ValueError(
            f"shrink={shrink} changes the shapes of B and A, which their optimizer has to know:"
            " pass optimizer=, or use Restarts(optimizer, modules, shrink=...)"
        )
    for name, module in found.items():
        if not (is_plain(module.B) and is_plain(module.A)):
            raise ValueError(
                f"shrink={shrink}: the factors of {name} are of type {type(module.B).__name__},"
                " whose shapes cannot change: leave shrink out"
            )
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several or process_group is not None:
        raise ValueError(
            f"shrink={shrink} in one of several processes: DDP has buckets of the old shapes, and"
            " ranks might cut differently: leave shrink out, or shrink in one process and load"
            " what it saves"
        )
    return found


def check_values(found: dict[str, FactoredLinear]) -> None:
    """Raises ValueError if factors are not finite, or not there."""
    for name, module in found.items():
        for letter, factor in (("B", module.B), ("A", module.A)):
            if factor.is_meta:
                raise ValueError(f"{name}.{letter} is on the meta device, and has no values")
            # Of shards the whole, so that all ranks raise or none.
            if not bool(_whole(factor).isfinite().all()):
                raise ValueError(
                    f"{name}.{letter}, {tuple(factor.shape)} {factor.dtype}, has values that are"
                    " not finite: go back to a checkpoint before them"
                )


def factors_of(modules: Iterable[FactoredLinear]) -> Iterator[nn.Parameter]:
    for module in modules:
        yield from (module.B, module.A)


def _check_optimizer(found: dict[str, FactoredLinear], optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be one of torch, got {type(optimizer).__name__}")
    known = {param for group in optimizer.param_groups for param in group["params"]}
    for name, module in found.items():
        for letter, factor in (("B", module.B), ("A", module.A)):
            if factor.requires_grad and factor not in known:
                raise ValueError(
                    f"{name}.{letter} is not a parameter of the optimizer: make the optimizer after"
                    " factorize and fully_shard, over the model's parameters"
                )


def _batches(modules: Iterable[FactoredLinear]) -> Iterator[list[FactoredLinear]]:
    """Equal ones, as many at a time as the memory for copies allows."""
    alike = defaultdict(list)
    for module in modules:
        alike[module.B.shape, module.A.shape, module.B.dtype, module.B.device].append(module)
    for every in alike.values():
        size = every[0].B.numel() + every[0].A.numel()
        count = max(1, MOST_ELEMENTS // size)
        yield from (every[first : first + count] for first in range(0, len(every), count))


@torch.no_grad()
def _refactorize(
    modules: list[FactoredLinear], shrink: float, process_group: ProcessGroup | None
) -> None:
    wide = torch.promote_types(modules[0].B.dtype, torch.float32)
    B, A = (
        torch.stack([_whole(factor).to(wide) for factor in factors])
        for factors in ([each.B for each in modules], [each.A for each in modules])
    )
    with without_autocast(B.device):
        left, values, right = balanced(B, A)
    scales = torch.tensor([abs(each.scale) for each in modules], dtype=wide, device=B.device)
    lower = (values - shrink / scales.unsqueeze(1)).clamp(min=0)
    roots = lower.sqrt()
    # What is 0 already would have no gradient any more.
    there = values[:, :1, None] > 0
    B = torch.where(there, left * roots.unsqueeze(1), B)
    A = torch.where(there, roots.unsqueeze(2) * right, A)
    if process_group is not None:
        for factors in (B, A):
            first = dist.get_global_rank(process_group, 0)
            dist.broadcast(factors, first, group=process_group)
    ranks = [module.rank for module in modules]
    if shrink:
        kept = torch.where(there[:, 0, 0], (lower > 0).sum(1), B.shape[2])
        ranks = kept.clamp(min=1).tolist()
    for module, rank, one, other in zip(modules, ranks, B, A, strict=True):
        if rank < module.rank:
            lower_rank(module, one[:, :rank], other[:rank])
            continue
        for param, new in ((module.B, one), (module.A, other)):
            _write(param, new)
            param.grad = None


def balanced(B: Tensor, A: Tensor) -> Balanced:
    """The singular value decomposition of products, without forming them.

    Args:
        B: batch x m x r with r <= m, finite, float32 or float64.
        A: batch x r x n with r <= n, alike.
    """
    left, _ = orthonormalized(B)
    right, _ = orthonormalized(A.mT.contiguous())
    inner = (left.mT @ B) @ (A @ right)
    turn, values, other_turn = torch.linalg.svd(inner)
    return Balanced(left @ turn, values, other_turn @ right.mT)


def _whole(param: Tensor) -> Tensor:
    """All of a parameter, on every rank."""
    return param if is_plain(param) else param.full_tensor()  # type: ignore[attr-defined]


def _write(param: Tensor, new: Tensor) -> None:
    """In place; of shards, each rank its own, as the first one has computed them."""
    new = new.to(param.dtype)
    if not is_plain(param):
        # Imported for those who have DTensors.
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(param, DTensor)
        new = distribute_tensor(new, param.device_mesh, param.placements)
    param.copy_(new)
