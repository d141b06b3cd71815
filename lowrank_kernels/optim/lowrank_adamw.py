"""The optimizers: GaLore and Fira as choices of parts over one low-rank AdamW."""

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .. import ops
from ..ops import Choice, Side
from ..ops.notices import notice_once
from ..subspace import RANGE_FINDERS, ZERO_GRADIENT, is_due, refresh_basis
from .groups import (
    FORMAT,
    Group,
    check_grad,
    check_matrix,
    check_params,
    is_projected,
    named_params,
    normalized,
    side_of,
)
from .plain import step_plain
from .schedule import RESIDUAL_FORMS, ResidualForm, step_scalars
from .state import (
    State,
    check_loadable,
    check_shapes,
    new_plain_state,
    new_projected_state,
    restore,
    state_bytes,
)

Function = TypeVar("Function", bound=Callable[..., Any])


def _as_it_is(function: Function) -> Function:
    return function


# A compiled step would be cut into dozens of graphs, and its kernels are compiled already. The
# public torch.compiler.disable would import dynamo, 1.3 s, together with this package.
_not_compiled: Callable[[Function], Function] = getattr(torch, "_disable_dynamo", _as_it_is)


class LowRankAdamW(Optimizer):
    """AdamW whose moments live in a low-rank subspace of the gradient.

    Groups with a `rank` are projected and take these keys, the same as in `galore-torch` and
    `fira`; groups without one are torch's AdamW:

        rank             r; cut to min(rows, cols) with a notice
        update_proj_gap  T, steps between two bases, default 200
        scale            alpha of the papers (also accepted as `alpha`), default 0.25
        proj_type        "std" (default: the smaller side is compressed, squares on the right),
                         "reverse_std", "left", "right"

    Weight decay is decoupled. In projected groups it comes after the update, on the new weight, as
    in the official code: W <- (1 - lr wd)(W - update). `eps` is added to sqrt(V) before the bias
    correction, again as there; the paper form of the residual adds it after.

    A gradient channel that holds NaN or Inf is left out of the step. A basis is never computed from
    a zero or non-finite gradient: the old one stays and the next step tries again.

    Args:
        params: parameters, (name, parameter) pairs or groups; see `param_groups`.
        lr: learning rate, float or one-element tensor.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        residual: None drops what the basis does not span (GaLore); "official" and "paper" add it,
            scaled and limited, as Fira's code and Fira's algorithm 1 do.
        subspace: where a basis comes from: "svd".
        backend: "auto", "reference", "native" or "triton"; `LOWRANK_BACKEND` overrides it.
        maximize: ascend instead of descend.

    Raises:
        ValueError, TypeError: an option or a parameter does not fit; the text names it.
        BackendUnavailable: a backend was named that cannot run in this installation.

    Sources: GaLore (arXiv 2403.03507), Fira (arXiv 2410.01623).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        residual: ResidualForm | None = None,
        subspace: str = "svd",
        backend: str = "auto",
        maximize: bool = False,
    ) -> None:
        if residual is not None and residual not in RESIDUAL_FORMS:
            raise ValueError(f"residual must be one of {', '.join(RESIDUAL_FORMS)} or None")
        if subspace not in RANGE_FINDERS:
            raise ValueError(f"subspace must be one of {', '.join(RANGE_FINDERS)}")
        ops.requested_backend(backend)
        self.residual, self.subspace, self.backend = residual, subspace, backend
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "format": FORMAT,
        }
        super().__init__(params, defaults)

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
        if not any(map(is_projected, self.param_groups)):
            notice_once(
                logging.WARNING,
                "no parameter group has a rank, so this is plain AdamW: build the groups with"
                " lowrank_kernels.param_groups(model, rank=...)",
            )
        work = list(self._checked_work())
        for group, params in work:
            states = [self._state_of(group, param) for param in params]
            if is_projected(group):
                for param, state in zip(params, states, strict=True):
                    self._step_projected(group, param, state)
            elif params:
                step_plain(params, states, group)
        return loss

    def explain(self) -> list[dict[str, Any]]:
        """Says how each parameter is trained.

        Returns:
            A row for every parameter: name, shape, dtype, projected, side, rank, backend, reason
            and state_bytes, what its state holds now (0 before its first step).
        """
        rows = []
        for index, group in enumerate(self.param_groups):
            for name, param in named_params(group, index):
                row = {"name": name, "shape": tuple(param.shape), "dtype": param.dtype}
                row |= self._explain_one(group, param)
                row["state_bytes"] = state_bytes(self.state.get(param, {}))
                rows.append(row)
        return rows

    def load_state_dict(self, state_dict: State) -> None:
        """Loads a state dict; moments and bases keep the dtype that they were saved with.

        Raises:
            ValueError: the state dict is of a newer format, of another optimizer, or for other
                shapes; the text names the parameter, and nothing was changed.
        """
        incoming: State = {}

        def inspect(_: Optimizer, candidate: State) -> None:
            check_loadable(self.param_groups, candidate)
            incoming.update(candidate)

        def put_back(_: Optimizer) -> None:
            restore(self.state, self.param_groups, incoming)

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
        parts = {"residual": self.residual, "subspace": self.subspace, "backend": self.backend}
        return {**super().__getstate__(), **parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("format", FORMAT)

    def _checked_work(self) -> Iterator[tuple[Group, list[Tensor]]]:
        """Each group with its parameters that have a gradient, all checked."""
        request = ops.requested_backend(self.backend)
        for index, group in enumerate(self.param_groups):
            params = []
            for name, param in named_params(group, index):
                if param.grad is None:
                    continue
                check_grad(name, param, param.grad)
                if is_projected(group):
                    check_matrix(name, param)
                    ops.choose(request, param.device.type, param.dtype, param.grad.dtype)
                if self.state.get(param):
                    check_shapes(name, param, self.state[param], is_projected(group))
                params.append(param)
            yield group, params

    def _state_of(self, group: Group, param: Tensor) -> State:
        state = self.state[param]
        if state:
            if is_projected(group) and self.residual and "limiter_norm" not in state:
                # Saved by GaLore, continued with Fira.
                state["limiter_norm"] = state["exp_avg"].new_zeros(())
            return state
        if is_projected(group):
            rows, cols = param.shape
            rank = _cut_rank(group["rank"], rows, cols)
            side = side_of(group["proj_type"], rows, cols)
            state.update(new_projected_state(param, rank, side, self.residual is not None))
        else:
            state.update(new_plain_state(param))
        return state

    def _step_projected(self, group: Group, param: Tensor, state: State) -> None:
        grad = param.grad
        assert grad is not None
        if group["maximize"]:
            grad = -grad
        completed = int(state["step"])
        state["step"] += 1
        if param.numel() == 0:
            return
        side, basis = Side(state["side"]), state["basis"]
        if is_due(completed, state["basis_step"], group["update_proj_gap"]):
            problem = refresh_basis(grad, basis, side, self.subspace)
            if problem is None:
                state["basis_step"] = completed
            else:
                # Checkpoint libraries create the state by a step with zero gradients.
                level = logging.INFO if problem == ZERO_GRADIENT else logging.WARNING
                notice_once(level, f"a basis was not renewed: {problem}")

        scalars = step_scalars(group, completed + 1, self.residual)
        backend = self._choice(param, grad).backend
        projection = ops.project_moments(
            grad,
            basis,
            side,
            state["exp_avg"],
            state["exp_avg_sq"],
            scalars.adam,
            scalars.residual,
            backend=backend,
        )
        factor = None
        if projection.sums is not None:
            factor = ops.channel_scale(projection.sums, state["limiter_norm"], backend=backend)
        ops.back_project_update(
            param,
            grad,
            basis,
            side,
            projection,
            scalars.residual,
            factor,
            scale=scalars.scale,
            step_size=scalars.step_size,
            decay=scalars.decay,
            backend=backend,
        )

    def _choice(self, param: Tensor, grad: Tensor | None = None) -> Choice:
        request = ops.requested_backend(self.backend)
        grad_dtype = param.dtype if grad is None else grad.dtype
        return ops.choose(request, param.device.type, param.dtype, grad_dtype)

    def _explain_one(self, group: Group, param: Tensor) -> dict[str, Any]:
        if not is_projected(group):
            plain = Choice("torch", "AdamW: no rank in its group")
            return {"projected": False, "side": None, "rank": None, **plain._asdict()}
        rows, cols = param.shape
        side, rank = side_of(group["proj_type"], rows, cols), min(group["rank"], rows, cols)
        if state := self.state.get(param):
            side, rank = Side(state["side"]), state["basis"].shape[1]
        choice = self._choice(param, param.grad)
        return {"projected": True, "side": side.name.lower(), "rank": rank, **choice._asdict()}


class GaLoreAdamW(LowRankAdamW):
    """GaLore: AdamW on the projected gradient, what the basis does not span is dropped.

    Arguments, group keys and errors as in `LowRankAdamW`. Drop-in for
    `galore_torch.GaLoreAdamW`; groups without a rank are torch's AdamW here.

    Source: GaLore (arXiv 2403.03507), algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        subspace: str = "svd",
        backend: str = "auto",
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            residual=None,
            subspace=subspace,
            backend=backend,
            maximize=maximize,
        )


class FiraAdamW(LowRankAdamW):
    """Fira: GaLore plus the rest of the gradient, scaled a channel at a time and limited in growth.

    Arguments, group keys and errors as in `LowRankAdamW`. Drop-in for `fira.FiraAdamW`; groups
    without a rank are torch's AdamW here. `residual="official"` follows the published code, which
    gave the published results; `residual="paper"` follows algorithm 1. They differ unless
    `scale` is 1, and in the place of the bias correction.

    Source: Fira (arXiv 2410.01623), algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        residual: ResidualForm = "official",
        subspace: str = "svd",
        backend: str = "auto",
        maximize: bool = False,
    ) -> None:
        if residual is None:
            raise ValueError("residual must be one of official, paper; use GaLoreAdamW for none")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            residual=residual,
            subspace=subspace,
            backend=backend,
            maximize=maximize,
        )


def _cut_rank(rank: int, rows: int, cols: int) -> int:
    smallest = min(rows, cols)
    if rank > smallest:
        notice_once(
            logging.WARNING,
            f"rank {rank} is cut to {smallest} for matrices of {rows} x {cols}: their gradient"
            " cannot have more",
        )
    return min(rank, smallest)
