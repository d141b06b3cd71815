"""Puts factored linear layers in the place of a model's dense ones, and back."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from ..linears import Row, linear_weights, matches
from ..ranks import Ranks, ranks_of
from ..values import int_from
from .linear import (
    INITS,
    FactoredLinear,
    Init,
    checked_scale,
    checked_share,
    factored_in,
    is_plain,
    places_in,
)

# Of an index.
PLACE_BYTES = 4


class Factorized:
    """What `factorize` has done.

    Attributes:
        rows: a `Row` for every linear layer of the model.
        modules: those that are factored, for `refactorize` and `Restarts`.
    """

    def __init__(self, rows: list[Row], modules: list[FactoredLinear]) -> None:
        self.rows, self.modules = rows, modules

    def __str__(self) -> str:
        taken = sum(row.taken for row in self.rows)
        reasons = Counter(row.reason for row in self.rows if not row.taken)
        others = "".join(f"\n  {count} not: {reason}" for reason, count in reasons.items())
        return f"{taken} of {len(self.rows)} linear layers are factored{others}"


def factorize(
    model: nn.Module,
    rank: Ranks,
    targets: str | Iterable[str] | None = None,
    sparse: float = 0.0,
    *,
    scale: float = 1.0,
    init: Init = "svd",
    seed: int = 0,
) -> Factorized:
    """Replaces linear layers by `FactoredLinear`, whose weight is scale B A + S.

    Call it before the optimizer is made, and before `torch.compile`, DDP and `fully_shard`. Biases
    stay the parameters that they are; a frozen weight becomes frozen factors. Layers that cannot
    be replaced, and those that would not be smaller, stay as they are, which the result tells.
    What is drawn at random depends on `seed` and the layer's name, and is the same on every rank.

    Args:
        model: with the layers, on its devices, the meta device included, where no value is there.
        rank: of the factors, as of `param_groups`: one, or by patterns of the weights' names, or by
            a function of name and weight; None leaves a layer dense.
        targets: which layers, as of `param_groups`: the linear layers of numbered blocks by
            default, and never embeddings and the output head.
        sparse: share of a weight's entries that are trained beside the factors, at random places.
        scale: on the product, lora_alpha / r in the publications.
        init: "svd": the best factors of the weights that are there, to go on from them, or to begin
            pre-training of their leading directions (Khodak et al., arXiv 2105.01029); values of
            the sparse part are what the factors leave. An SVD a layer takes some time. "random": as
            published for pre-training from nothing, see `FactoredLinear`.
        seed: of random places and values.

    Returns:
        What was replaced and why not.

    Raises:
        TypeError: `model` is no module, or a rank or `seed` no int.
        ValueError: nothing can be replaced; a rank, a pattern, `sparse`, `scale`, `init` or `seed`
            does not fit; the model is wrapped already; or a weight is not finite. Nothing was
            changed.

    Source: Glentis et al. (arXiv 2505.22922), SLTrain (arXiv 2406.02214).
    """
    _check(model, sparse, scale, init)
    seed = int_from(0, seed, "seed")
    if targets is not None and not isinstance(targets, str):
        targets = list(targets)
    weights = {
        f"{each.name}.weight": each.param
        for each in linear_weights(model)
        if matches(each.name, targets)
    }
    ranks = ranks_of(rank, weights)
    shared = _shared(model)
    rows, taken = list[Row](), dict[nn.Linear, tuple[str, int]]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        own, reason = ranks.get(f"{name}.weight"), "its name is not among the targets"
        if matches(name, targets):
            reason = _obstacle(module, model, name, shared) or ""
            if not reason and f"{name}.weight" not in weights:
                reason = "the output head, an embedding's weight, or no floating-point weight"
            reason = reason or _too_large(module, own, sparse) or ""
        if not reason:
            assert own is not None
            taken[module] = name, own
        rows.append(Row(name, not reason, reason or f"rank {own}"))
    if not taken:
        raise ValueError(
            f"no linear layer can be factored: {Factorized(rows, [])}\nname others by targets=, or"
            " give a lower rank"
        )
    if init == "svd":
        for module, (name, _) in taken.items():
            if not module.weight.is_meta and not bool(module.weight.isfinite().all()):
                raise ValueError(f"{name}.weight has values that are not finite")
    modules = []
    for module, (name, own) in taken.items():
        factored = _factored(
            module, own, sparse, scale, init, zlib.crc32(f"{name} {seed}".encode())
        )
        _replace(model, module, factored)
        modules.append(factored)
    return Factorized(rows, modules)


def densify(model: nn.Module) -> list[nn.Linear]:
    """Replaces every `FactoredLinear` inside of a model by an nn.Linear of the same function.

    Weights are scale B A + S, rounded to the dtype of B; biases stay the parameters that they are.
    Optimizers keep the factors and have to be made anew.

    Returns:
        The new layers.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no factored layer inside, it is one itself, it is wrapped by
            DistributedDataParallel, or factors are shards. Nothing was changed.
    """
    _check_model(model, "densify")
    found = factored_in(model)
    if not found:
        raise ValueError("the model has no FactoredLinear")
    for name, module in found.items():
        if module is model:
            raise ValueError("the model is a FactoredLinear itself: its dense() gives the weight")
        if not (is_plain(module.B) and is_plain(module.A)):
            raise ValueError(
                f"{name} has factors of type {type(module.B).__name__}: load the full state dict"
                " into a model that is not sharded"
            )
    layers = []
    for factored in found.values():
        size = factored.in_features, factored.out_features
        # On the meta device at first: nothing is drawn.
        layer = nn.Linear(*size, bias=False, device="meta", dtype=factored.B.dtype)
        layer.weight = nn.Parameter(factored.dense(), requires_grad=factored.B.requires_grad)
        layer.register_parameter("bias", factored.bias)
        layer.train(factored.training)
        _replace(model, factored, layer)
        layers.append(layer)
    return layers


def _factored(
    module: nn.Linear, rank: int, sparse: float, scale: float, init: str, seed: int
) -> FactoredLinear:
    weight = module.weight
    factored = FactoredLinear(
        module.in_features,
        module.out_features,
        rank,
        bias=False,
        sparse=sparse,
        scale=scale,
        device=weight.device,
        dtype=weight.dtype,
        seed=seed,
    )
    factored.register_parameter("bias", module.bias)
    if init == "svd" and not weight.is_meta:
        factored.approximate(weight)
    for name, param in factored.named_parameters(recurse=False):
        if name != "bias":
            param.requires_grad_(weight.requires_grad)
    return factored.train(module.training)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """In every place where it is."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _shared(model: nn.Module) -> set[Tensor]:
    """Parameters that several modules have, or one under several names."""
    owners: Counter[Tensor] = Counter(
        param
        for module in model.modules()
        for param in module._parameters.values()
        if param is not None
    )
    return {param for param, count in owners.items() if count > 1}


def _obstacle(module: nn.Linear, model: nn.Module, name: str, shared: set[Tensor]) -> str | None:
    """Why a layer cannot be replaced."""
    weight = module._parameters.get("weight")
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, which may do more than nn.Linear"
    if weight is None:
        return "its weight is computed from others"
    if "forward" in vars(module):
        return "its forward is patched: undo that first"
    if _has_hooks(module):
        return "it has hooks, which would be lost"
    if weight in shared:
        return "its weight is shared with another module"
    if not is_plain(weight):
        return f"its weight is a {type(weight.data).__name__}: factorize before it becomes one"
    if module is model:
        return "it is the model itself: use FactoredLinear and its approximate()"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight"
    return None


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


def _too_large(module: nn.Linear, rank: int | None, sparse: float) -> str | None:
    """Why the factors would not be smaller than the weight."""
    if rank is None:
        return "given no rank"
    rows, cols = module.weight.shape
    if rank > min(rows, cols):
        return f"rank {rank} saves no memory"
    count, size = places_in(sparse, rows, cols), module.weight.element_size()
    if rank * (rows + cols) * size + count * (size + PLACE_BYTES) >= rows * cols * size:
        what = f"rank {rank}" if not sparse else f"rank {rank} with sparse={sparse:g}"
        return f"{what} saves no memory"
    return None


def _check(model: nn.Module, sparse: float, scale: float, init: str) -> None:
    _check_model(model, "factorize")
    checked_share(sparse)
    checked_scale(scale)
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")


def _check_model(model: nn.Module, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes a model, not {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(f"call {caller} before DistributedDataParallel wraps the model")
