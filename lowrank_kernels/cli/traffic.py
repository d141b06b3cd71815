"""What each of many GPUs holds of a model, and what it sends in a step: by formulas on shapes.

Nothing here is measured. A collective over w GPUs makes each of them send, of X bytes in all:

    all-gather, reduce-scatter      (w - 1) / w X
    all-reduce                      twice that
    broadcast                       X
    all-to-all                      (w - 1) / w of its own bytes

A model's own, in a step of one forward and one backward pass: FSDP2 gathers weights before either
and scatters gradients, HSDP does so within a replica and then reduces the shards over replicas, DDP
reduces gradients. An optimizer's, on shards of w GPUs of which there are W in all:

    Fira, APOLLO, criteria          all-reduce of a message of 4 KiB a bucket of matrices, at most
    orthogonal                      such a message, and what is outside to an owner and back, two
                                    all-to-alls, in bfloat16, in which GPUs multiply fast
    new bases of m x n, rank r      the gradient, m n, to an owner, with an interpolation the first
                                    moment, m r, too; the basis, n r, to everybody

Shards are along dim 0 as torch cuts them, ceil(m / w) rows; the fullest GPU counts, and shorter
shards are sent filled up. Sharded matrices are projected from the right: R = G P is m x r and
sharded as the weight, its moments in float32 whatever the format; P is n x r and whole on every
GPU. Of what owners serve in turn the mean over GPUs counts, and headers of some bytes do not.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..activations.plan import adamw_bytes
from ..ops import Side
from ..ops.orthogonal import factor_dtype
from ..optim import LowRankAdamW
from ..optim.collectives import MESSAGE, NUMBERS
from ..optim.groups import Group, is_projected
from ..optim.parts import Method
from ..optim.sharded import bucketed, bytes_between
from ..optim.state import State, new_projected_state, planned_state, state_bytes

Shard = Literal["fsdp2", "hsdp", "ddp"]
SHARDS: tuple[Shard, ...] = ("fsdp2", "hsdp", "ddp")
SHARD_SIZE = 8
# Of float64.
MESSAGE_BYTES = 8 * MESSAGE


class Layout(NamedTuple):
    """Over how many GPUs each weight is split, and how many copies of the whole there are."""

    shard: Shard
    shards: int
    replicas: int

    @property
    def gpus(self) -> int:
        return self.shards * self.replicas

    @property
    def is_sharded(self) -> bool:
        return self.shard != "ddp"

    @classmethod
    def of(cls, shard: Shard, gpus: int, shard_size: int = SHARD_SIZE) -> "Layout":
        """Of so many GPUs; `shard_size` of them share a copy of each weight under hsdp.

        Raises:
            ValueError: a number is below 1, or replicas would not be alike.
        """
        if gpus < 1:
            raise ValueError(f"--gpus must be at least 1, got {gpus}")
        if shard == "hsdp":
            if shard_size < 1 or gpus % shard_size:
                raise ValueError(
                    f"--shard-size must divide --gpus, got {shard_size} of {gpus}: replicas are"
                    " alike"
                )
            return cls(shard, shard_size, gpus // shard_size)
        return cls(shard, gpus, 1) if shard == "fsdp2" else cls(shard, 1, gpus)


class Held(NamedTuple):
    """Of a model on the fullest GPU, and what each sends for it in a step, in bytes.

    Attributes:
        weights, gradients, buffers: held; buffers are whole everywhere.
        gathers: of weights, sent before the forward and the backward pass.
        reduces: of gradients, sent in the backward pass.
    """

    weights: int
    gradients: int
    buffers: int
    gathers: int
    reduces: int

    @property
    def sent(self) -> int:
        return self.gathers + self.reduces


class Needs(NamedTuple):
    """Of an optimizer on the fullest GPU, and what each sends for it, in bytes.

    Attributes:
        state: held.
        bases: of that, with scales; whole on every GPU.
        sent: in every step.
        collectives: in every step, how many.
        bases_sent: while every basis is renewed once, the mean of all GPUs.
        bases_sent_a_step: the mean of all steps.
        largest: the largest gradient that an owner gathers.
    """

    state: int
    bases: int
    sent: int
    collectives: int
    bases_sent: int
    bases_sent_a_step: int
    largest: int


def held_of(module: nn.Module, layout: Layout) -> Held:
    """What weights, gradients and buffers take; see the module for what is counted as sent.

    Args:
        module: on any device; shapes count.
        layout: of the GPUs.
    """
    params = list(module.parameters())
    weights = sum(_bytes(_local(param, layout)) for param in params)
    gradients = sum(_bytes(_local(param, layout)) for param in params if param.requires_grad)
    # Of equal parts, those of the fullest; a single GPU and DDP gather and scatter nothing.
    others = layout.shards - 1
    return Held(
        weights,
        gradients,
        sum(map(_bytes, module.buffers())),
        gathers=2 * others * weights,
        reduces=others * gradients + round(_all_reduce(gradients, layout.replicas)),
    )


def adamw_needs(module: nn.Module, layout: Layout) -> Needs:
    """Of torch's AdamW, which sends nothing."""
    state = sum(adamw_bytes(_local(param, layout)) for param in module.parameters())
    return Needs(state, 0, 0, 0, 0, 0, 0)


def needs_of(optimizer: LowRankAdamW, layout: Layout) -> Needs:
    """Of an optimizer over a whole model; of adaptive ranks the most they can take.

    Args:
        optimizer: over plain parameters, on any device; it is not changed.
        layout: of the GPUs.
    """
    method, state, bases = optimizer.method, 0, 0
    matrices: list[tuple[Tensor, Group]] = []
    for group in optimizer.param_groups:
        for param in (each for each in group["params"] if each.requires_grad):
            kept = _state(param, group, method, layout)
            state += state_bytes(kept)
            if is_projected(group):
                bases += sum(_bytes(kept[key]) for key in ("basis", "basis_scale") if key in kept)
                matrices.append((param, group))
    if not layout.is_sharded:  # every GPU has whole gradients, and computes the same of them
        return Needs(state, bases, 0, 0, 0, 0, 0)
    blends = method.subspace.interpolation > 0
    renewed = [_renewal(param, group, layout, blends=blends) for param, group in matrices]
    sent, collectives = _step(matrices, method, layout)
    return Needs(
        state,
        bases,
        round(sent),
        collectives,
        bases_sent=round(sum(renewed)),
        bases_sent_a_step=round(
            sum(
                each / group["update_proj_gap"]
                for each, (_, group) in zip(renewed, matrices, strict=True)
            )
        ),
        largest=max((_bytes(param) for param, _ in matrices), default=0),
    )


def _state(param: Tensor, group: Group, method: Method, layout: Layout) -> State:
    """What a parameter keeps on the fullest GPU, on the meta device."""
    if not layout.is_sharded:
        return planned_state(param, group, method)
    local = _local(param, layout)
    # What shares a scale, or a weight's low bits, would depend on where shards begin.
    wide = method._replace(state="float32", master=None)
    if not is_projected(group):
        return planned_state(local, group, wide)
    # The rank is that of the whole matrix, which may have more than its shard has rows.
    return new_projected_state(local, _rank(param, group), Side.RIGHT, 0, wide)


def _step(
    matrices: list[tuple[Tensor, Group]], method: Method, layout: Layout
) -> tuple[float, int]:
    """Bytes that an optimizer sends between two refreshes, and in how many collectives."""
    if layout.shards == 1:
        return 0.0, 0
    gathered = method.outside.residual == "orthogonal"
    sizes: list[int] = []
    for param, group in matrices:
        rows, cols = _local(param, layout).shape
        sizes.append(bytes_between(rows, cols, _rank(param, group), gathered=gathered))
    most = NUMBERS // (method.outside.shared + 1)
    buckets = len(bucketed(sizes, layout.shards if gathered else 1, most))
    # Of norms over all channels, of which a GPU has some.
    told = method.outside.is_limited or method.subspace.criterion is not None
    collectives = buckets if told or gathered else 0
    sent = _all_reduce(MESSAGE_BYTES * collectives, layout.shards)
    if gathered:
        whole = sum(
            param.numel() * factor_dtype(param.dtype, "cuda").itemsize for param, _ in matrices
        )
        sent += 2 * _to_owners(whole, layout) / layout.shards
        collectives += 2 * buckets
    return sent, collectives


def _renewal(param: Tensor, group: Group, layout: Layout, *, blends: bool) -> float:
    """Bytes that a GPU sends for a new basis: rows of G, and of M if the two are mixed, in the mean
    of all, and P.
    """
    if layout.gpus == 1:
        return 0.0
    basis = param.shape[1] * _rank(param, group) * param.element_size()
    mean = 4 * param.shape[0] * _rank(param, group) if blends else 0
    # The owner's replica alone serves a matrix.
    return _to_owners(_bytes(param) + mean, layout) / layout.gpus + basis


def _to_owners(size: int, layout: Layout) -> float:
    """Bytes that go from a replica's GPUs, all together, to the one that owns a matrix."""
    return (layout.shards - 1) / layout.shards * size


def _all_reduce(size: int, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * size


def _rank(param: Tensor, group: Group) -> int:
    return min(group["rank"], *param.shape)


def _local(param: Tensor, layout: Layout) -> Tensor:
    """The largest shard, without memory."""
    shape = list(param.shape)
    if layout.is_sharded and shape:
        shape[0] = -(-shape[0] // layout.shards)
    local = torch.empty(shape, dtype=param.dtype, device="meta")
    return local.requires_grad_(param.requires_grad)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
