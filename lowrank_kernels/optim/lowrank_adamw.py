"""The optimizer: AdamW with moments in a subspace, made of parts that its methods choose."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .. import ops
from ..ops import Choice
from ..ops.notices import notice_once
from ..subspace import Readback, Subspace, is_due
from . import report
from .checkpoints import check_loadable, padded, restore, unpadded
from .groups import (
    FORMAT,
    PROJECTION_DEFAULTS,
    Group,
    check_grad,
    check_lr,
    check_matrix,
    check_memory,
    check_options,
    check_params,
    is_projected,
    named_params,
    normalized,
    salts,
    side_of,
)
from .plain import is_dense, step_plain
from .projected import Matrix, Method, phase_of, step_projected
from .schedule import RESIDUAL_FORMS, ResidualForm
from .state import (
    State,
    check_shapes,
    check_storage,
    complete,
    new_plain_state,
    new_projected_state,
)

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS = ("nearest", "stochastic")

logger = logging.getLogger("lowrank_kernels")

Function = TypeVar("Function", bound=Callable[..., Any])


def _as_it_is(function: Function) -> Function:
    return function


# A compiled step would be cut into dozens of graphs, and its kernels are compiled already. The
# public torch.compiler.disable would import dynamo, 1.3 s, together with this package.
_not_compiled: Callable[[Function], Function] = getattr(torch, "_disable_dynamo", _as_it_is)


class _Work(NamedTuple):
    """A parameter with its gradient, the salt of a new state, and, if projected, its backend."""

    name: str
    param: Tensor
    grad: Tensor
    salt: int
    backend: str | None


class LowRankAdamW(Optimizer):
    """AdamW whose moments live in a low-rank subspace of the gradient.

    Groups with a `rank` are projected and take these keys, the same as in `galore-torch` and
    `fira`; groups without one are torch's AdamW:

        rank             r; cut to min(rows, cols) with a notice
        update_proj_gap  T, steps between two bases, default 200
        scale            alpha of the papers (also accepted as `alpha`), default 0.25
        proj_type        "std" (default: the smaller side is compressed, squares on the right),
                         "reverse_std", "left", "right"

    A group with a `scale` and no rank is AdamW at lr * scale: as fast as projected weights, for
    those beside them that are not projected. Its weight decay stays lr * weight_decay.

    Weight decay is decoupled. In projected groups it comes after the update, on the new weight, as
    in the official code: W <- (1 - lr wd)(W - update). `eps` is added to sqrt(V) before the bias
    correction, again as there; the paper form of the residual adds it after.

    A gradient channel that holds NaN or Inf, or a projected entry too large to be squared, is left
    out of the step. A basis is never computed from
    a zero or non-finite gradient: the old one stays and the next step tries again.

    Args:
        params: parameters, (name, parameter) pairs or groups; see `param_groups`.
        lr: learning rate, float or one-element tensor.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        residual: None drops what the basis does not span (GaLore); "official" and "paper" add it,
            scaled and limited, as Fira's code and Fira's algorithm 1 do.
        subspace: a `Subspace`, or the name of a range finder: "randomized" (default), "power",
            "random", or "svd", which computes all bases at once by an exact SVD as the official
            packages do. The named ones spread their refreshes over the steps, except "svd" and
            with `capturable`.
        backend: "auto", "reference", "native" or "triton"; `LOWRANK_BACKEND` overrides it.
        maximize: ascend instead of descend.
        rounding: "nearest", or "stochastic" for the projected bfloat16 weights: a step smaller than
            half a unit in the last place of a weight then moves it in the mean instead of never.
            The noise depends on the parameter's name (its place, without names) and step only.
        capturable: counts steps on the device, so that a CUDA graph can capture a step and replay
            it, with `lr` as a tensor on that device. A replay keeps the basis: take an eager step
            where one is due, every `update_proj_gap` steps. An eager step then waits for the device
            once. It needs state that stays in place: no adaptive rank, no reset moments and no
            criterion.
        monitor: counts non-finite gradients and steps held back by Fira's limiter for `stats`, at
            the cost of a few small launches a matrix.

    Raises:
        ValueError, TypeError: an option or a parameter does not fit; the text names it.
        BackendUnavailable: a backend was named that cannot run in this installation.

    Sources: GaLore (arXiv 2403.03507), Fira (arXiv 2410.01623).
    """

    def __new__(cls, *args: Any, **options: Any) -> "LowRankAdamW":
        """Says where the options of groups belong, which many try here first."""
        misplaced = sorted({"rank", "alpha", *PROJECTION_DEFAULTS} & options.keys())
        if misplaced:
            raise TypeError(
                f"{', '.join(misplaced)}: options of parameter groups, not of the optimizer: build"
                f" the groups with lowrank_kernels.param_groups(model, rank=...)"
            )
        return super().__new__(cls)

    @property
    def corrected(self) -> bool:
        """Whether the moments are corrected for their bias, instead of the step size."""
        return self.residual == "paper"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        residual: ResidualForm | None = None,
        subspace: Subspace | str = "randomized",
        backend: str = "auto",
        maximize: bool = False,
        rounding: Rounding = "nearest",
        capturable: bool = False,
        monitor: bool = False,
    ) -> None:
        if residual is not None and residual not in RESIDUAL_FORMS:
            raise ValueError(f"residual must be one of {', '.join(RESIDUAL_FORMS)} or None")
        subspace = Subspace.named(subspace, stagger=not capturable)
        _check_subspace(subspace, residual, capturable)
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        ops.requested_backend(backend)
        self.residual, self.subspace, self.backend = residual, subspace, backend
        self.rounding, self.capturable, self.monitor = rounding, capturable, monitor
        self._counted: dict[Tensor, int] = {}
        self._readback = Readback()
        self._judged = False
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "format": FORMAT,
            "method": self._method,
        }
        super().__init__(params, defaults)
        self._judge(self._params())

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, as `torch.optim.Optimizer.add_param_group`; checked before it is added."""
        index = len(self.param_groups)
        group = normalized(param_group, self.defaults, index)
        check_params(group, index)
        super().add_param_group(group)

    @_not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes one step.

        Args:
            closure: evaluates the model again, under enabled gradients, and returns the loss.

        Returns:
            The loss of the closure, if there is one.

        Raises:
            ValueError, RuntimeError, NotImplementedError: a gradient, a weight or a state does not
                fit; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with ExitStack() as stack:
            for device_type in {param.device.type for param in self._params()} | {"cpu"}:
                available = torch.amp.is_autocast_available(device_type)
                if available and torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            self._step()
        return loss

    def _step(self) -> None:
        work = list(self._checked_work())
        if not self._judged:
            self._judge(item.param for _, items in work for item in items)
            self._judged = True
        if _capturing():
            self._check_capture(work)
        for group, items in work:
            states = [self._state_of(group, item) for item in items]
            if is_projected(group):
                self._step_projected(group, items, states)
            elif items:
                gradients = [(item.param, item.grad) for item in items]
                step_plain(gradients, states, group, self.capturable)

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _judge(self, params: Iterable[Tensor]) -> None:
        """Warns if the given parameters that are trained have no projected one among them.

        The optimizer of a single parameter, as gradient release uses them, is none to judge.
        """
        trained = {param for param in params if param.requires_grad}
        groups = filter(is_projected, self.param_groups)
        projected = {param for group in groups for param in group["params"]}
        if self._judged or len(trained) < 2 or trained & projected:
            return
        self._judged = True
        logger.warning(
            "no trained parameter is in a group with a rank, so this is plain AdamW: build the"
            " groups with lowrank_kernels.param_groups(model, rank=...)"
        )

    def explain(self) -> list[dict[str, Any]]:
        """Says how each parameter is trained.

        Returns:
            A row for every parameter: name, shape, dtype, projected, side, rank, backend, reason,
            lr, how fast it moves (lr * scale of a group with a scale), and state_bytes, what its
            state holds now (0 before its first step).
        """
        return report.explain(self)

    def plan(self) -> list[dict[str, Any]]:
        """Says what each parameter takes in memory, without allocating it.

        The state is what it holds after the first step with a gradient, at the group's full rank:
        its own constructors build it on the meta device, so that the parameters may lie there, too.

        Returns:
            A row for every parameter: name, shape, dtype, projected, side, rank (None of an AdamW
            parameter), weight_bytes, gradient_bytes and state_bytes (both 0 if it does not require
            a gradient).
        """
        return report.plan(self)

    def stats(self) -> list[dict[str, Any]]:
        """Says what each projected parameter's subspace is doing; no factorization, no gradient.

        Everything but the counters of `monitor` is known on the host, so that every few steps are
        not too often.

        Returns:
            A row for every projected parameter that has taken a step: name, step, rank, captured
            (energy of the gradient, 0 to 1, that the basis held when it was computed), age (steps
            since then), overlap (|P_new^T P_old|^2 / r at its last change, 1 for the same span, 0
            before there was one), refreshes, kept (refreshes that failed, so that the old basis
            stayed), fallbacks (slow factorizations), deficient (gradients of a lower rank than the
            basis), gap_factor; and with `monitor` nonfinite (gradients) and limited (steps held
            back by Fira's limiter), else None.
        """
        return report.stats(self)

    def state_dict(self) -> State:
        """As `torch.optim.Optimizer.state_dict`; states of a smaller, adaptive rank are filled up
        with zeros to the group's, so that every checkpoint of a model has the same shapes.
        """

        def fill(_: Optimizer, saved: State) -> State:
            return {**saved, "state": padded(saved["state"], saved["param_groups"])}

        # Before the user's own hooks.
        handle = self.register_state_dict_post_hook(fill, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: State) -> None:
        """Loads a state dict.

        Moments and bases get the dtypes that the weights ask for, whatever they were saved with;
        options of groups are those of the state dict, as in torch. Rank, scale and other options of
        the projection that differ, and a method that differs, are told by a warning.

        Raises:
            ValueError: the state dict is of a newer format, of another optimizer, for other shapes
                or for parameters in another order; the text names the parameter, and nothing was
                changed.
        """
        incoming: State = {}
        names = [group.get("param_names") for group in self.param_groups]

        def inspect(_: Optimizer, candidate: State) -> State:
            candidate = {**candidate, "state": unpadded(candidate["state"])}
            check_loadable(self.param_groups, candidate)
            incoming.update(candidate)
            return candidate

        def put_back(_: Optimizer) -> None:
            restore(self.state, self.param_groups, incoming, self.capturable)
            for group, own_names in zip(self.param_groups, names, strict=True):
                group |= {"format": FORMAT, "method": self._method}
                if own_names is not None:
                    group["param_names"] = own_names

        # Between the user's own hooks: after those that change the state dict, before those that
        # change what was loaded.
        handles = (
            self.register_load_state_dict_pre_hook(inspect),
            self.register_load_state_dict_post_hook(put_back, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        parts = ("residual", "subspace", "backend", "rounding", "capturable", "monitor")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in parts}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._counted = {}  # torch comes here when it loads a state dict, too
        self._readback = Readback()
        self._judged = True
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("format", FORMAT)
            group.setdefault("method", self._method)

    @property
    def _method(self) -> str:
        """What makes a state: kept beside it, so that a checkpoint tells what it is of."""
        parts = {
            "residual": self.residual,
            "corrected": self.corrected,
            "rounding": self.rounding,
            **asdict(self.subspace),
        }
        return ", ".join(f"{name}={value}" for name, value in parts.items())

    def _checked_work(self) -> Iterator[tuple[Group, list[_Work]]]:
        """Each group with its parameters that have a gradient, all checked."""
        request, first = ops.requested_backend(self.backend), 0
        memory: list[_Memory] = []
        for index, group in enumerate(self.param_groups):
            check_options(group, index)
            check_lr(group, index, self.capturable)
            named = zip(named_params(group, index), salts(group, first), strict=True)
            first += len(group["params"])
            items = []
            for (name, param), salt in named:
                if param.grad is None:
                    continue
                check_grad(name, param, param.grad)
                grad, backend = _resolved(param.grad), None
                memory += _memory_of(name, group, param, grad)
                if is_projected(group):
                    check_matrix(name, param)
                    check_memory(name, param)
                    backend = self.choice(request, param, grad).backend
                if state := self.state.get(param):
                    check_shapes(name, param, state, is_projected(group))
                    check_storage(name, param, state)
                items.append(_Work(name, param, grad, salt, backend))
            yield group, items
        _check_shared(memory)

    def _check_capture(self, work: list[tuple[Group, list[_Work]]]) -> None:
        """Raises RuntimeError if a CUDA graph cannot hold this step; nothing was changed."""
        if not self.capturable:
            raise RuntimeError("a CUDA graph can capture a step of capturable=True only")
        for index, (group, items) in enumerate(work):
            if not isinstance(group["lr"], Tensor):
                raise RuntimeError(
                    f"group {index}: the graph would keep lr={group['lr']} for ever; pass"
                    " lr=torch.tensor(..., device='cuda') and change it in place"
                )
            for name, param, *_ in items:
                state, count = self.state.get(param), self._counted.get(param, 0)
                if not state or (is_projected(group) and not count):
                    raise RuntimeError(f"{name}: take an eager step before capturing one")
                if not is_projected(group):
                    continue
                gap = group["update_proj_gap"]
                if is_due(count, state["basis_step"], gap, phase_of(state, gap, self.subspace)):
                    raise RuntimeError(
                        f"{name}: its basis is due after {count} steps, and a CUDA graph cannot"
                        " compute one; take this step eagerly and capture a later one"
                    )

    def _state_of(self, group: Group, item: _Work) -> State:
        state = self.state[item.param]
        if not state:
            state.update(self.new_state(group, item.param, item.salt))
        elif is_projected(group):
            complete(state, item.salt, self.subspace, *self._counts)
        return state

    @property
    def _counts(self) -> tuple[str, ...]:
        """The 0-d entries of a projected state beside what its subspace keeps."""
        limiter = ("limiter_norm",) if self.residual is not None else ()
        return limiter + (("nonfinite", "limited") if self.monitor else ())

    def new_state(self, group: Group, param: Tensor, salt: int = 0) -> State:
        """The state of a parameter before its first step, on its device."""
        if is_projected(group):
            rows, cols = param.shape
            rank = _cut_rank(group["rank"], rows, cols)
            side = side_of(group["proj_type"], rows, cols)
            state = new_projected_state(param, rank, side, salt, self.subspace, *self._counts)
        else:
            state = new_plain_state(param)
        if self.capturable:
            state["step"] = state["step"].to(param.device)
        return state

    def _step_projected(self, group: Group, items: list[_Work], states: list[State]) -> None:
        by_device: dict[torch.device, list[Matrix]] = {}
        for item, state in zip(items, states, strict=True):
            assert item.backend is not None
            matrix = Matrix(item.name, item.param, item.grad, state, item.backend)
            by_device.setdefault(item.param.device, []).append(matrix)
        stochastic = self.rounding == "stochastic"
        method = Method(
            residual=self.residual,
            corrected=self.corrected,
            subspace=self.subspace,
            stochastic=stochastic,
            capturable=self.capturable,
            monitor=self.monitor,
            readback=self._readback,
        )
        for matrices in by_device.values():
            step_projected(matrices, self._completed_steps(matrices), group, method)

    def _completed_steps(self, matrices: list[Matrix]) -> list[int]:
        """Steps that each matrix has taken.

        With `capturable` they are counted on the device, since a replayed graph runs no Python: an
        eager step waits once to read them, and a capture goes by what the last one read.
        """
        if _capturing():
            return [self._counted[matrix.param] for matrix in matrices]
        if not self.capturable:
            return [int(matrix.state["step"]) for matrix in matrices]
        counts = torch.stack([matrix.state["step"] for matrix in matrices]).int().tolist()
        for matrix, count in zip(matrices, counts, strict=True):
            self._counted[matrix.param] = count + 1
        return counts

    def choice(self, request: str, param: Tensor, grad: Tensor | None) -> Choice:
        """Who computes a projected parameter's step, and why."""
        return ops.choose(request, param, grad, capturable=self.capturable)


def _check_subspace(subspace: Subspace, residual: ResidualForm | None, capturable: bool) -> None:
    if residual is not None and not subspace.orthonormal:
        raise ValueError(
            f"residual={residual!r} needs an orthonormal basis, which"
            f" range_finder={subspace.range_finder!r} is not"
        )
    moving = (subspace.residual_energy, subspace.criterion, subspace.lazy)
    if capturable and (any(x is not None for x in moving) or subspace.moments == "reset"):
        raise ValueError(
            "capturable=True replays one step as it was: it cannot go with a subspace that has a"
            " residual_energy, a criterion, lazy refreshes or moments='reset'"
        )


def _resolved(grad: Tensor) -> Tensor:
    """The gradient with its values in memory: kernels read addresses, where a pending negation, or
    a zero that was never written, cannot be seen.
    """
    if grad.is_neg() or grad._is_zerotensor():
        return grad.resolve_neg().clone()
    return grad


class _Memory(NamedTuple):
    """Where a dense weight or gradient lies, and whose it is."""

    begin: int
    end: int
    owner: str
    projected: bool
    written: bool


def _memory_of(name: str, group: Group, param: Tensor, grad: Tensor) -> Iterator[_Memory]:
    """Of those that fill their memory: others may lie between the elements of a strided one."""
    for tensor, owner in ((param, name), (grad, f"the gradient of {name}")):
        begin = tensor.data_ptr()
        if begin and tensor.numel() and is_dense(tensor):
            end = begin + tensor.numel() * tensor.element_size()
            yield _Memory(begin, end, owner, is_projected(group), tensor is param)


def _check_shared(memory: list[_Memory]) -> None:
    """Raises ValueError if what a projected weight's step writes or reads is another weight's."""
    reach: _Memory | None = None
    for item in sorted(memory):
        if (
            reach is not None
            and item.begin < reach.end
            and (item.written or reach.written)
            and (item.projected or reach.projected)
        ):
            raise ValueError(
                f"{item.owner} shares its memory with {reach.owner}: tie weights by using one"
                " parameter in both places, and give gradients memory of their own"
            )
        if reach is None or item.end > reach.end:
            reach = item


def _cut_rank(rank: int, rows: int, cols: int) -> int:
    smallest = min(rows, cols)
    if rank > smallest:
        notice_once(
            logging.WARNING,
            f"rank {rank} is cut to {smallest} for matrices of {rows} x {cols}: their gradient"
            " cannot have more",
        )
    return min(rank, smallest)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
