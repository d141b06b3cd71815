"""Inputs of linears that backward makes again, exactly, in place of saving them.

For the gradients of q, k, v, gate and up a block of the LLaMA type saves the outputs of its norms,
for that of down act(gate) * up. Both are functions of what is saved anyway: a norm of its input,
the product of gate and up. Here they save these inputs alone, and run again in backward, once for
their own gradient and for all linears that read them.

Bytes for a token and a layer in half precision, hidden size h, intermediate size i, n heads:

    Hugging Face, sdpa      24 h + 8 i + 8 + 4 n      x and x / rms in float32 and half, silu(gate)
    fused norms, SwiGLU     16 h + 6 i + 8 + 4 n
    this                    12 h + 4 i + 4 n          x, x2, q, k, v, attention's output, gate, up

It costs a norm's and a product's forward for each. Forwards keep their bits. So do gradients,
unless a norm computes in the dtype of its input: the summands of that gradient are then added in
another order.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from ..linears import collapsed
from ..text import table

Run = Callable[..., Tensor]


class Recipe:
    """How a tensor is made of others, of which one or more are trained.

    It holds none of them: backward hands them over, so that gradient checkpointing can free them,
    hooks on saved tensors see them, and a change in place is found. In a backward it holds what was
    made, from the first reader to the gradients of the inputs, which all readers come before.
    """

    def __init__(self, run: Run, inputs: Sequence[Tensor]) -> None:
        self.run = run
        self._trained = [each.requires_grad for each in inputs]
        self._autocast = _autocast_of(inputs[0].device.type)
        self._made: tuple[list[Tensor], Tensor] | None = None

    def value(self, inputs: Sequence[Tensor]) -> Tensor:
        return self._make(inputs)[1].detach()

    def gradients(self, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
        """Of the inputs, given that of the tensor."""
        leaves, made = self._make(inputs)
        self._made = None
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(made, trained, grad, allow_unused=True))
        return [next(found) if leaf.requires_grad else None for leaf in leaves]

    def _make(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        if self._made is None:
            pairs = zip(inputs, self._trained, strict=True)
            leaves = [each.detach().requires_grad_(trained) for each, trained in pairs]
            with torch.enable_grad(), self._autocast:
                self._made = leaves, self.run(*leaves)
        return self._made


class _Source(NamedTuple):
    recipe: Recipe
    inputs: tuple[Tensor, ...]
    version: int


_sources = WeakTensorKeyDictionary()

# Modules whose replaced forward asks `input_of`, too.
TAKERS: WeakSet[nn.Module] = WeakSet()
# What a tensor goes through that stays where it is.
_VIEWS = (
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "TransposeBackward0",
    "PermuteBackward0",
)
# What keeps its output for its own backward.
_KEEPERS = ("ScaledDotProduct", "ReluBackward", "TanhBackward", "SigmoidBackward")


class Input(NamedTuple):
    """What a `torch.autograd.Function` keeps of an input: `tensors` to save, `load` for backward.

    In its forward and in its backward, as `_Linear` does:

        ctx.load, tensors = input_of(x)
        ctx.save_for_backward(weight, *tensors)

        weight, *tensors = ctx.saved_tensors
        x = ctx.load(tensors)
    """

    load: Callable[[Sequence[Tensor]], Tensor]
    tensors: tuple[Tensor, ...]


def input_of(x: Tensor) -> Input:
    """The sources of x, where it is made again, else x itself."""
    source = _source_of(x)
    if source is None:
        return Input(_itself, (x,))
    return Input(partial(_shaped, source.recipe, x.shape), source.inputs)


def is_recomputed(x: Tensor) -> bool:
    """Whether `input_of` knows how x is made."""
    return _source_of(x) is not None


def is_saved_anyway(x: Tensor) -> bool:
    """Whether what has made x, as torch's attention, saves it for its own backward."""
    node = x.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(_KEEPERS)


def _itself(tensors: Sequence[Tensor]) -> Tensor:
    (x,) = tensors
    return x


def _shaped(recipe: Recipe, shape: torch.Size, tensors: Sequence[Tensor]) -> Tensor:
    return recipe.value(tensors).view(shape)


def _source_of(x: Tensor) -> _Source | None:
    """Also of a view that has all elements in their order, unless x was changed since."""
    whole = x if x._base is None else x._base
    source: _Source | None = _sources.get(whole)  # type: ignore[no-untyped-call]
    if source is None or source.version != x._version or whole.numel() != x.numel():
        return None
    return source if x.is_contiguous() and whole.is_contiguous() else None


def recomputed(run: Run, *inputs: Tensor) -> Tensor:
    """run(*inputs), of which only the inputs are saved; `input_of` then knows how it is made.

    `run` is called again in backward, with detached inputs. It must not depend on anything else
    that changes, nor on chance.
    """
    if not any(each.requires_grad for each in inputs):
        return run(*inputs)  # nobody would save the inputs
    recipe = Recipe(run, inputs)
    output: Tensor = _Recomputed.apply(recipe, *inputs)  # type: ignore[no-untyped-call]
    _sources[output] = _Source(recipe, inputs, output._version)
    return output


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: Tensor) -> Tensor:
        ctx.recipe = recipe
        ctx.save_for_backward(*inputs)
        return recipe.run(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.recipe.gradients(ctx.saved_tensors, grad)


class _Linear(torch.autograd.Function):
    """`functional.linear`, with the products that torch's own backward does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.load, tensors = input_of(x)
        ctx.save_for_backward(weight, *tensors)
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (rows @ weight).view(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            # Under autocast x was cast to the weight's dtype; autograd casts its gradient back.
            x = ctx.load(tensors).to(weight.dtype)
            of_weight = rows.t() @ x.reshape(-1, weight.shape[1])
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


# The forwards below become attributes of instances, as methods bound to them, so that a deep copy
# has its own. They are called "forward", under which pickle finds the class's own.


def _norm_forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _trains(x):
        return _own(self)(self, x, *args, **kwargs)
    params = {name: param for name, param in self._parameters.items() if param is not None}
    return recomputed(partial(_with_params, self, tuple(params)), x, *params.values())


def _gated_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _trains(x):
        return _own(self)(self, x, *args, **kwargs)
    product = recomputed(partial(_gated, self.act_fn), self.gate_proj(x), self.up_proj(x))
    return self.down_proj(product)


def _linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    weight: Tensor = self.weight
    bias: Tensor | None = self.bias
    # A frozen weight needs no input.
    if not (_trains(input) and weight.requires_grad and _is_plain(weight) and _source_of(input)):
        return nn.Linear.forward(self, input)
    if dtype := _autocast_dtype(input.device.type):
        weight, bias = _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
    return _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]


for _forward in (_norm_forward, _gated_forward, _linear_forward):
    _forward.__name__ = "forward"


def is_recomputing(linear: nn.Linear) -> bool:
    """Whether its forward is the one that `recompute_activations` gives it."""
    forward = linear.__dict__.get("forward")
    return getattr(forward, "__func__", None) is _linear_forward


def _own(module: nn.Module) -> Run:
    """The forward of the class."""
    return type(module).forward


def _trains(x: object) -> bool:
    """Not where nothing is saved, nor where a compiler decides what is."""
    return isinstance(x, Tensor) and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _is_plain(weight: Tensor) -> bool:
    """Neither quantized nor a shard."""
    return type(weight) in (Tensor, nn.Parameter)


def _autocast_dtype(device: str) -> torch.dtype | None:
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _autocast_of(device: str) -> AbstractContextManager[Any]:
    """As it is now, to be entered later."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    dtype = _autocast_dtype(device)
    return torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _with_params(norm: nn.Module, names: Sequence[str], x: Tensor, *params: Tensor) -> Tensor:
    """A norm's own forward with tensors in the place of its parameters, whose hooks stay quiet."""
    own = dict(norm._parameters)
    norm._parameters.update(zip(names, params, strict=True))  # type: ignore[arg-type]
    try:
        return _own(norm)(norm, x)
    finally:
        norm._parameters.update(own)


def _gated(act: Run, gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


class Row(NamedTuple):
    """A module that could save less, and why it does not."""

    module: str
    part: str
    skipped: str | None


@dataclass(frozen=True)
class Recomputation:
    """What `recompute_activations` found in a model.

    Attributes:
        rows: every norm, gated product and linear; `skipped` is None where it was taken, else it
            says why not.
    """

    rows: list[Row]
    _taken: list[tuple[str, nn.Module, MethodType]]

    def undo(self) -> None:
        """Gives the modules their own forwards back.

        Raises:
            RuntimeError: the forward of one was replaced since; nothing is changed then.
        """
        for name, module, forward in self._taken:
            if module.__dict__.get("forward") is not forward:
                raise RuntimeError(
                    f"the forward of {name!r} was replaced since recompute_activations:"
                    " undo that first"
                )
        for _, module, _ in self._taken:
            del module.forward
        self._taken.clear()

    def __str__(self) -> str:
        taken = Counter(row.part for row in self.rows if row.skipped is None)
        counts = ", ".join(f"{count} x {part}" for part, count in taken.items()) or "nothing"
        left = Counter(
            (collapsed(row.module), row.part, row.skipped)
            for row in self.rows
            if row.skipped is not None
        )
        cells = [(count, *row) for row, count in left.items()]
        lines = [f"recomputed: {counts}"]
        return "\n".join([*lines, table(("", "left out", "part", "why"), cells)] if left else lines)


def recompute_activations(model: nn.Module) -> Recomputation:
    """Inputs of linears that are outputs of norms, or act(gate) * up, are not saved any more.

    They are found by what modules are made of and do, whatever their classes are called:

    - a norm has 1-D parameters and nothing else, and takes no notice of its input's scale;
    - a gated product belongs to a module with `gate_proj`, `up_proj`, `down_proj` and `act_fn` that
      computes down_proj(act_fn(gate_proj(x)) * up_proj(x)), and is shown to;
    - a linear is an `nn.Linear` with torch's own forward. It saves what its input is made of where
      it gets the output of one of those, or a view of all of it.

    `forward` becomes an attribute of these modules: names, state dicts, hooks and optimizers stay.
    Works with frozen weights, LoRA, autocast, and with gradient checkpointing, inside of which it
    saves nothing. In a compiled model the modules keep their own forwards: the compiler decides
    what it saves. Hooks on `act_fn` run again in backward. Second derivatives and torch.func's
    transforms are an error, and so is a change in place of a norm's input, of gate or of up.
    `nn.DataParallel` is not supported.

    Args:
        model: before it is sharded. Its norms and gated modules are called with a
            few numbers, to see what they do; small ones like them for a model on the meta device.
    """
    rows, taken = [], []
    for name, module in model.named_modules():
        for part, forward, obstacle in _PARTS:
            with torch.no_grad():
                reason = obstacle(module)
            if reason is not _NO_CANDIDATE:
                rows.append(Row(name, part, reason))
            if reason is None:
                taken.append((name, module, MethodType(forward, module)))
    for _, module, forward in taken:
        module.forward = forward
    return Recomputation(rows, taken)


_NO_CANDIDATE = "another kind of module"


def _norm_obstacle(norm: nn.Module) -> str | None:
    params = list(norm.parameters())
    leaf = not any(norm.children()) and not any(True for _ in norm.buffers())
    if not (leaf and params and all(param.dim() == 1 for param in params)):
        return _NO_CANDIDATE
    if reason := _replaced(norm):
        return reason
    norm = _with_weights(norm)
    x = _probe(params[0].numel(), next(norm.parameters()))
    try:
        small, large = _own(norm)(norm, x), _own(norm)(norm, 16 * x)
    except Exception as error:
        return f"does not run on one tensor: {error}"
    if not isinstance(small, Tensor) or small.shape != x.shape:
        return _NO_CANDIDATE
    # eps, beside mean squares of about 0.5, is less than half precision resolves.
    scale = float(small.abs().max())
    return None if float((large - small).abs().max()) <= 0.02 * scale else _NO_CANDIDATE


def _gated_obstacle(mlp: nn.Module) -> str | None:
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    parts: list[Any] = [getattr(mlp, name, None) for name in names]
    if not all(map(callable, parts)):
        return _NO_CANDIDATE
    gate, up, down, act = parts
    if reason := _replaced(mlp):
        return reason
    if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
        return "its activation has parameters"
    if not isinstance(width := getattr(gate, "in_features", None), int):
        return "its gate_proj does not tell its in_features"
    mlp = _with_weights(mlp)
    gate, up, down = (getattr(mlp, name) for name in names[:3])
    width = gate.in_features
    x = _probe(width, next(mlp.parameters()))
    try:
        # Twice the same random numbers, for dropout inside the linears.
        drawing = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(drawing):
            expected = _own(mlp)(mlp, x)
        with torch.random.fork_rng(drawing):
            found = down(_gated(act, gate(x), up(x)))
        same = torch.equal(expected, found)
    except Exception as error:
        return f"does not run on one tensor: {error}"
    return None if same else "does not compute down_proj(act_fn(gate_proj(x)) * up_proj(x))"


def _linear_obstacle(linear: nn.Module) -> str | None:
    if not isinstance(linear, nn.Linear) or linear in TAKERS:
        return _NO_CANDIDATE
    if type(linear).forward is not nn.Linear.forward:
        return f"{type(linear).__name__} has a forward of its own"
    if not _is_plain(linear.weight):
        return f"its weight is a {type(linear.weight).__name__}"
    return _replaced(linear)


_PARTS = (
    ("norm", _norm_forward, _norm_obstacle),
    ("gated product", _gated_forward, _gated_obstacle),
    ("linear", _linear_forward, _linear_obstacle),
)


def _replaced(module: nn.Module) -> str | None:
    """What keeps a module from being looked at."""
    if "forward" in module.__dict__:
        return "its forward was replaced already"
    return None


def _with_weights(module: nn.Module) -> nn.Module:
    """The module; of one on the meta device a small one that computes alike."""
    if not any(param.is_meta for param in module.parameters()):
        return module
    twin = copy.copy(module)
    twin._parameters = {
        name: param if param is None else nn.Parameter(torch.ones(param.shape))
        for name, param in module._parameters.items()
    }
    sizes = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
    twin._modules = dict(module._modules)
    for name in sizes.keys() & twin._modules.keys():
        linear = nn.Linear(*sizes[name], bias=False, device="meta").to_empty(device="cpu")
        linear.weight.copy_(_probe(linear.in_features, linear.weight)[:1] * len(name))
        twin._modules[name] = linear
    return twin


def _probe(width: int, like: Tensor) -> Tensor:
    """Two rows that need no random numbers."""
    steps = torch.arange(1, 2 * width + 1, device=like.device, dtype=torch.float64)
    return torch.sin(steps * steps).view(2, width).to(like.dtype)
