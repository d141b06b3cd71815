"""Whether a model can be trained in so much memory, and with how many tokens at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor, nn

from ..optim.groups import is_projected
from ..optim.lowrank_adamw import LowRankAdamW
from ..optim.workspace import Workspace, planned_alone, planned_workspace
from .dry_offload import AHEAD, IN_FLIGHT
from .rehearsal import Conditions, Rehearsal, rehearse

# Of a GPU: CUDA's context with the code of its kernels, workspaces of cuBLAS, and what torch's
# allocator holds in pieces that fit nothing. An estimate; the rest of a plan is counted.
CUDA_ALLOWANCE = 768 * 2**20
# Between which numbers of tokens are looked for that fit.
FEWEST_TOKENS, MOST_TOKENS = 32, 2**24

Part = Literal["forward", "backward", "step", "refresh"]


@dataclass(frozen=True)
class Training:
    """How a model is trained, beside its optimizer.

    Attributes:
        device_type: "cpu" or "cuda".
        memory: bytes of the device; None for a small one.
        checkpointing: each block's activations are computed again in the backward pass.
        recompute: those of `recompute_activations` are.
        project: gradients are R, by `project_linears`.
        release: each gradient is freed in the backward pass, by `release_gradients`.
        accumulate: several backward passes make a step.
        offload: share of what a forward pass saves that `offload_activations` takes away, from 0 to
            1, the first part of it: as with its `keep`, which is the rest.

    Raises:
        ValueError: release with accumulate, or an offload that is no share.
    """

    device_type: str = "cuda"
    memory: int | None = None
    checkpointing: bool = False
    recompute: bool = False
    project: bool = False
    release: bool = False
    accumulate: bool = False
    offload: float = 0.0

    def __post_init__(self) -> None:
        if self.release and self.accumulate:
            raise ValueError(
                "release and accumulate exclude each other: what is released adds up to nothing"
            )
        if not 0 <= self.offload <= 1:
            raise ValueError(f"offload must be between 0 and 1, got {self.offload!r}")

    @property
    def allowance(self) -> int:
        """Held beside all tensors."""
        return CUDA_ALLOWANCE if self.device_type == "cuda" else 0


class Activations(NamedTuple):
    """What a micro-batch takes.

    Attributes:
        saved: bytes at the end of the forward pass.
        forward: the most that is held in it beside weights and state.
        backward: in the backward pass, gradients and, if they are released, steps included.
        out: bytes that are taken away meanwhile. What waits for that, and what is read ahead, is in
            the others, as much as `offload_activations` lets it be by default.
        products: operations of the matrix products in the forward pass, where something is taken
            away; attention's own are left out.
    """

    saved: int
    forward: int
    backward: int
    out: int = 0
    products: int = 0


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes of a training run.

    Attributes:
        tokens: in a micro-batch; None where only weights, gradients and state are known.
        weights: with buffers.
        gradients: when a backward pass ends; the largest one if each is released.
        state: of the optimizer.
        workspace: of its step and of new bases.
        activations: what a micro-batch takes.
        peaks: the most that is held in each part of a step, weights and state included.
        allowance: held beside all tensors, as by CUDA.
    """

    tokens: int | None
    weights: int
    gradients: int
    state: int
    workspace: Workspace
    activations: Activations | None
    peaks: dict[Part, int] = field(default_factory=dict)
    allowance: int = 0

    @property
    def total(self) -> int:
        return max(self.peaks.values()) + self.allowance

    @property
    def at(self) -> Part:
        """The part of a step in which the most is held."""
        return max(self.peaks, key=self.peaks.__getitem__)


class Planner:
    """Plans one model for several optimizers and numbers of tokens; what they have in common is
    found once.

    Args:
        model: of transformers, on the meta device; nothing is allocated.
        training: how it is trained.

    See `plan_training`.
    """

    def __init__(self, model: nn.Module, training: Training) -> None:
        self._model, self.training = model, training
        self._conditions = Conditions(
            training.device_type,
            training.memory,
            training.checkpointing,
            training.recompute,
            offload=training.offload,
        )
        self._rehearsals: dict[tuple[int, int], list[Rehearsal]] = {}
        # Kept, since the keys above and below are their addresses.
        self._optimizers: list[LowRankAdamW] = []
        self._needs: dict[int, tuple[int, Workspace, dict[Tensor, Workspace]]] = {}

    def plan(self, optimizer: LowRankAdamW | None, tokens: int | None) -> TrainingPlan:
        """See `plan_training`; without tokens it has no activations."""
        passes = [] if tokens is None else self._passes(optimizer, tokens)
        return self._plan(optimizer, tokens, passes)

    def most_tokens(self, optimizer: LowRankAdamW | None, memory: int) -> int:
        """The largest number of tokens that fits, or some fewer; 0 where the fewest do not.

        Between two numbers that were rehearsed a straight line lies above what is held at the peak,
        which is the largest of several sums that each are linear in tokens.
        """

        def fits(tokens: int, passes: list[Rehearsal]) -> bool:
            return self._plan(optimizer, tokens, passes).total <= memory

        few, large = 0, FEWEST_TOKENS
        while fits(large, self._passes(optimizer, large)):
            few, large = large, 8 * max(large, 256)
            if large > MOST_TOKENS:
                return few
        if few == 0:
            return 0
        ends = list(zip(*(self._passes(optimizer, end) for end in (few, large)), strict=True))
        low, high = few, large
        while high - low > 1:
            tokens = (low + high) // 2
            share = (tokens - few) / (large - few)
            passes = [first.between(second, share) for first, second in ends]
            low, high = (tokens, high) if fits(tokens, passes) else (low, tokens)
        return low

    def _plan(
        self, optimizer: LowRankAdamW | None, tokens: int | None, passes: list[Rehearsal]
    ) -> TrainingPlan:
        training, params = self.training, list(self._model.parameters())
        weights = sum(map(_bytes, [*params, *self._model.buffers()]))
        whole = [_bytes(param) for param in params if param.requires_grad]
        state, workspace, alone = self._needs_of(optimizer)
        held = weights + state + workspace.held
        releases = training.release and optimizer is not None
        gradients, activations, peaks = sum(whole), None, dict[Part, int]()
        if passes:
            gradients = max(each.gradients for each in passes)
            activations = _activations(passes, training.accumulate, alone if releases else None)
            peaks["forward"] = held + activations.forward
            peaks["backward"] = held + activations.backward
        if releases:
            gradients = max(whole, default=0)
        if not (releases and passes):
            # Otherwise they are parts of the backward pass.
            peaks["step"] = held - workspace.held + gradients + workspace.step
            peaks["refresh"] = held - workspace.held + gradients + workspace.refresh
        return TrainingPlan(
            tokens, weights, gradients, state, workspace, activations, peaks, training.allowance
        )

    def _passes(self, optimizer: LowRankAdamW | None, tokens: int) -> list[Rehearsal]:
        own = optimizer if self.training.project and projects(optimizer) else None
        key = tokens, id(own)
        if key not in self._rehearsals:
            conditions = self._conditions._replace(project=own)
            self._rehearsals[key] = rehearse(self._model, tokens, conditions)
        return self._rehearsals[key]

    def _needs_of(
        self, optimizer: LowRankAdamW | None
    ) -> tuple[int, Workspace, dict[Tensor, Workspace]]:
        """State, workspace of a step, and of those of each parameter where they are released."""
        if optimizer is None:
            state = sum(map(adamw_bytes, self._model.parameters()))
            return state, Workspace(0, 0), {}
        if id(optimizer) not in self._needs:
            self._optimizers.append(optimizer)
            state = sum(row["state_bytes"] for row in optimizer.plan())
            training, projected = self.training, set[Tensor]()
            where = training.device_type, training.memory
            if training.project and projects(optimizer):
                projected = {
                    param
                    for group in filter(is_projected, optimizer.param_groups)
                    for param in group["params"]
                }
            if training.release:
                alone = planned_alone(optimizer, *where, projected)
                workspace = Workspace(*(max(each) for each in zip(*alone.values(), strict=True)))
            else:
                alone, workspace = {}, planned_workspace(optimizer, *where, projected)
            self._needs[id(optimizer)] = state, workspace, alone
        return self._needs[id(optimizer)]


def plan_training(
    model: nn.Module,
    optimizer: LowRankAdamW | None = None,
    tokens: int = 2048,
    training: Training | None = None,
) -> TrainingPlan:
    """What one step of training takes, found without taking it.

    The model runs forward and backward on the meta device, by its own code and by torch's kernels'
    shapes, so that what is counted is what torch allocates, to the byte: activations of any model
    and temporaries, of the optimizer's step, too. Not counted are what single operations of a
    device keep while they run, and what CUDA and its allocator hold, for which there is an
    allowance.

    Where the peak of a step is depends on what is left out. Of activations it is at the head, when
    the backward pass begins: all is saved then, and the loss of a vocabulary V takes 12 bytes for
    each entry and token, three times float32, beside 2 for its gradient in half precision. As it
    goes on, gradients come and activations go: where all gradients take more than all activations,
    as in large models with few tokens, the peak is at the end of the backward pass or in the step.

    Args:
        model: of transformers, on the meta device: `with torch.device("meta")`. It takes
            `input_ids` and `labels`.
        optimizer: over its parameters; None for torch's AdamW, fused.
        tokens: in a micro-batch.
        training: how it is trained.

    Raises:
        ValueError: `project` with an optimizer that takes whole gradients.
    """
    training = training or Training()
    if training.project and not projects(optimizer):
        name = "AdamW" if optimizer is None else type(optimizer).__name__
        raise ValueError(f"project=True: {name} takes whole gradients")
    return Planner(model, training).plan(optimizer, tokens)


def projects(optimizer: LowRankAdamW | None) -> bool:
    """Whether it takes gradients that are projected."""
    return optimizer is not None and optimizer.residual is None


def adamw_bytes(param: Tensor) -> int:
    """Of torch.optim.AdamW: two moments in the weight's dtype and a float32 step."""
    return 2 * _bytes(param) + 4 if param.requires_grad else 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _activations(
    passes: Iterable[Rehearsal], accumulate: bool, alone: dict[Tensor, Workspace] | None
) -> Activations:
    """The most of some passes.

    Args:
        passes: that differ.
        accumulate: there are gradients before them.
        alone: what each parameter's step takes in the backward pass; None if it takes none there.
    """
    steps = {param: max(each) - each.held for param, each in (alone or {}).items()}
    every = []
    for each in passes:
        before = each.gradients if accumulate else 0
        backward = each.backward_peak
        if accumulate:
            backward = each.backward_peak_of_more()
        elif alone is not None:
            backward = each.backward_peak_of_one(steps)
        waiting = min(each.out, IN_FLIGHT)
        coming = min(each.out - waiting, AHEAD)
        every.append(
            Activations(
                each.saved,
                before + each.forward_peak + waiting,
                backward + waiting + coming,
                each.out,
                each.products,
            )
        )
    # The fewest products leave the least time for what goes out.
    products = min(each.products for each in every)
    return Activations(*map(max, zip(*every, strict=True)))._replace(products=products)
