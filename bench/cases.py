"""What the kernel benches run: batches of equal matrices, and a check of who is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from bench import hybrid
from bench.timing import copies_beyond_cache
from lowrank_kernels.ops import (
    AdamScalars,
    Matrices,
    Operations,
    Projection,
    Residual,
    Scalars,
    Side,
    load,
)
from lowrank_kernels.ops.contract import basis_shape, projected_shape, rank_axis

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
METHODS = {
    "galore": None,
    "fira": Residual(kappa=0.25, rho=1.0),
    "fira-paper": Residual(kappa=1.0, rho=0.25),
}
OPERATIONS = ("project_moments", "channel_scale", "back_project_update")
STEP = "step"
PLAIN = "torch"
ADAM = AdamScalars(0.9, 0.999, 1e-8)
SCALARS = Scalars(ADAM, scale=0.25, step_size=1e-4, decay=1e-5)
# A step as large as the weights: the rounding of a weight would hide a wrong one of a usual size.
LARGE_STEP = Scalars(ADAM, scale=0.25, step_size=8.0, decay=0.25)


@dataclass(frozen=True)
class Case:
    """A batch of equal matrices."""

    rows: int
    cols: int
    rank: int
    dtype: str
    method: str
    matrices: int
    proj_type: str = "std"

    @property
    def side(self) -> Side:
        wide = self.rows < self.cols
        return Side.LEFT if wide == (self.proj_type == "std") else Side.RIGHT

    @property
    def residual(self) -> Residual | None:
        return METHODS[self.method]

    def traffic(self) -> dict[str, tuple[float, float]]:
        """Fewest bytes, and FLOPs, of each operation and of the step they make.

        G, W and P in the run's dtype, M, V, N and R in float32.
        """
        axis = rank_axis(self.side)
        shape = (self.rows, self.cols)
        channels, depth = shape[1 - axis], shape[axis]
        size, fira = DTYPES[self.dtype].itemsize, self.residual is not None
        full, low, basis = (
            channels * depth * size,
            channels * self.rank * 4,
            depth * self.rank * size,
        )
        product = 2.0 * channels * depth * self.rank
        # G, P; M and V read and written; N, and R for Fira, written.
        project = full + basis + low * (6 if fira else 5)
        scale = 16.0 * channels if fira else 0.0
        # W read and written; P, N, and for Fira G and R read.
        update = (3 if fira else 2) * full + basis + low * (2 if fira else 1)
        each = zip((project, scale, update), (product, 0.0, product), strict=True)
        costs = {
            name: (self.matrices * moved, self.matrices * flops)
            for name, (moved, flops) in zip(OPERATIONS, each, strict=True)
        }
        costs[STEP] = tuple(map(sum, zip(*costs.values(), strict=True)))
        return costs


class Inputs(NamedTuple):
    """One set of tensors of a case."""

    params: list[Tensor]
    grads: list[Tensor]
    bases: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    limiter_norms: list[Tensor]

    def to(self, dtype: torch.dtype | None = None) -> Inputs:
        """A copy, in another precision if one is given."""
        return Inputs(*([t.to(dtype or t.dtype, copy=True) for t in each] for each in self))

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for each in self for t in each)


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Gradients of decaying spectrum plus noise, as real ones are; state as in mid-training.

    There V is not far below M^2: one huge quotient would drown all other errors of the direction.
    """
    rng = torch.Generator(device).manual_seed(seed)
    dtype, shape = DTYPES[case.dtype], (case.rows, case.cols)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, device=device)

    def each(make: Callable[[], Tensor]) -> list[Tensor]:
        return [make() for _ in range(case.matrices)]

    inner = min(16, case.rows, case.cols)
    decay = 1 / torch.arange(1, inner + 1, device=device)
    tall, wide = basis_shape(shape, case.side, case.rank)
    low = projected_shape(shape, case.side, case.rank)
    return Inputs(
        params=each(lambda: normal(*shape).to(dtype)),
        grads=each(
            lambda: (
                (normal(case.rows, inner) * decay) @ normal(inner, case.cols) + 0.3 * normal(*shape)
            ).to(dtype)
        ),
        bases=each(lambda: torch.linalg.qr(normal(tall, wide))[0].to(dtype)),
        exp_avgs=each(lambda: 0.1 * normal(*low)),
        exp_avg_sqs=each(lambda: 0.01 * (1 + normal(*low).square())),
        limiter_norms=each(lambda: torch.ones((), device=device)),
    )


def empty_inputs(case: Case, device: torch.device) -> Inputs:
    """Tensors to compile kernels for: these depend on sizes and not on numbers."""
    shape, dtype = (case.rows, case.cols), DTYPES[case.dtype]
    low = projected_shape(shape, case.side, case.rank)
    basis = basis_shape(shape, case.side, case.rank)
    sizes = ((shape, dtype),) * 2 + ((basis, dtype), *((low, torch.float32),) * 2)
    return Inputs(
        *(
            [torch.zeros(size, dtype=kind, device=device) for _ in range(case.matrices)]
            for size, kind in (*sizes, ((), torch.float32))
        )
    )


class Candidate:
    """A backend on a case: the three operations one by one, with what each hands to the next.

    It is prepared once for each set of inputs, as an optimizer prepares it once for its matrices.
    """

    def __init__(self, module: ModuleType, case: Case, scalars: Scalars = SCALARS):
        self.module, self.case, self.scalars = module, case, scalars
        self._prepared: dict[int, tuple[Inputs, Matrices, Operations]] = {}

    def project_moments(self, x: Inputs) -> Projection:
        matrices, operations = self._for(x)
        return operations.project_moments(matrices, ADAM)

    def channel_scale(self, x: Inputs, projection: Projection) -> Tensor | None:
        if projection.sums is None:
            return None
        matrices, operations = self._for(x)
        return operations.channel_scale(matrices, projection.sums)

    def back_project_update(self, x: Inputs, projection: Projection, factor: Tensor | None) -> None:
        matrices, operations = self._for(x)
        operations.back_project_update(matrices, projection, factor, self.scalars)

    def step(self, x: Inputs) -> tuple[Projection, Tensor | None]:
        projection = self.project_moments(x)
        factor = self.channel_scale(x, projection)
        self.back_project_update(x, projection, factor)
        return projection, factor

    def _for(self, x: Inputs) -> tuple[Matrices, Operations]:
        if id(x) not in self._prepared:
            matrices = Matrices(self.case.side, self.case.residual, *x)
            self._prepared[id(x)] = (x, matrices, self.module.Operations(matrices))
        return self._prepared[id(x)][1:]


def input_sets(first: Inputs, device: torch.device) -> list[Inputs]:
    """These inputs and copies of them, more in all than a cache holds."""
    others = copies_beyond_cache(first.bytes, device) - 1
    return [first, *(first.to() for _ in range(others))]


class Oracle:
    """A step of these inputs in float64, and how far one in the dtype of the case may be off it.

    By twice what plain torch errs, or twice a rounding of the result where torch errs less.
    """

    def __init__(self, case: Case, inputs: Inputs):
        self._case, self._inputs = case, inputs
        self._exact = outputs(load("reference"), case, inputs.to(torch.float64))
        plain = outputs(hybrid, case, inputs)
        self._bounds = {
            name: 2 * max(_distance(plain[name], exact), _rounding(plain[name]) * _norm(exact))
            for name, exact in self._exact.items()
        }

    def shares(self, module: ModuleType) -> dict[str, float]:
        """The error of every output of a candidate, as a share of what it may be."""
        got = outputs(module, self._case, self._inputs)
        return {
            name: _distance(got[name], exact) / self._bounds[name]
            for name, exact in self._exact.items()
        }

    def wrong(self, module: ModuleType) -> list[str]:
        """The outputs that err too much, or why there are none."""
        try:
            shares = self.shares(module)
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
        return [name for name, share in shares.items() if not share <= 1]


def check(case: Case, modules: dict[str, ModuleType], inputs: Inputs) -> dict[str, list[str]]:
    """What of each candidate errs more than twice as much as plain torch; empty if nothing does."""
    oracle = Oracle(case, inputs)
    return {name: oracle.wrong(module) for name, module in modules.items()}


def outputs(module: ModuleType, case: Case, inputs: Inputs) -> dict[str, Sequence[Tensor]]:
    """All that a large step of a candidate writes, given a copy of these inputs."""
    own = inputs.to()
    return _outputs(own, Candidate(module, case, LARGE_STEP).step(own))


def _outputs(x: Inputs, results: tuple[Projection, Tensor | None]) -> dict[str, Sequence[Tensor]]:
    projection, factor = results
    found = {
        "direction": list(projection.direction),
        "projected": list(projection.projected),
        "exp_avg": x.exp_avgs,
        "exp_avg_sq": x.exp_avg_sqs,
    }
    if factor is not None:
        found["factor"] = list(factor)
    return {**found, "param": x.params}


def _distance(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return _norm([g.double() - e for g, e in zip(got, exact, strict=True)])


def _rounding(tensors: Sequence[Tensor]) -> float:
    return torch.finfo(tensors[0].dtype).eps


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())
