"""The step of one parameter of an optimizer, by itself and prepared by itself."""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .batches import new_memory
from .groups import Group, NamedGroups, named_groups
from .lowrank_adamw import PART_NAMES, LowRankAdamW, not_compiled

# What a step goes by beside groups: the parts, the states, and what is known of the device.
LENT_NAMES = (*PART_NAMES, "state", "_readback", "_counted")
_LENT = attrgetter(*LENT_NAMES)


class SharedMemory:
    """In which the parameters of an optimizer decode in turn: on each device as much as the largest
    that came so far needs.
    """

    def __init__(self) -> None:
        self._held: dict[torch.device, Tensor] = {}

    def __call__(self, size: int, device: torch.device) -> Tensor:
        held = self._held.get(device)
        if held is None or held.numel() < size:
            held = new_memory(size, device)
            if size:
                self._held[device] = held
        return held

    def places(self) -> Iterable[int]:
        """Others once a memory was replaced by a larger one."""
        return map(Tensor.data_ptr, self._held.values())


class Alone(LowRankAdamW):
    """One parameter of an optimizer, which lends it all that a step goes by, as it is at each step,
    but what is prepared for the parameter.

    Args:
        whole: the optimizer.
        index: of the parameter's group.
        group: that group.
        named: the parameter's name, the parameter and its salt.
        memory: for what is decoded.
    """

    def __new__(cls, *_: Any) -> "Alone":
        return object.__new__(cls)

    # Not torch's, which makes groups and a state anew.
    def __init__(
        self,
        whole: LowRankAdamW,
        index: int,
        group: Group,
        named: tuple[str, Tensor, int],
        memory: SharedMemory,
    ) -> None:
        self._whole, self._index, self._group, self._named = whole, index, group, named
        self._params_alone = {"params": [named[1]]}
        self.param_groups: list[Group] = [{}]
        self._room_memory = self._memory = memory
        self._known, self._options = None, []
        self._judged = True

    @property
    def name(self) -> str:
        """Of the parameter."""
        return self._named[0]

    @not_compiled
    @torch.no_grad()
    def take_step(self) -> None:
        """The part of the optimizer's step that is this parameter's, in every bit.

        Raises:
            ValueError, RuntimeError, NotImplementedError: as the optimizer's step; nothing was
                changed.
        """
        vars(self).update(zip(LENT_NAMES, _LENT(self._whole), strict=True))
        # In its place, since what is prepared keeps it.
        (own,) = self.param_groups
        own.clear()
        own |= self._group | self._params_alone
        if self._whole.lr_factor != 1.0:
            own["lr"] = own["lr"] * self._whole.lr_factor
        self._step()

    def _named_groups(self) -> NamedGroups:
        return [(self._index, self.param_groups[0], [self._named])]

    def _facts(self) -> tuple[object, ...]:
        return *super()._facts(), *self._memory.places()

    def _check_capture(self) -> None:
        raise RuntimeError(
            f"{self.name}: a CUDA graph cannot capture a step that is taken in the backward pass:"
            " remove() the release of gradients before capturing"
        )


def each_alone(optimizer: LowRankAdamW) -> dict[Tensor, Alone]:
    """The parameters of an optimizer, one by one."""
    memory = SharedMemory()
    return {
        named[1]: Alone(optimizer, index, group, named, memory)
        for index, group, every in named_groups(optimizer.param_groups)
        for named in every
    }
