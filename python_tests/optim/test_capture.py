"""Steps that never wait for the device, and CUDA graphs: what can be captured and what is refused.

On a machine without a GPU, weights on the meta device stand for one whose answers never come: any
look at a value raises. Capturing itself is tried on a GPU only.
"""

import copy

import pytest
import torch

from lowrank_kernels import FiraAdamW, GaLoreAdamW, Subspace
from lowrank_kernels.optim import lowrank_adamw

GAP = 4
METHODS = {
    "galore": (GaLoreAdamW, {}),
    "fira": (FiraAdamW, {}),
    "fira-paper": (FiraAdamW, {"residual": "paper"}),
}


def make(method, device="cpu", dtype=torch.float32, lr=0.05, **options):
    """Two equal projected matrices, a third, and an AdamW vector; gradients are set."""
    cls, parts = METHODS[method]
    rng = torch.Generator().manual_seed(0)
    shapes = [(12, 20), (12, 20), (20, 8), (7,)]
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=rng).to(device, dtype)) for shape in shapes
    ]
    groups = [
        {"params": params[:3], "rank": 4, "update_proj_gap": GAP},
        {"params": params[3:], "weight_decay": 0.0},
    ]
    subspace = Subspace(stagger=False)  # as with `capturable`, also for those compared with it
    options = {
        **{"backend": "reference", "weight_decay": 0.1, "subspace": subspace},
        **parts,
        **options,
    }
    return params, cls(groups, lr=lr, **options)


def set_grads(params, seed):
    rng = torch.Generator().manual_seed(100 + seed)
    for param in params:
        value = torch.randn(param.shape, generator=rng).to(param)
        if param.grad is None:
            param.grad = value
        else:
            param.grad.copy_(value)


def run(params, optimizer, steps, first=0):
    for index in range(first, first + steps):
        set_grads(params, index)
        optimizer.step()


def values(params, optimizer):
    tensors = list(params)
    for param in params:
        tensors += [v for v in optimizer.state[param].values() if isinstance(v, torch.Tensor)]
    return [tensor.detach().cpu().float() for tensor in tensors]


CRITERION = Subspace(stagger=False, criterion="relative_norm", threshold=0.1)


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"rounding": "stochastic"}, {"maximize": True}),
        *({"monitor": True}, {"subspace": CRITERION}),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_between_refreshes_reads_nothing_from_the_device(method, options):
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    params, optimizer = make(method, "meta", dtype, **options)
    set_grads(params, 0)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        optimizer.step()  # the first basis needs a look at the gradient
    for param in params[:3]:
        optimizer.state[param]["basis_step"] = 0
    optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_counting_on_the_device_gives_the_same_trajectory(method, dtype):
    params, optimizer = make(method, dtype=dtype)
    lr = torch.tensor(0.05, dtype=torch.float64)
    others, capturable = make(method, dtype=dtype, lr=lr, capturable=True)
    run(params, optimizer, 2 * GAP + 1)
    run(others, capturable, 2 * GAP + 1)
    unit = torch.finfo(torch.float32 if dtype is torch.bfloat16 else dtype).eps
    for param, other in zip(params, others, strict=True):
        if dtype is torch.bfloat16:
            assert (param != other).float().mean() < 0.02  # a value near the middle of two
        else:
            torch.testing.assert_close(param, other, rtol=100 * unit, atol=100 * unit)
        assert float(capturable.state[other]["step"]) == 2 * GAP + 1


def test_a_changed_learning_rate_tensor_is_used():
    params, optimizer = make("fira")
    others, capturable = make("fira", lr=torch.tensor(0.05), capturable=True)
    for groups, lr in ((optimizer.param_groups, 0.01), (capturable.param_groups, None)):
        for group in groups:
            if lr is None:
                group["lr"].fill_(0.01)
            else:
                group["lr"] = lr
    run(params, optimizer, 2)
    run(others, capturable, 2)
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_capturable_resumes_bit_for_bit(method):
    params, optimizer = make(method, lr=torch.tensor(0.05), capturable=True)
    run(params, optimizer, GAP - 1)
    others, resumed = make(method, lr=torch.tensor(0.05), capturable=True)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((params, optimizer), (others, resumed)):
        run(*pair, GAP, first=GAP - 1)
    for one, other in zip(values(params, optimizer), values(others, resumed), strict=True):
        assert torch.equal(one, other)


def test_a_state_dict_moves_between_host_and_device_counting():
    params, optimizer = make("fira")
    run(params, optimizer, 3)
    others, capturable = make("fira", capturable=True)
    capturable.load_state_dict(optimizer.state_dict())
    assert float(capturable.state[others[0]]["step"]) == 3
    run(others, capturable, 1, first=3)
    optimizer.load_state_dict(capturable.state_dict())
    assert optimizer.state[params[0]]["step"].device.type == "cpu"
    assert float(optimizer.state[params[0]]["step"]) == 4


def test_with_capturable_the_count_lies_beside_the_weight():
    params, optimizer = make("fira")
    run(params, optimizer, 1)
    others, capturable = make("fira", "meta", capturable=True)
    capturable.load_state_dict(optimizer.state_dict())
    assert {capturable.state[other]["step"].device.type for other in others} == {"meta"}
    fresh, capturable = make("fira", "meta", capturable=True)
    set_grads(fresh, 0)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        capturable.step()  # reads the counts
    assert capturable.state[fresh[0]]["step"].device.type == "meta"


@pytest.fixture
def capturing(monkeypatch):
    return lambda: monkeypatch.setattr(lowrank_adamw, "_capturing", lambda: True)


def refused(params, optimizer, match):
    before = [value.clone() for value in values(params, optimizer)]
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    for old, new in zip(before, values(params, optimizer), strict=True):
        assert torch.equal(old, new)


def test_capture_without_capturable_is_refused(capturing):
    params, optimizer = make("fira")
    run(params, optimizer, 1)
    capturing()
    refused(params, optimizer, "capturable=True")


def test_capture_of_the_first_step_is_refused(capturing):
    params, optimizer = make("fira", lr=torch.tensor(0.05), capturable=True)
    set_grads(params, 0)
    capturing()
    refused(params, optimizer, "parameter 0 of group 0: take an eager step")


def test_capture_right_after_loading_is_refused(capturing):
    """The host then knows of no count on the device."""
    params, optimizer = make("fira", lr=torch.tensor(0.05), capturable=True)
    run(params, optimizer, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    capturing()
    refused(params, optimizer, "parameter 0 of group 0: take an eager step")


def test_capture_of_a_refresh_is_refused(capturing):
    params, optimizer = make("fira", lr=torch.tensor(0.05), capturable=True)
    run(params, optimizer, GAP)
    capturing()
    refused(params, optimizer, "parameter 0 of group 0: its basis is due after 4 steps")


def test_capture_with_a_learning_rate_that_is_a_number_is_refused(capturing):
    params, optimizer = make("fira", capturable=True)
    run(params, optimizer, 1)
    capturing()
    refused(params, optimizer, "group 0: the graph would keep lr=0.05 for ever")


def test_capture_between_refreshes_counts_on_the_device_only(capturing):
    """What a replay does: the step of the device moves, the host reads nothing."""
    params, optimizer = make("fira", lr=torch.tensor(0.05), capturable=True)
    others, plain = make("fira", lr=torch.tensor(0.05), capturable=True)
    run(params, optimizer, 1)
    run(others, plain, 3)
    capturing()
    run(params, optimizer, 2, first=1)
    for one, other in zip(values(params, optimizer), values(others, plain), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_captured_step_reads_nothing_from_the_device(method, capturing):
    params, optimizer = make(method, lr=torch.tensor(0.05), capturable=True)
    run(params, optimizer, 1)
    others, captured = make(method, "meta", capturable=True)
    captured.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    captured.param_groups[0]["lr"] = torch.empty((), device="meta")
    captured._counted = dict.fromkeys(others, 1)
    set_grads(others, 1)
    others[3].grad = None  # torch's AdamW refuses to be captured on this device
    capturing()
    captured.step()


def test_an_eager_step_after_replays_refreshes_when_they_passed_the_gap():
    params, optimizer = make("fira", lr=torch.tensor(0.05), capturable=True)
    run(params, optimizer, 1)
    for param in params:
        optimizer.state[param]["step"] += GAP  # a graph was replayed
    run(params, optimizer, 1, first=1)
    assert optimizer.state[params[0]]["basis_step"] == GAP + 1


def test_learning_rate_on_the_device_needs_capturable():
    params, optimizer = make("fira")
    set_grads(params, 0)
    optimizer.param_groups[1]["lr"] = torch.zeros((), device="meta")
    with pytest.raises(ValueError, match="group 1: lr is a tensor on meta"):
        optimizer.step()
    assert not optimizer.state


def test_stochastic_rounding_moves_weights_that_nearest_leaves_and_repeats_its_bits():
    results = {}
    for name in ("nearest", "stochastic", "again"):
        rounding = "nearest" if name == "nearest" else "stochastic"
        params, optimizer = make("galore", dtype=torch.bfloat16, lr=1e-4, rounding=rounding)
        start = [param.detach().clone() for param in params]
        run(params, optimizer, 3)
        results[name] = [param.detach() for param in params]
    moved = {name: sum((a != b).sum() for a, b in zip(start[:3], got[:3], strict=True))
             for name, got in results.items()}  # fmt: skip
    assert moved["stochastic"] > 1.5 * moved["nearest"]
    for one, other in zip(results["stochastic"], results["again"], strict=True):
        assert torch.equal(one, other)
    # Equal matrices with equal gradients draw different noise.
    params, optimizer = make("galore", dtype=torch.bfloat16, lr=1e-3, rounding="stochastic")
    params[1].data.copy_(params[0])
    set_grads(params, 0)
    params[1].grad.copy_(params[0].grad)
    optimizer.step()
    assert not torch.equal(params[0], params[1])


@pytest.mark.parametrize("capturable", [False, True])
def test_noise_changes_from_step_to_step(capturable):
    """After so many steps the bias corrections are 1: nothing else differs."""
    results = []
    for completed in (10**6, 10**6 + 1):
        options = {"rounding": "stochastic", "capturable": capturable}
        params, optimizer = make("galore", dtype=torch.bfloat16, lr=1e-3, **options)
        run(params, optimizer, 1)
        for param in params:
            optimizer.state[param]["step"].fill_(completed)
        for param in params[:3]:
            optimizer.state[param]["basis_step"] = 10**6
        run(params, optimizer, 1)
        results.append(params)
    assert not torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][3], results[1][3])


def test_stochastic_rounding_resumes_bit_for_bit():
    options = {"dtype": torch.bfloat16, "rounding": "stochastic"}
    params, optimizer = make("fira", **options)
    run(params, optimizer, 3)
    others, resumed = make("fira", **options)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((params, optimizer), (others, resumed)):
        run(*pair, 3, first=3)
    for one, other in zip(values(params, optimizer), values(others, resumed), strict=True):
        assert torch.equal(one, other)


def test_copies_keep_the_options():
    _, optimizer = make("fira", capturable=True, rounding="stochastic")
    copied = copy.deepcopy(optimizer)
    assert (copied.capturable, copied.rounding) == (True, "stochastic")


def test_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="nearest, stochastic, got 'up'"):
        make("fira", rounding="up")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["reference", "foreach", "triton", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_replayed_graph_has_the_bits_of_eager_steps(method, dtype, backend):
    def build():
        lr = torch.tensor(0.05, device="cuda")
        return make(method, "cuda", dtype, lr, capturable=True, backend=backend)

    (params, optimizer), (others, graphed) = build(), build()
    run(params, optimizer, 1)
    run(others, graphed, 1)
    graph = torch.cuda.CUDAGraph()
    set_grads(others, 1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        graphed.step()
    for index in range(1, GAP):
        for groups in (optimizer.param_groups, graphed.param_groups):
            for group in groups:
                group["lr"].fill_(0.05 / index)
        set_grads(params, index)
        optimizer.step()
        set_grads(others, index)
        graph.replay()
    for one, other in zip(values(params, optimizer), values(others, graphed), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["reference", "foreach", "native", "triton", "auto"])
@pytest.mark.parametrize("method", METHODS)
def test_cuda_reports_no_synchronization_between_refreshes(method, backend):
    params, optimizer = make(method, "cuda", backend=backend)
    run(params, optimizer, 1)
    set_grads(params, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
