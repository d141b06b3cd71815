"""The linear weights of a model, and which of them a user means."""

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

# "layers.3" and "encoder_layer_3.mlp", but not "fc3": a module of the last kind holds others.
IN_A_BLOCK = re.compile(r"(^|\.)(\d+(\.|$)|[^.]*\D\d+\.)")
ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")


class Candidate(NamedTuple):
    """A linear weight; `transposed` if it is stored as in_features x out_features."""

    name: str
    param: Tensor
    transposed: bool


class Row(NamedTuple):
    """What became of a linear layer.

    Attributes:
        name: of the layer.
        taken: whether it is among those that were asked for and can be taken.
        reason: why not; of a layer that is taken, how.
    """

    name: str
    taken: bool
    reason: str


def embeddings_and_heads(model: nn.Module) -> set[int]:
    """Identities of the weights of embeddings and of the output head."""
    found = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():  # the model may be wrapped, by DDP or PEFT
        head = getattr(module, "get_output_embeddings", lambda: None)()
        found.add(id(getattr(head, "weight", None)))
    return found


def linear_weights(model: nn.Module) -> list[Candidate]:
    """Linear weights by module name, without the output head and without tied embeddings."""
    excluded = embeddings_and_heads(model)
    found: dict[int, Candidate] = {}
    for name, module in model.named_modules():
        for suffix, weight, transposed in _weights_of(module):
            if weight.is_floating_point() and id(weight) not in excluded:
                found.setdefault(id(weight), Candidate(name + suffix, weight, transposed))
    return list(found.values())


def _weights_of(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """(what names it beside the module, weight, transposed) of a module's own linear weights.

    A parametrized weight is no parameter and is not trained itself.
    """
    params = dict(module.named_parameters(recurse=False))
    transposed = _is_transformers_conv1d(module)
    if (transposed or isinstance(module, nn.Linear)) and "weight" in params:
        yield "", params["weight"], transposed
    if isinstance(module, nn.MultiheadAttention):
        for key in ("in_proj", "q_proj", "k_proj", "v_proj"):
            if f"{key}_weight" in params:
                yield f".{key}", params[f"{key}_weight"], False


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """Told by name: transformers is no dependency, and users call their convolutions so too."""
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def matches(name: str, targets: str | Iterable[str] | None) -> bool:
    """Whether targets, regular expressions, name a weight.

    Raises:
        ValueError: one of them is no regular expression.
    """
    if targets is None:
        return bool(IN_A_BLOCK.search(name)) and not ROUTER.search(name)
    if targets == "all-linear":
        return True
    patterns = [targets] if isinstance(targets, str) else targets
    return any(_finds(pattern, name) for pattern in patterns)


def _finds(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"targets has {pattern!r}, which is no regular expression: {error}; parts of names, as"
            " 'mlp', are"
        ) from None


def collapsed(name: str) -> str:
    """A name with block numbers as *: 24 layers read as one."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """In which autocast would compute a linear layer; None without it."""
    kind = x.device.type
    if x.dtype is torch.float64 or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """In which products have the dtype of their operands."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
