"""Weights that are spread over processes, as DTensors: what is here of them, and of their states.

DTensors end at the optimizer's door: a step takes the local part of a weight, of its gradient and
of its moments, and no operation of a DTensor. Asked are only methods and attributes of DTensors, so
that torch's module of them is not imported for those who have none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..ops.tensors import READER

State = dict[str, Any]

# Of a state, what is spread as the weight is.
SPREAD = ("exp_avg", "exp_avg_sq")


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor; its module, which takes time to import, is not asked."""
    return type(tensor).__name__ == "DTensor"


def local(tensor: Tensor) -> Tensor:
    """What is here of a DTensor, in the same memory; any other tensor as it is."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_grad(param: Tensor) -> Tensor:
    """What is here of a weight's gradient, spread as the weight is.

    Tensor parallelism may leave a gradient spread in another way: ranks then exchange it.
    """
    grad: Any = param.grad
    if is_sharded(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def facts_here(params: Sequence[Tensor], states: Mapping[Tensor, State]) -> list[object]:
    """What `batches.facts_of` does not see of DTensors: where their local parts are, and how they
    and those of gradients lie.

    Args:
        params: with gradients.
        states: of the optimizer.
    """
    sharded = list(filter(is_sharded, params))
    own = [states.get(param, {}) for param in sharded]
    written = sharded + [state[key] for state in own for key in SPREAD if key in state]
    grads = [local(param.grad) for param in sharded if param.grad is not None]
    layouts = READER.layouts(grads), *map(Tensor.is_neg, grads), *map(Tensor._is_zerotensor, grads)
    spread = [(p.placements, p.grad.placements) for p in sharded]  # type: ignore[attr-defined, union-attr]
    return [READER.places(list(map(local, written))), *layouts, *spread]


def check_capturable(name: str, param: Tensor, capturable: bool) -> None:
    """Raises NotImplementedError if a captured step would read gradients that are gone."""
    if capturable and is_sharded(param):
        raise NotImplementedError(
            f"{name} is a DTensor, whose gradients are new tensors at each step, and what is"
            " captured goes on with the old ones: leave capturable out"
        )


def check_spread(name: str, param: Tensor, state: State) -> None:
    """Raises ValueError if what a state has for each entry of a weight is spread in another way."""
    for key in SPREAD:
        value = state.get(key)
        if value is None:
            continue
        fits = is_sharded(value) == is_sharded(param)
        if fits and is_sharded(param):
            mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
            fits = value.placements == placements and value.device_mesh == mesh
        if not fits:
            raise ValueError(
                f"{name} is {_spread(param)}, and {key} in its state is {_spread(value)}: after"
                " fully_shard or a change of the mesh load the state through"
                " torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )


def _spread(tensor: Tensor) -> str:
    if not is_sharded(tensor):
        return "a plain tensor"
    placements = tuple(tensor.placements)  # type: ignore[attr-defined]
    return f"a DTensor with placements {placements}"
