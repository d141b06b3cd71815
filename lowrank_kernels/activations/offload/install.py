"""A model whose forwards run in a context."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Installed(RemovableHandle):
    """Of a model in training, until it is removed.

    torch's hooks would not do: nobody tells them of a KeyboardInterrupt. The forward is a method of
    the model, so that a deep copy has its own, and is called "forward", under which pickle finds
    the class's.

    Args:
        model: whose forward it is.
        context: makes what a forward is to run in.
    """

    def __init__(
        self, model: nn.Module, context: Callable[[nn.Module], AbstractContextManager[None]]
    ) -> None:
        # What `RemovableHandle` takes its `id` out of.
        self._live = live = OrderedDict[int, None]()
        super().__init__(live)
        live[self.id] = None
        self._model, self._before = weakref.ref(model), model.__dict__.get("forward")
        inner = _of_any_model(model)

        @functools.wraps(inner)
        def forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            enters = live and module.training and torch.is_grad_enabled()
            with context(module) if enters else nullcontext():
                return inner(module, *args, **kwargs)

        forward.__name__ = "forward"
        self._forward = forward
        model.__dict__["forward"] = MethodType(forward, model)

    def remove(self) -> None:
        """What others have put around it meanwhile stays, and calls what was before."""
        super().remove()
        model = self._model()
        if model is None or getattr(model.__dict__.get("forward"), "__func__", 0) != self._forward:
            return
        if self._before is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = self._before


def _of_any_model(model: nn.Module) -> Callable[..., Any]:
    """Its forward, as a function of the model too."""
    own = model.__dict__.get("forward")
    if own is None:
        return type(model).forward
    if getattr(own, "__self__", None) is model:
        function: Callable[..., Any] = own.__func__
        return function

    @functools.wraps(own)
    def forward(_: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return forward
