"""Linear layers that keep a sample of their inputs for the gradients of their weights."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..linears import Row, autocast_dtype, linear_weights, matches
from ..ops.contract import Side
from ..optim.lowrank_adamw import LowRankAdamW, not_compiled
from ..optim.projected_gradient import Projector
from .layers import is_plain_pass
from .norms import GradientNorms
from .project import obstacle
from .recompute import is_recomputed, is_saved_anyway
from .sampled_linear import (
    SampledLinear,
    Sketch,
    kept_columns,
    kept_in_subspace,
    kept_rows,
    norms_of,
)
from .sketches import ROW_METHODS

Method = Literal["pps", "wta", "crs", "uniform", "rademacher"]
METHODS = (*ROW_METHODS, "rademacher")

# Of a sampled row, its index and its weight.
BYTES_OF_A_PLACE = 8

# What is patched, so that a copy of a model, which is not, computes as before.
_PATCHED: weakref.WeakKeyDictionary[nn.Module, _Layer] = weakref.WeakKeyDictionary()


class SampledLinears:
    """What `sample_linears` has done, what it goes by, and the way back.

    Attributes:
        rows: a `Row` for every linear layer of the model.
        method: how.
    """

    def __init__(
        self, keep: float, method: Method, optimizer: LowRankAdamW | None, norms: int | None
    ) -> None:
        self._keep, self.rows = keep, list[Row]()
        self.method, self._optimizer = method, optimizer and weakref.ref(optimizer)
        self._norms, self._norms_of = norms, dict[str, GradientNorms]()
        self._mask: Tensor | None = None
        self._index: Tensor | None = None
        # Of the batch that was told, a backward pass has begun.
        self._is_over = False
        # An entry goes with its input.
        self._inputs: MutableMapping[Tensor, _Input] = WeakIdKeyDictionary()
        self._siblings: dict[str, int] = {}
        self._layers: list[_Layer] = []
        self._whole: set[str] = set()

    @property
    def keep(self) -> float:
        """Share of tokens, or of features with "rademacher"; may be written to.

        Raises:
            ValueError: it is not above 0 and at most 1.
        """
        return self._keep

    @keep.setter
    def keep(self, keep: float) -> None:
        self._keep = _checked_keep(keep)

    def of_batch(self, mask: Tensor | None = None, index: Tensor | None = None) -> None:
        """Says what the next forward passes are about, up to the backward pass after them.

        Args:
            mask: batch x length, 0 where a token's gradients are zero, as padding's that attention
                and loss leave out: such tokens are not drawn. None: all may be drawn. It is for
                inputs of its own shape, batch x length x n, and for no others.
            index: batch, int64: which samples of the data set these are, for `norms`.

        Raises:
            ValueError: `mask` is for a model with an encoder and a decoder, whose inputs are not
                told apart, or is no tensor; `index` comes without `norms`, is no vector of
                integers, or names a sample that is none.
        """
        if mask is not None and self._has_two_sides():
            raise ValueError(
                "mask would be taken for the encoder's and for the decoder's tokens alike: leave"
                " it out, or call sample_linears with targets of one side"
            )
        if index is not None:
            self._check_index(index)
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"mask must be a tensor, batch x length, got {type(mask).__name__}")
        self._mask, self._index, self._is_over = mask, index, False
        self._inputs.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """What a run goes on from, beside random numbers: with `norms`, those that are known."""
        return {name: norms.values for name, norms in self._norms_of.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Loads what `state_dict` gave.

        Raises:
            ValueError: norms are of other layers, or of another number of samples; nothing was
                changed.
        """
        names = {layer.name for layer in self._layers}
        for name, values in state_dict.items():
            if name not in names or values.ndim != 2 or len(values) != self._norms:
                raise ValueError(
                    f"the state has norms of {name}, {tuple(values.shape)}: here are"
                    f" norms={self._norms} and {len(names)} layers; call sample_linears as before"
                )
        self._norms_of = {
            name: GradientNorms.from_values(values) for name, values in state_dict.items()
        }

    def undo(self) -> None:
        """Gives every layer its own forward again."""
        for layer in self._layers:
            layer.restore()
        self._layers = []
        self._inputs.clear()

    def __str__(self) -> str:
        taken = sum(row.taken for row in self.rows)
        reasons = Counter(row.reason for row in self.rows if not row.taken)
        others = "".join(f"\n  {count} not: {reason}" for reason, count in reasons.items())
        kept = f"keep {self.keep:g} of their inputs, by {self.method!r}"
        if self._whole:
            others = f"\n  {len(self._whole)} of them: another keeps all of it anyway{others}"
        return f"{taken} of {len(self.rows)} linear layers {kept}{others}"

    def _has_two_sides(self) -> bool:
        parts = {part for layer in self._layers for part in layer.name.split(".")}
        return {"encoder", "decoder"} <= parts

    def _check_index(self, index: Tensor) -> None:
        if self._norms is None:
            raise ValueError("index is for norms, which sample_linears was not given")
        if not isinstance(index, Tensor) or index.dtype is not torch.int64 or index.ndim != 1:
            told = f"{tuple(index.shape)}, {index.dtype}" if isinstance(index, Tensor) else index
            raise ValueError(f"index must be a vector of int64, got {told}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self._norms:
            raise ValueError(
                f"index must be from 0 to {self._norms - 1}, as norms={self._norms}, got"
                f" {int(index.min())} to {int(index.max())}"
            )

    def _forget_last_batch(self) -> None:
        """What was told is of no forward pass after its backward pass; what checkpoints compute
        again within that is.
        """
        if self._is_over and torch._C._current_graph_task_id() == -1:
            self._mask = self._index = None
            self._is_over = False

    def _saw(self, heads: Tensor, norms: _Noted | None) -> None:
        self._is_over = True
        self._inputs.clear()
        if norms is not None:
            norms.note(heads)

    def _sketch(self, x: Tensor, name: str, weight: Tensor, seed: int) -> Sketch | None:
        """What a layer keeps of an input; None for all of it."""
        projector, known = self._projector(weight), self._known(x, name)
        count = self._count(x, name, projector)
        if count is None:
            return None
        dtype = autocast_dtype(x)
        is_own = projector is not None or self._norms is not None
        key = count, dtype, name if is_own else None
        if key not in known.sketches:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                rows = x.detach().reshape(-1, x.shape[-1])
                rows = rows if dtype is None else rows.to(dtype)
                made = self._made(rows, x.shape, name, count, projector, seed)
            known.sketches[key] = made._replace(dtype=dtype)
        return known.sketches[key]

    def _count(self, x: Tensor, name: str, projector: Projector | None) -> int | None:
        """Of rows, or of columns, to keep; None if all of x is less, or costs nothing."""
        # Of what attention or a norm keeps anyway a sample would be kept beside it.
        if is_saved_anyway(x) or is_recomputed(x):
            self._whole.add(name)
            return None
        features = x.shape[-1]
        of = features if self.method == "rademacher" else x.numel() // max(1, features)
        count = max(1, round(self.keep * of))
        share = count / max(1, of)
        if self.method != "rademacher":
            share *= 1 + BYTES_OF_A_PLACE / max(1, features * x.element_size())
        if projector is not None:
            # Each layer of an input keeps x P, and rows, of its own.
            share = (share + projector.rank / features) * self._siblings.get(name, 1)
        return count if share < 1 and x.numel() else None

    def _known(self, x: Tensor, name: str) -> _Input:
        """What is known of an input that one more layer multiplies."""
        known = self._inputs.get(x)
        if known is None or known.version != x._version or name in known.users:
            known = self._inputs[x] = _Input(x._version, [], {})
        known.users.append(name)
        for user in known.users:
            self._siblings[user] = max(len(known.users), self._siblings.get(user, 1))
        return known

    def _made(
        self,
        rows: Tensor,
        shape: torch.Size,
        name: str,
        count: int,
        projector: Projector | None,
        seed: int,
    ) -> Sketch:
        if self.method == "rademacher":
            return kept_columns(rows, count, seed)._replace(
                seen=functools.partial(self._saw, norms=None)
            )
        norms = self._known_norms(name, shape)
        weight = norms.weights(rows.device) if norms is not None else None
        mask = self._mask
        if mask is not None and mask.shape == shape[:-1]:
            flat = (mask != 0).reshape(-1).to(rows.device)
            weight = flat if weight is None else weight * flat

        def score(rows: Tensor) -> Tensor:
            if weight is None:
                return norms_of(rows)
            # What is not to be drawn may be anything.
            return torch.where(weight != 0, norms_of(rows) * weight, 0.0)

        if projector is None:
            sketch = kept_rows(rows, score(rows), count, self.method, seed)
        else:
            sketch = kept_in_subspace(rows, projector, score, count, self.method, seed)
        return sketch._replace(seen=functools.partial(self._saw, norms=norms))

    def _projector(self, weight: Tensor) -> Projector | None:
        """Of the optimizer, on the right side, where x P tells R exactly."""
        optimizer = self._optimizer and self._optimizer()
        state = optimizer.state.get(weight) if optimizer else None
        if not state or "basis" not in state or state["side"] != Side.RIGHT:
            return None
        if state["basis"].shape[1] >= weight.shape[1]:
            return None
        return Projector.of(state)

    def _known_norms(self, name: str, shape: torch.Size) -> _Noted | None:
        """Of this batch's tokens in this layer, if they are kept."""
        if self._norms is None or len(shape) != 3:
            return None
        if self._index is None:
            raise ValueError(
                "norms= needs of_batch(index=...) before each batch: which samples it has"
            )
        if len(self._index) != shape[0]:
            raise ValueError(
                f"{name} has an input of {tuple(shape)}, and of_batch was told"
                f" {len(self._index)} samples: batches come first"
            )
        if name not in self._norms_of:
            self._norms_of[name] = GradientNorms(self._norms, shape[1])
        cache = self._norms_of[name]
        if cache.values.shape[1] != shape[1]:
            raise ValueError(
                f"{name} has an input of {tuple(shape)}, and norms of {cache.values.shape[1]}"
                " tokens a sample: pad all batches to one length"
            )
        return _Noted(cache, self._index)


class _Noted(NamedTuple):
    """The norms of some samples."""

    cache: GradientNorms
    samples: Tensor

    def weights(self, device: torch.device) -> Tensor:
        return self.cache.of(self.samples).reshape(-1).to(device)

    def note(self, heads: Tensor) -> None:
        self.cache.note(self.samples, norms_of(heads).view(len(self.samples), -1))


class _Input(NamedTuple):
    """An input that layers multiply: those of one input, as q, k and v, share what is kept of it.

    Attributes:
        version: of it.
        users: names of its layers so far.
        sketches: what was kept.
    """

    version: int
    users: list[str]
    sketches: dict[object, Sketch]


class _Layer:
    """A linear layer that is patched."""

    def __init__(self, name: str, module: nn.Linear, sampled: SampledLinears) -> None:
        self.name, self._sampled = name, sampled
        self._module = weakref.ref(module)
        self._forward_before = vars(module).get("forward")

    def patch(self) -> None:
        module = self._module()
        assert module is not None
        _PATCHED[module] = self
        # A copied or pickled module takes the partial along, and finds no layer.
        module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]

    def restore(self) -> None:
        module = self._module()
        if module is None or _PATCHED.pop(module, None) is not self:
            return
        del module.forward
        if self._forward_before is not None:
            module.forward = self._forward_before  # type: ignore[method-assign]

    def __call__(self, x: Tensor, module: nn.Linear) -> Tensor:
        sketch = None
        # Evaluation is exact.
        if module.training:
            # Also in a pass without gradients, which a checkpoint computes again: as many random
            # numbers for each, and of the host, where no device is waited for.
            seed = int(torch.randint(2**62, (), device="cpu"))
            self._sampled._forget_last_batch()
            if is_plain_pass(x, module.weight):
                sketch = self._sampled._sketch(x, self.name, module.weight, seed)
        if sketch is not None:
            result: Tensor = SampledLinear.apply(x, module.weight, module.bias, sketch)  # type: ignore[no-untyped-call]
            return result
        if self._forward_before is not None:
            exact: Tensor = self._forward_before(x)
            return exact
        return F.linear(x, module.weight, module.bias)


@not_compiled
def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    """In the place of `nn.Linear.forward`."""
    layer = _PATCHED.get(module)
    return F.linear(input, module.weight, module.bias) if layer is None else layer(input, module)


def sample_linears(
    model: nn.Module,
    keep: float = 0.3,
    method: Method = "pps",
    *,
    targets: str | Iterable[str] | None = None,
    optimizer: LowRankAdamW | None = None,
    norms: int | None = None,
) -> SampledLinears:
    """Lets linear layers keep a sample of their input, for an unbiased gradient of their weight.

    Outputs, and the gradients of inputs and biases, are what they are without; the gradient of a
    weight, m x n, is an estimate of H^T x from round(keep t) of the t tokens (with "rademacher":
    from round(keep n) products of each token with random signs), whose mean is the gradient. Layers
    of one input, as q, k and v, share one sample. Evaluation (`model.eval()`) is exact, and so is a
    layer whose input attention keeps anyway. For any optimizer.

    Draws begin with a random number of torch's for the CPU, one for each pass of a layer, which
    checkpointing, of both kinds, and a resume restore; what `norms` knows is in `state_dict`. Works
    with autocast, accumulation, DistributedDataParallel and FSDP2; in a compiled model each layer
    is a graph break. No host waits for a device, but for `norms`.

    Args:
        model: with the layers.
        keep: share of the input that is kept, above 0, and at most 1, which is all of it.
        method: "pps": different tokens, with probability proportional to their score, the largest
            for certain; "wta": as published, the largest for certain and others drawn with
            replacement; "crs": all drawn with replacement; "uniform": different tokens, all as
            likely; "rademacher": RAD. A score is a token's norm, times what `norms` knows.
        targets: which layers, as of `param_groups`: the linear layers of numbered blocks by
            default, and never the output head.
        optimizer: over the model's weights; then what its bases span is kept whole, x P, t x r, on
            the right side, and the sample is of the rest: R = G P is exact, and Fira's residual
            unbiased. Layers of one input then keep theirs each, or x itself if that is less.
        norms: samples in the data set, for fine-tuning over several epochs: of each token of each
            sample the norm of its last gradient is then kept, in bfloat16 on the CPU, samples x
            length a layer, and multiplies its score. Needs `of_batch(index=...)` before each
            batch, inputs of batch x length x n, and one length. Layers then draw apart.

    Returns:
        What was taken and why not; `of_batch` says what is padding, `undo` restores the layers.

    Raises:
        TypeError: `optimizer` is none of this package.
        ValueError: `keep` or `method` does not fit, `norms` is below 1 or goes with "rademacher" or
            "uniform", `optimizer` goes with "rademacher" or with bases that are not orthonormal, or
            no layer can be taken.
    """
    _check(keep, method, optimizer, norms)
    if targets is not None and not isinstance(targets, str):
        targets = list(targets)
    weights = {c.name: c.param for c in linear_weights(model) if matches(c.name, targets)}
    sampled, taken = SampledLinears(keep, method, optimizer, norms), []
    left_out = "its name is not among the targets"
    if targets is None:
        left_out = "it is in no numbered block, or a head or router: name it by targets="
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = None if name in weights else left_out
        if reason and targets is not None and matches(f"{name}.weight", targets):
            reason = "its weight is shared, or no matrix of real numbers"
        reason = reason or obstacle(module)
        if reason is None:
            taken.append(_Layer(name, module, sampled))
        sampled.rows.append(Row(name, reason is None, reason or method))
    if not taken:
        raise ValueError(f"no linear layer can be sampled: {sampled}")
    for layer in taken:
        layer.patch()
    sampled._layers = taken
    return sampled


def _check(keep: float, method: str, optimizer: LowRankAdamW | None, norms: int | None) -> None:
    _checked_keep(keep)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if norms is not None and (not isinstance(norms, int) or norms < 1):
        raise ValueError(f"norms must be how many samples there are, at least 1, got {norms!r}")
    if norms is not None and method in ("rademacher", "uniform"):
        raise ValueError(f"norms do nothing with method={method!r}, which goes by no scores")
    if optimizer is None:
        return
    if not isinstance(optimizer, LowRankAdamW):
        raise TypeError(
            f"optimizer must be one of lowrank_kernels, whose bases say what is kept whole, got"
            f" {type(optimizer).__name__}: leave it out, any optimizer takes these gradients"
        )
    if method == "rademacher":
        raise ValueError("optimizer goes with methods that draw tokens, and not with 'rademacher'")
    if not optimizer.subspace.orthonormal:
        raise ValueError("optimizer has bases that are not orthonormal: G P is no part of G there")


def _checked_keep(keep: float) -> float:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep!r}")
    return keep
