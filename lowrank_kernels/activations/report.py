"""What autograd keeps between a forward and its backward: how many bytes, of which module, why."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ..optim.projected_gradient import held
from ..text import amount, table
from .layers import looking_on

ACTIVATIONS = (
    "relu",
    "relu_",
    "relu6",
    "silu",
    "gelu",
    "sigmoid",
    "tanh",
    "softplus",
    "mish",
    "glu",
)
ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention")


class Saved(NamedTuple):
    """What one module was the first to save.

    `kind` is "linear", "norm", "attention", "activation", "loss", "compiled" or "other".
    """

    module: str
    kind: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class SavedBytes:
    """See `saved_bytes`; printed as a table in which the layers of a stack are one.

    Attributes:
        rows: in the order of the forward.
        total: of all rows.
        gradients: bytes of the parameters' gradients when backward ends, if none is released.
        largest_gradient: the largest of them, which is what is left if each is released at once.
        measured: whether these are of a backward pass, and not of the parameters.
    """

    rows: list[Saved]
    total: int
    gradients: int
    largest_gradient: int
    measured: bool = False

    def by_kind(self) -> dict[str, int]:
        kinds: dict[str, int] = {}
        for row in self.rows:
            kinds[row.kind] = kinds.get(row.kind, 0) + row.bytes
        return kinds

    def __str__(self) -> str:
        stacks: dict[tuple[str, str], tuple[int, int]] = {}
        for row in self.rows:
            key = re.sub(r"\b\d+\b", "*", row.module) or "the model itself", row.kind
            tensors, size = stacks.get(key, (0, 0))
            stacks[key] = tensors + row.tensors, size + row.bytes
        cells = [(*key, tensors, size) for key, (tensors, size) in stacks.items()]
        kinds = ", ".join(f"{kind} {amount(size)}" for kind, size in self.by_kind().items())
        return "\n".join(
            [
                table(("module", "kind", "tensors", "bytes"), cells),
                f"saved: {amount(self.total)} ({kinds})",
                f"gradients: {amount(self.gradients)} when backward ends,"
                f" {amount(self.largest_gradient)} at a time if each is released"
                + ("" if self.measured else "; less with project_linears, see backward=True"),
            ]
        )


def saved_bytes(
    model: nn.Module,
    *args: Any,
    loss: Callable[[Any], Tensor] | None = None,
    backward: bool = False,
    **kwargs: Any,
) -> SavedBytes:
    """Runs model(*args, **kwargs) once and counts what is saved for backward when it has ended.

    Every storage counts once, whole, for the module that saved it first: the output of attention is
    attention's, though a linear saves it, too. Parameters, buffers and views of them do not count;
    what the caller gave does, if it is saved. Gradients, buffers and the state of random numbers
    are afterwards as they were.

    With gradient checkpointing what counts is what checkpoints save: their arguments, but no tensor
    in a tuple of theirs (and none at all by `use_reentrant=False` in older torch), which they hold
    where nobody sees it. Of a module compiled by torch.compile it is what the compiled graph saves,
    in one row of the module, or of the one around it after `module.compile()`; nothing is compiled
    again for it.

    Args:
        model: called once, in the mode that it is in.
        *args: of the model.
        loss: from the output to a scalar; what it saves counts, as "loss". By default what the
            model returns as its loss, or nothing.
        backward: gradients are those that backward really leaves, in place of all that parameters
            with `requires_grad` could get. Hooks of parameters run, so not with an optimizer that
            steps in them.
        **kwargs: of the model.

    Raises:
        ValueError: `backward` without a loss.
    """
    params = list(model.parameters())
    known = [*params, *model.buffers()]
    if isinstance(loss, nn.Module):
        known += [*loss.parameters(), *loss.buffers()]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng({p.device for p in params if p.is_cuda}))
        stack.enter_context(_kept_buffers(model))
        stack.enter_context(torch.enable_grad())
        log = _Log()
        with looking_on(), _watched(model, log), saved_tensors_hooks(log.pack, log.unpack):
            output = model(*args, **kwargs)
            log.enter(("loss", "loss"))
            scalar = _scalar_of(output) if loss is None else loss(output)
        rows = _rows(log, known)
        sizes = [_size(p) for p in params if p.requires_grad]
        if backward:
            if scalar is None:
                raise ValueError(
                    "the model returns no loss: pass loss=, from its output to a scalar"
                )
            sizes = _gradient_sizes(scalar, params)
    total = sum(row.bytes for row in rows)
    return SavedBytes(rows, total, sum(sizes), max(sizes, default=0), backward)


class _Kept:
    """Lives as long as a graph needs its tensor."""

    def __init__(self, tensor: Tensor, owner: tuple[str, str]) -> None:
        self.tensor, self.owner = tensor, owner


class _Log(TorchFunctionMode):
    """Who saves what: the modules that are running, and the function that torch was called by."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[tuple[str, str]] = [("", "other")]
        self._function: str | None = None
        self._kept: list[weakref.ref[_Kept]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._function = getattr(func, "__name__", None)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._function = None

    def enter(self, owner: tuple[str, str], *hooked: Any) -> None:
        self.modules.append(owner)

    def leave(self, *hooked: Any) -> None:
        self.modules.pop()

    def pack(self, tensor: Tensor) -> _Kept:
        module, kind = self.modules[-1]
        if kind == "other":
            kind = _kind_of_function(self._function)
        # An output with its graph would keep itself alive.
        kept = _Kept(tensor.detach(), (module, kind))
        self._kept.append(weakref.ref(kept))
        return kept

    def unpack(self, kept: _Kept) -> Tensor:
        return kept.tensor

    def alive(self) -> Iterator[_Kept]:
        # Graphs that were dropped may wait in cycles.
        gc.collect()
        for reference in self._kept:
            if (kept := reference()) is not None:
                yield kept


def _rows(log: _Log, known: Iterable[Tensor]) -> list[Saved]:
    seen = {key for tensor in known for key, _ in _storages(tensor)}
    rows: dict[tuple[str, str], tuple[int, int]] = {}
    for kept in log.alive():
        for key, size in _storages(kept.tensor):
            if key not in seen:
                seen.add(key)
                tensors, total = rows.get(kept.owner, (0, 0))
                rows[kept.owner] = tensors + 1, total + size
    return [Saved(*owner, *counts) for owner, counts in rows.items()]


def _storages(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Address and bytes of each storage below a tensor: of a wrapper, those of what it wraps."""
    tensor = held(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
        return
    storage = tensor.untyped_storage()
    yield storage._cdata, storage.nbytes()


@contextmanager
def _watched(model: nn.Module, log: _Log) -> Iterator[None]:
    """The log knows which module runs; by functions, too, unless they are compiled ones."""
    with ExitStack() as stack:
        for name, module in _outside_of_graphs(model, ""):
            owner = name, _kind_of_module(module)
            enter = module.register_forward_pre_hook(partial(log.enter, owner))
            leave = module.register_forward_hook(log.leave, always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        # A graph is compiled again where another mode is on.
        by_function: AbstractContextManager[Any] = log
        if any(map(_is_compiled, model.modules())):
            by_function = nullcontext()
        stack.enter_context(by_function)
        yield


def _outside_of_graphs(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if getattr(module, "_compiled_call_impl", None) is not None:
        return
    yield name, module
    if not _is_compiled(module):
        for child_name, child in module.named_children():
            yield from _outside_of_graphs(child, f"{name}.{child_name}" if name else child_name)


def _is_compiled(module: nn.Module) -> bool:
    """By torch.compile(module) or by module.compile()."""
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or "_orig_mod" in module._modules


def _kind_of_module(module: nn.Module) -> str:
    name = type(module).__name__.lower()
    if _is_compiled(module):
        return "compiled"
    if isinstance(module, nn.Linear):
        return "linear"
    for part, kind in (("norm", "norm"), ("atten", "attention"), ("attn", "attention")):
        if part in name:
            return kind
    if name.endswith("loss"):
        return "loss"
    # What stands beside an activation function is its gate.
    if any(map(_is_activation, (module, *module.children()))):
        return "activation"
    return "other"


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__.rpartition(".")[2] in ("activation", "activations")


def _kind_of_function(name: str | None) -> str:
    if name is None:
        return "other"
    if name in ACTIVATIONS:
        return "activation"
    if name in ATTENTION:
        return "attention"
    if name == "linear":
        return "linear"
    if name.endswith("_norm"):
        return "norm"
    return "loss" if name.endswith(("_loss", "cross_entropy")) else "other"


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Running statistics are as before."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                # A graph of the caller's may have saved those that nobody changed.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _scalar_of(output: Any) -> Tensor | None:
    found = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def _gradient_sizes(scalar: Tensor, params: list[nn.Parameter]) -> list[int]:
    """Bytes of the gradient of each parameter that gets one."""
    trained = [param for param in params if param.requires_grad]
    before = [param.grad for param in trained]
    try:
        for param in trained:
            param.grad = None
        scalar.backward()  # type: ignore[no-untyped-call]
        return [_size(param.grad) for param in trained if param.grad is not None]
    finally:
        for param, grad in zip(trained, before, strict=True):
            param.grad = grad


def _size(tensor: Tensor) -> int:
    return sum(size for _, size in _storages(tensor))
