"""Momentum that begins anew every so many steps, at a rate that recovers."""

from collections.abc import Iterable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Adagrad
from torch.optim.optimizer import Optimizer

from ..factors.refactorize import checked_modules, refactorize
from ..values import int_from, positive_int
from .lowrank_adamw import LowRankAdamW
from .state import forget_moments

# Of the rate, at the first step after a restart.
LOWEST = 0.001
# Of torch's optimizers; one that merely calls itself so has none.
HOOKS = "_optimizer_step_pre_hooks"


class Restarts:
    """Resets the momentum of an optimizer every so many steps, and lets its rate recover.

        restarts = Restarts(optimizer, every=200)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            restarts.step()
            scheduler.step()                     # any, or none, in either order
            optimizer.zero_grad()

    A restart forgets what the optimizer keeps of past gradients, for all parameters, and counts
    the steps of its bias correction from there. Optimizers of this package go on with their bases,
    their turns to refresh and the low bits of weights, and Fira's limiter remembers no norm, as
    before the first step: the norms that it compares are of a direction whose size depends on how
    many steps the moments have seen. Of any other optimizer a parameter's state is dropped, as if
    it were made anew.

    Step k = 0, 1, ... of the `recovery` steps after a restart is taken at
    (0.001 + 0.999 k / (recovery - 1)) times the rate of each group, so that the last is taken at
    all of it. `group["lr"]` is lower within `optimizer.step()` only, whether it returns or raises:
    schedulers, logs and checkpoints never see it. The published code takes the scheduler's rate of
    the end of the recovery in place of the step's own.

    With `modules` their factors are balanced at each restart, by `refactorize`, and what the
    optimizer keeps of the factors is dropped, low bits included.

    A copy of the optimizer, by `copy.deepcopy` or pickle, has no restarts, since torch leaves hooks
    out of it: make others for it, and load the `state_dict` of these.

    Args:
        optimizer: of torch or of this package, before accelerate or the like wraps it.
        modules: a model, or modules, whose `FactoredLinear` layers are refactorized.
        every: calls of `step` between two restarts.
        recovery: steps at a lower rate, from 2 up to `every`, or 0 for none.
        shrink: of `refactorize`.
        process_group: of `refactorize`.

    Attributes:
        steps: calls of `step` so far.

    Raises:
        TypeError: `optimizer` is none, is wrapped, or is Adagrad, which makes its state once;
            `modules` holds something else; `every` or `recovery` is no int.
        ValueError: `every` is below 1; `recovery` is 1, negative or above `every`; the optimizer
            has others; it is capturable: a CUDA graph would go on with the state and the rate that
            it captured; what `refactorize` refuses.

    Source: Glentis et al. (arXiv 2505.22922).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        modules: nn.Module | Iterable[nn.Module] = (),
        every: int = 200,
        recovery: int = 10,
        *,
        shrink: float = 0.0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer) or not hasattr(optimizer, HOOKS):
            raise TypeError(
                f"Restarts takes an optimizer of torch or of lowrank_kernels, not"
                f" {type(optimizer).__name__}: pass it before it is wrapped, or what is wrapped,"
                " which accelerate has as `optimizer.optimizer`"
            )
        if isinstance(optimizer, Adagrad):
            raise TypeError("Adagrad makes its state when it is made, and cannot begin anew")
        if _of(optimizer):
            raise ValueError("the optimizer has Restarts already: remove() the other ones")
        if isinstance(modules, int):
            raise TypeError(
                f"Restarts(optimizer, modules, every=..., recovery=...): {modules} are no modules;"
                " pass every and recovery by their names"
            )
        self.every, self.recovery = _checked(every, recovery)
        self.optimizer, self.steps = optimizer, 0
        # Of an iterator nothing would be left at the first restart.
        self._modules = modules if isinstance(modules, nn.Module) else list(modules)
        self._refactorizes = self._modules != []
        self._shrink, self._process_group = shrink, process_group
        if self._refactorizes or shrink:
            checked_modules(self._modules, shrink, optimizer, process_group)
        self._check_capturable()
        self._lowered: list[tuple[dict[str, Any], object]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._lower),
            optimizer.register_step_post_hook(self._put_back),
            optimizer.register_state_dict_post_hook(self._save_own_rates, prepend=True),
        ]
        self._guard_step()

    @property
    def factor(self) -> float:
        """On the rates of the next step."""
        since = self.steps % self.every
        if self.steps < self.every or since >= self.recovery:
            return 1.0
        return LOWEST + (1 - LOWEST) * since / (self.recovery - 1)

    def step(self) -> None:
        """Counts a step, after `optimizer.step()`, and restarts if it is time.

        Raises:
            RuntimeError: the optimizer is a copy, which has no restarts.
            ValueError: it has become capturable, or factors are not finite; nothing was changed.
        """
        if self not in _of(self.optimizer):
            raise RuntimeError(
                "the optimizer is a copy, which has no restarts, or they were removed: make"
                " Restarts(optimizer) for it, and load the state_dict of these"
            )
        if (self.steps + 1) % self.every == 0:
            self._check_capturable()
            self._restart()
        self.steps += 1
        self._tell()

    def remove(self) -> None:
        """Ends it: rates are those of the groups, and `step` is not to be called again."""
        self._put_back()
        for handle in self._handles:
            handle.remove()
        self.recovery = 0
        self._tell()

    def state_dict(self) -> dict[str, int]:
        """What a run goes on from, beside the optimizer's state dict."""
        return {"every": self.every, "recovery": self.recovery, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Loads what `state_dict` gave, `every` and `recovery` included.

        Raises:
            TypeError, ValueError: it is none; nothing was changed.
        """
        if not isinstance(state_dict, dict) or state_dict.keys() != self.state_dict().keys():
            raise ValueError(
                f"the state dict of Restarts has {', '.join(self.state_dict())}, got {state_dict!r}"
            )
        every, recovery = _checked(state_dict["every"], state_dict["recovery"])
        steps = int_from(0, state_dict["steps"], "steps")
        self.every, self.recovery, self.steps = every, recovery, steps
        self._tell()

    @torch.no_grad()
    def _restart(self) -> None:
        if self._refactorizes:
            refactorize(
                self._modules,
                self._shrink,
                optimizer=self.optimizer,
                process_group=self._process_group,
            )
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                state = self.optimizer.state.get(param)
                if state and isinstance(self.optimizer, LowRankAdamW):
                    forget_moments(state)
                elif state:
                    del self.optimizer.state[param]

    def _check_capturable(self) -> None:
        groups = self.optimizer.param_groups
        own = getattr(self.optimizer, "capturable", False)
        if own or any(group.get("capturable") for group in groups):
            raise ValueError(
                "capturable=True and Restarts do not go together: a CUDA graph would go on with"
                " the state and the rate that it captured"
            )

    def _guard_step(self) -> None:
        """Puts rates back after a step that raises, too, for which torch has no hook."""
        step = self.optimizer.step

        # As torch's schedulers wrap a step, to whom it has to remain a method.
        @wraps(getattr(step, "__func__", step))
        def guarded(_: Optimizer, *args: Any, **options: Any) -> Any:
            try:
                return step(*args, **options)
            finally:
                self._put_back()

        self.optimizer.step = MethodType(guarded, self.optimizer)  # type: ignore[method-assign]

    def _save_own_rates(self, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        """Of a state dict that is asked for within a step, as by its closure."""
        for group, (_, lr) in zip(saved["param_groups"], self._lowered, strict=False):
            group["lr"] = lr

    def _lower(self, *_: object) -> None:
        self._put_back()
        factor = self.factor
        if factor == 1.0:
            return
        for group in self.optimizer.param_groups:
            self._lowered.append((group, group["lr"]))
            group["lr"] = group["lr"] * factor
        self._tell(1.0)

    def _put_back(self, *_: object) -> None:
        for group, lr in self._lowered:
            group["lr"] = lr
        self._lowered.clear()
        self._tell()

    def _tell(self, factor: float | None = None) -> None:
        """Steps that are taken in the backward pass are not within `optimizer.step()`."""
        if isinstance(self.optimizer, LowRankAdamW):
            self.optimizer.lr_factor = self.factor if factor is None else factor


def _of(optimizer: Optimizer) -> list["Restarts"]:
    """Those that an optimizer has."""
    owners = (getattr(hook, "__self__", None) for hook in getattr(optimizer, HOOKS).values())
    return [owner for owner in owners if isinstance(owner, Restarts)]


def _checked(every: int, recovery: int) -> tuple[int, int]:
    """Raises ValueError or TypeError if one of them is out of range."""
    every = positive_int(every, "every")
    recovery = int_from(0, recovery, "recovery")
    if recovery == 1 or recovery > every:
        raise ValueError(
            f"recovery must be 0, or from 2 up to every={every}, got {recovery}: the first of its"
            f" steps is taken at {LOWEST} of the rate, and the last at all of it"
        )
    return every, recovery
