"""What the kernel benches run: batches of equal matrices, and a check of who is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from bench import hybrid
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
METHODS = {"galore": None, "fira": Residual(kappa=0.25, rho=1.0)}
OPERATIONS = ("project_moments", "channel_scale", "back_project_update")
STEP = "step"
PLAIN = "torch"
ADAM = AdamScalars(0.9, 0.999, 1e-8)
SCALARS = Scalars(ADAM, scale=0.25, step_size=1e-4, decay=1e-5)


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


class Candidate:
    """A backend on a case: the three operations one by one, with what each hands to the next.

    It is prepared once for each set of inputs, as an optimizer prepares it once for its matrices.
    """

    def __init__(self, module: ModuleType, case: Case):
        self.module, self.case = module, case
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
        operations.back_project_update(matrices, projection, factor, SCALARS)

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


def check(case: Case, modules: dict[str, ModuleType], inputs: Inputs) -> dict[str, list[str]]:
    """What of each candidate errs more than twice as much as plain torch; empty if nothing does."""
    exact_inputs = inputs.to(torch.float64)
    exact = _outputs(exact_inputs, Candidate(load("reference"), case).step(exact_inputs))
    errors = {}
    for name, module in {PLAIN: hybrid, **modules}.items():
        own = inputs.to()
        got = _outputs(own, Candidate(module, case).step(own))
        errors[name] = {key: _distance(got[key], exact[key]) for key in exact}
    floors = {key: torch.finfo(got[key][0].dtype).eps * _norm(exact[key]) for key in exact}
    return {
        name: [key for key, error in errors[name].items()
               if not error <= 2 * max(errors[PLAIN][key], floors[key])]
        for name in modules
    }  # fmt: skip


def _outputs(x: Inputs, results: tuple[Projection, Tensor | None]) -> dict[str, Sequence[Tensor]]:
    projection, factor = results
    outputs = {
        "direction": list(projection.direction),
        "projected": list(projection.projected),
        "exp_avg": x.exp_avgs,
        "exp_avg_sq": x.exp_avg_sqs,
        "param": x.params,
    }
    if factor is not None:
        outputs["factor"] = list(factor)
    return outputs


def _distance(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return _norm([g.double() - e for g, e in zip(got, exact, strict=True)])


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())
