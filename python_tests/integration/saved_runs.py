"""Runs of weights that are spread over ranks, saved and loaded by torch's functions."""

from integration.ranks import whole
from integration.spread_runs import METHODS, plain, setup, take
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lowrank_kernels.optim.placement import SPREAD

OPTIONS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}


def fresh(spread, method, proj_type="right"):
    """A model of the weights, and its optimizer."""
    weights, optimizer = setup(spread, proj_type=proj_type, **METHODS[method])
    model = nn.ParameterDict({f"w{place}": weight for place, weight in enumerate(weights)})
    return model, optimizer


def result_of(model, optimizer):
    weights = list(model.values())
    states = [optimizer.state[weight] for weight in weights]
    kept = [key for key in SPREAD if key in states[0]]
    moments = [whole(state[key]) for state in states for key in kept]
    return [whole(weight) for weight in weights] + moments, [plain(state) for state in states]


def go_on(model, optimizer, spread, seeds):
    take(list(model.values()), optimizer, spread, seeds)


def dicts_of(model, optimizer, options):
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def loaded(spread, method, form, folder):
    model, optimizer = fresh(spread, method)
    found = dicts_of(model, optimizer, OPTIONS[form])
    dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(model, found["model"], options=OPTIONS[form])
    set_optimizer_state_dict(model, optimizer, found["optimizer"], options=OPTIONS[form])
    return model, optimizer
