"""A linear layer whose weight is a product of two factors, and a sparse rest."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linears import autocast_dtype, without_autocast
from ..values import int_from, positive_int
from .sparse import sparse_linear

Init = Literal["svd", "random"]
INITS = ("svd", "random")
# Of a weight with a sparse part: places are int32.
MOST_ELEMENTS = 2**31 - 1

# Asked by optimizers, which know parameters and not their modules.
_ALL: weakref.WeakSet[FactoredLinear] = weakref.WeakSet()


class FactoredLinear(nn.Module):
    """y = scale (x A^T) B^T + x S^T + bias: a linear layer whose weight scale B A + S is not there.

    Neither the forward nor the backward pass forms a matrix of out_features x in_features. Weights,
    gradients and an optimizer's state have r (out + in) elements, and k of the sparse part; the
    low-rank products take r (out + in) / (out in) of the dense ones' work.

    State dicts, safetensors, autocast, torch.compile, DDP and FSDP2 see a module like others. Under
    DDP pass `broadcast_buffers=False`, or every pass sends `indices`. A state dict of a lower rank,
    as `refactorize(shrink=...)` makes it, is loaded and lowers this one's.

    Args:
        in_features: n.
        out_features: m.
        rank: r, from 1 up to the smaller of both.
        bias: whether there is one.
        sparse: share of the weight's entries that are in S, at least 0 and below 1.
        scale: on the product, not 0.
        device: of the parameters.
        dtype: of the parameters, floating point; `indices` are int32.
        seed: of `indices` and of the first values; None takes one of torch's random numbers.

    Attributes:
        B: parameter, m x r.
        A: parameter, r x n.
        bias: parameter, m, or None.
        values: parameter, k = int(sparse m n), the entries of S; None without.
        indices: buffer, k, int32: their places, row * n + col, sorted; they never change.

    Raises:
        TypeError: a size is no int.
        ValueError: a size, the rank, `sparse` or `scale` is out of range, or there is a sparse part
            of more than 2^31 - 1 entries.

    Source: SLTrain (Han et al., arXiv 2406.02214), whose first values these are: those of B and A
    uniform as nn.Linear's (B is 0 if there are values), values up to 1 / sqrt(n) either way.
    """

    # Buffers and parameters of the class, for type checkers.
    B: nn.Parameter
    A: nn.Parameter
    bias: nn.Parameter | None
    values: nn.Parameter | None
    indices: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        sparse: float = 0.0,
        scale: float = 1.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features = positive_int(in_features, "in_features")
        self.out_features = positive_int(out_features, "out_features")
        rank, most = positive_int(rank, "rank"), min(in_features, out_features)
        if rank > most:
            raise ValueError(
                f"rank must be at most {most} for {out_features} x {in_features}, got {rank}: use"
                " nn.Linear"
            )
        self.scale = checked_scale(scale)
        count = places_in(checked_share(sparse), out_features, in_features)

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.B, self.A = new(out_features, rank), new(rank, in_features)
        self.register_parameter("bias", new(out_features) if bias else None)
        self.register_parameter("values", new(count) if count else None)
        places = torch.empty(count, dtype=torch.int32, device=device) if count else None
        self.register_buffer("indices", places)
        self.reset_parameters(seed)
        _ALL.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _ALL.add(self)

    @property
    def rank(self) -> int:
        """R, which `refactorize(shrink=...)` lowers."""
        return self.B.shape[1]

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draws everything anew, the same on every device.

        Args:
            seed: None takes one of torch's random numbers.
        """
        if self.B.is_meta:
            return
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        generator = torch.Generator().manual_seed(int_from(0, seed, "seed"))
        bound = 1 / math.sqrt(self.in_features)

        def draw(tensor: Tensor, bound: float) -> None:
            # In float32, so that what is drawn next does not depend on the dtype.
            drawn = torch.empty(tensor.shape, device="cpu", dtype=torch.float32)
            tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))

        if self.indices is not None:
            total = self.out_features * self.in_features
            self.indices.copy_(_drawn_places(len(self.indices), total, generator))
        draw(self.A, bound)
        draw(self.B, 1 / math.sqrt(self.rank))
        if self.values is not None:
            self.B.zero_()
            draw(self.values, bound)
        if self.bias is not None:
            draw(self.bias, bound)

    def forward(self, x: Tensor) -> Tensor:
        """... x out_features of ... x in_features."""
        dtype = autocast_dtype(x)
        # Cast once for both parts, so that one copy is kept.
        x = x if dtype is None else x.to(dtype)
        low = F.linear(x, self.A)
        y = F.linear(low if self.scale == 1 else low * self.scale, self.B, self.bias)
        if self.values is None or self.indices is None:
            return y
        return y + sparse_linear(x, self.values, self.indices, self.out_features).to(y.dtype)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """scale B A + S, out_features x in_features, in the dtype of B, without a gradient.

        It is computed in float32 at least.
        """
        wide = torch.promote_types(self.B.dtype, torch.float32)
        whole = self._product(wide)
        if self.values is not None and self.indices is not None:
            whole.view(-1)[self.indices.long()] += self.values.to(wide)
        return whole.to(self.B.dtype)

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> None:
        """Takes the best factors for a weight, and where S has entries what they leave of it.

        The factors are balanced, B^T B = A A^T.

        Args:
            weight: out_features x in_features, finite.
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        whole = weight.detach().to(self.B.device, wide)
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        # The sign of a scale below 0 goes to B.
        roots = (values[: self.rank] / abs(self.scale)).sqrt()
        self.B.copy_(left[:, : self.rank] * roots * math.copysign(1, self.scale))
        self.A.copy_(roots.unsqueeze(1) * right[: self.rank])
        if self.values is not None and self.indices is not None:
            rest = whole - self._product(wide)
            self.values.copy_(rest.view(-1)[self.indices.long()])

    def _product(self, dtype: torch.dtype) -> Tensor:
        with without_autocast(self.B.device):
            return self.scale * (self.B.to(dtype) @ self.A.to(dtype))

    def extra_repr(self) -> str:
        sparse = "" if self.values is None else f", {len(self.values)} sparse values"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank},"
            f" scale={self.scale:g}, bias={self.bias is not None}{sparse}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        B, A = state_dict.get(f"{prefix}B"), state_dict.get(f"{prefix}A")
        if isinstance(B, Tensor) and isinstance(A, Tensor) and B.dim() == A.dim() == 2:
            rank = B.shape[1]
            fits = (*B.shape, *A.shape) == (self.out_features, rank, rank, self.in_features)
            if fits and 1 <= rank < self.rank and is_plain(self.B) and is_plain(self.A):
                lower_rank(self, self.B[:, :rank], self.A[:rank])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def lower_rank(module: FactoredLinear, B: Tensor, A: Tensor) -> None:
    """Puts factors of a lower rank, m x r and r x n, into parameters that stay the same objects."""
    for param, new in ((module.B, B), (module.A, A)):
        new, param.grad = new.detach().to(param.dtype, copy=True).contiguous(), None
        # A graph that is still there, of the last loss, has a node for the old shape, which the
        # next pass would take. A change of dtype ends it.
        other = torch.float32 if param.dtype is not torch.float32 else torch.float64
        param.data = new.new_empty(0, dtype=other)
        param.data = new


def is_plain(param: Tensor) -> bool:
    """Whether a parameter has its values itself, and is no DTensor or another subclass."""
    return type(param) in (nn.Parameter, Tensor) and type(param.data) is Tensor


def factored_in(modules: nn.Module | Iterable[nn.Module]) -> dict[str, FactoredLinear]:
    """The factored modules among some modules and inside of them, by name, each once.

    Raises:
        TypeError: there is something else among them.
    """
    if isinstance(modules, nn.Module):
        listed = [("", modules)]
    elif isinstance(modules, Iterable):
        listed = [(f"modules[{place}]", module) for place, module in enumerate(modules)]
    else:
        raise TypeError(f"modules must be modules, or one, got {modules!r}")
    found: dict[FactoredLinear, str] = {}
    for prefix, module in listed:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{prefix} must be a module, got {type(module).__name__}")
        for name, inner in module.named_modules(prefix=prefix):
            if isinstance(inner, FactoredLinear):
                found.setdefault(inner, name or "the module")
    return {name: module for module, name in found.items()}


def trained_parts(module: FactoredLinear) -> dict[str, Tensor]:
    """What stands for the weight of a factored module."""
    parts = {"B": module.B, "A": module.A, "values": module.values}
    return {name: part for name, part in parts.items() if part is not None}


def all_trained_parts() -> set[Tensor]:
    """Of all factored modules that there are."""
    return {part for module in list(_ALL) for part in trained_parts(module).values()}


def checked_scale(scale: float) -> float:
    """Raises ValueError unless it is a finite number other than 0."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"scale must be a number, got {scale!r}")
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    return float(scale)


def checked_share(sparse: float) -> float:
    """Raises ValueError unless it is a share from 0 to below 1."""
    if isinstance(sparse, bool) or not isinstance(sparse, (int, float)) or not 0 <= sparse < 1:
        raise ValueError(f"sparse must be a share of entries from 0 to below 1, got {sparse!r}")
    return float(sparse)


def places_in(sparse: float, rows: int, cols: int) -> int:
    """How many entries a share of them is.

    Raises:
        ValueError: int32 cannot number them, or the share is above 0 and less than one entry.
    """
    count = int(sparse * rows * cols)
    if sparse and rows * cols > MOST_ELEMENTS:
        raise ValueError(
            f"sparse={sparse}: {rows} x {cols} has more than {MOST_ELEMENTS} entries, and places"
            " are int32: leave sparse out"
        )
    if sparse and not count:
        raise ValueError(f"sparse={sparse} of {rows} x {cols} is less than one entry")
    return count


def _drawn_places(count: int, total: int, generator: torch.Generator) -> Tensor:
    """So many different places of all, sorted, each set of them as likely."""
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        more = torch.randint(total, (count,), generator=generator, device="cpu")
        found = torch.unique(torch.cat([found, more]))
    kept = torch.randperm(len(found), generator=generator, device="cpu")[:count]
    return found[kept].sort().values
