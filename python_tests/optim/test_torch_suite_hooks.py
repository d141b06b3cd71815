"""Hooks around steps, saving and loading: all of torch's kinds, in torch's order."""

import copy

import pytest
import torch
from optim.torch_suite import GAP, Kind, assert_same, every_kind, model, set_grads, snapshot, train
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


def start(kind, steps=0, **options):
    module = model()
    optimizer = kind(module.named_parameters(), **options)
    train(module, optimizer, range(steps))
    return module, optimizer


@every_kind
def test_step_hooks_run_in_order_until_they_are_removed(kind):
    module, optimizer = start(kind)
    calls = []

    def noted(text):
        return lambda hooked, args, kwargs: calls.append((text, hooked is optimizer))

    handles = [
        optimizer.register_step_pre_hook(noted("pre 1")),
        optimizer.register_step_pre_hook(noted("pre 2")),
        optimizer.register_step_post_hook(noted("post 1")),
        optimizer.register_step_post_hook(noted("post 2")),
        register_optimizer_step_pre_hook(noted("all pre")),
        register_optimizer_step_post_hook(noted("all post")),
    ]
    try:
        train(module, optimizer, range(2))
    finally:
        for handle in handles:
            handle.remove()
    once = ["all pre", "pre 1", "pre 2", "post 1", "post 2", "all post"]
    assert calls == [(text, True) for text in once * 2]
    train(module, optimizer, range(2))
    assert len(calls) == 2 * len(once)


@every_kind
def test_a_step_pre_hook_may_change_gradients_and_arguments(kind):
    """As gradient clipping does, and as a hook that exchanges the closure."""
    module, optimizer = start(kind)
    other, plain = start(kind)

    def halve(hooked, args, kwargs):
        for group in hooked.param_groups:
            for param in group["params"]:
                param.grad *= 0.5
        return (hooked, lambda: 2.0), kwargs

    optimizer.register_step_pre_hook(halve)
    for seed in range(2 * GAP):
        set_grads(module.parameters(), seed)
        assert optimizer.step(lambda: 1.0) == 2.0
        set_grads(other.parameters(), seed)
        for param in other.parameters():
            param.grad *= 0.5
        plain.step()
    assert_same(snapshot(module, optimizer), snapshot(other, plain))


@every_kind
def test_a_step_post_hook_sees_the_new_weights(kind):
    module, optimizer = start(kind)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(module[0].weight.detach().clone()))
    train(module, optimizer, range(2))
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], module[0].weight)


@every_kind
def test_state_dict_hooks_run_in_order_and_may_change_what_is_saved(kind):
    _, optimizer = start(kind, steps=1)
    calls = []

    def pre(text):
        def hook(hooked):
            calls.append(text)
            hooked.state["from pre"] = text

        return hook

    def post(text):
        def hook(hooked, state_dict):
            calls.append(text)
            return {**state_dict, "from post": [*state_dict.get("from post", []), text]}

        return hook

    optimizer.register_state_dict_pre_hook(pre("pre 2"))
    optimizer.register_state_dict_pre_hook(pre("pre 1"), prepend=True)
    optimizer.register_state_dict_post_hook(post("post 2"))
    handle = optimizer.register_state_dict_post_hook(post("post 1"), prepend=True)
    saved = optimizer.state_dict()
    assert calls == ["pre 1", "pre 2", "post 1", "post 2"]
    assert saved["state"]["from pre"] == "pre 2"
    assert saved["from post"] == ["post 1", "post 2"]
    handle.remove()
    assert optimizer.state_dict()["from post"] == ["post 2"]


@every_kind
@pytest.mark.parametrize("returned", [True, False], ids=["returned", "changed in place"])
def test_load_pre_hooks_run_in_order_and_may_change_what_is_loaded(returned, kind):
    _, optimizer = start(kind, steps=1)

    def pre(lr):
        def hook(hooked, state_dict):
            assert hooked.param_groups[0]["lr"] == 0.001, "nothing is loaded yet"
            mine = copy.deepcopy(state_dict) if returned else state_dict
            for group in mine["param_groups"]:
                group["lr"] = lr
            return mine if returned else None

        return hook

    file = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(pre(0.5))
    optimizer.register_load_state_dict_pre_hook(pre(0.25), prepend=True)
    optimizer.load_state_dict(file)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


@every_kind
def test_load_post_hooks_run_in_order_and_see_what_was_loaded(kind):
    module, saved = start(kind, steps=2, lr=0.5)
    optimizer, file = kind(module.named_parameters()), copy.deepcopy(saved.state_dict())
    calls = []

    def post(text):
        def hook(hooked):
            steps = {int(state["step"]) for state in hooked.state.values()}
            calls.append((text, hooked.param_groups[0]["lr"], steps))
            for state in hooked.state.values():
                state["exp_avg"] = torch.zeros_like(state["exp_avg"])

        return hook

    optimizer.register_load_state_dict_post_hook(post("2"))
    handle = optimizer.register_load_state_dict_post_hook(post("1"), prepend=True)
    optimizer.load_state_dict(file)
    assert calls == [("1", 0.5, {2}), ("2", 0.5, {2})]
    assert not any(state["exp_avg"].any() for state in optimizer.state.values())
    assert all(state["exp_avg"].any() for state in saved.state.values())
    handle.remove()
    optimizer.load_state_dict(saved.state_dict())
    assert [text for text, *_ in calls] == ["1", "2", "2"]


@every_kind
def test_load_pre_and_post_hooks_together(kind):
    """What the first returns is what the second sees."""
    _, optimizer = start(kind, steps=1)
    seen = []

    def other_lr(_, state_dict):
        groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(other_lr)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [0.5]


@every_kind
def test_a_subclass_with_hooks_and_keys_of_its_own(kind):
    """Its constructor registers hooks; its state dict has one key more."""

    class Counting(kind.cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.steps = 0
            self.register_step_post_hook(self.count)

        def count(self, *_):
            self.steps += 1

        def state_dict(self):
            return {**super().state_dict(), "steps": self.steps}

        def load_state_dict(self, state_dict):
            state_dict = dict(state_dict)
            self.steps = state_dict.pop("steps")
            super().load_state_dict(state_dict)

    counting = Kind(Counting, kind.options, kind.projected)
    module, optimizer = start(counting, steps=2)
    twin = copy.deepcopy(module)
    resumed = counting(twin.named_parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.steps == 2
    for each in ((module, optimizer), (twin, resumed)):
        train(*each, range(2, 2 + GAP))
    assert resumed.steps == optimizer.steps == 2 + GAP
    assert_same(snapshot(module, optimizer), snapshot(twin, resumed))


@every_kind
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none, kind):
    module, optimizer = start(kind, steps=1)
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in module.parameters():
        assert (param.grad is None) == set_to_none
        assert set_to_none or not param.grad.any()
