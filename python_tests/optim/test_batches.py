"""Equal matrices are stepped together, as many as the backend takes, and only equal ones."""

import pytest
import torch

from lowrank_kernels import FiraAdamW, GaLoreAdamW, Subspace
from lowrank_kernels.ops import reference

SHAPES = [(12, 20), (20, 12), (12, 20), (12, 20), (12, 12), (20, 12), (12, 20)]


def make(**options):
    rng = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in SHAPES]
    optimizer = FiraAdamW(
        [{"params": params, "rank": 3, "update_proj_gap": 4}],
        lr=0.05,
        backend="reference",
        subspace=Subspace(stagger=False),  # as with `capturable`
        **options,
    )
    return params, optimizer


def step(params, optimizer, seed, skip=()):
    rng = torch.Generator().manual_seed(seed)
    for index, param in enumerate(params):
        grad = torch.randn(param.shape, generator=rng).to(param.dtype)
        param.grad = None if index in skip else grad
    optimizer.step()


@pytest.fixture
def seen(monkeypatch):
    """Weights of each call of operation 3, with three matrices a batch."""
    calls = []
    update = reference.Operations.back_project_update

    def record(operations, matrices, *args):
        calls.append([param.data_ptr() for param in matrices.params])
        update(operations, matrices, *args)

    monkeypatch.setattr(reference.Operations, "back_project_update", record)
    monkeypatch.setattr(reference, "batch_size", lambda *_: 3)
    return calls


def places(params, calls):
    index = {param.data_ptr(): place for place, param in enumerate(params)}
    return [[index[address] for address in call] for call in calls]


def test_equal_matrices_go_together_up_to_the_size_of_a_batch(seen):
    params, optimizer = make()
    step(params, optimizer, 0)
    assert places(params, seen) == [[0, 2, 3], [6], [1, 5], [4]]


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_batches_of_any_size_give_the_same_bits(options, monkeypatch):
    results = []
    for size in (1, 3, 100):
        monkeypatch.setattr(reference, "batch_size", lambda *_, size=size: size)
        params, optimizer = make(**options)
        for seed in range(6):
            step(params, optimizer, seed)
        results.append(params)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_matrices_of_different_age_are_not_mixed(seen):
    params, optimizer = make()
    step(params, optimizer, 0, skip=(2,))
    seen.clear()
    step(params, optimizer, 1)
    assert places(params, seen) == [[0, 3, 6], [1, 5], [2], [4]]
    alone, other = make()
    for seed, skip in ((0, (2,)), (1, ())):
        step(alone, other, seed, skip)
    for one, two in zip(params, alone, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("change", ["strides of the weight", "strides of the gradient", "dtype"])
def test_matrices_of_different_layout_are_not_mixed(seen, change):
    params, optimizer = make()
    rng = torch.Generator().manual_seed(0)
    for param in params:
        param.grad = torch.randn(param.shape, generator=rng)
    if change == "strides of the weight":
        params[3].data = params[3].data.T.contiguous().T
    elif change == "strides of the gradient":
        params[3].grad = params[3].grad.T.contiguous().T
    else:
        params[3].data, params[3].grad = params[3].data.double(), None
        params[3].grad = torch.randn(params[3].shape, generator=rng, dtype=torch.float64)
    optimizer.step()
    assert places(params, seen) == [[0, 2, 6], [1, 5], [3], [4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counting_on_the_device_keeps_each_matrix_with_its_own_count(dtype, monkeypatch):
    """With bfloat16 weights each also keeps its own noise."""
    monkeypatch.setattr(reference, "batch_size", lambda *_: 2)
    results = []
    for capturable in (False, True):
        params, optimizer = make(capturable=capturable, rounding="stochastic")
        for param in params:
            param.data = param.data.to(dtype)
        for seed, skip in enumerate([(2, 5), (), (0,), ()]):
            step(params, optimizer, seed, skip)
        results.append(params)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


CHANGED_IN_PLACE = {
    "transposed": lambda tensor: tensor.t_(),
    "smaller": lambda tensor: tensor.resize_(4, 96),
    "strided": lambda tensor: tensor.as_strided_((8, 96), (1, 8)),
    "halved": lambda tensor: setattr(tensor, "data", tensor.data.view(torch.float16)[:, :96]),
}


@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("change", CHANGED_IN_PLACE)
def test_a_moment_that_changes_its_layout_in_its_place_is_refused(change, key, backend):
    """Kernels would write where its other elements were."""
    param = torch.nn.Parameter(torch.ones(16, 96))
    optimizer = FiraAdamW([{"params": [param], "rank": 8}], lr=0.01, backend=backend)
    for _ in range(2):
        param.grad = torch.randn(16, 96)
        optimizer.step()
    state, before = optimizer.state[param], param.clone()
    CHANGED_IN_PLACE[change](state[key])
    with pytest.raises(ValueError, match=key):
        optimizer.step()
    assert torch.equal(param, before)
    assert int(state["step"]) == 2


@pytest.mark.parametrize("key", ["nonfinite", "limited", "gap_factor", "refreshes", "rank"])
def test_an_entry_that_was_taken_out_of_a_state_is_put_back(key):
    param = torch.nn.Parameter(torch.ones(16, 96))
    optimizer = FiraAdamW([{"params": [param], "rank": 8}], lr=0.01, monitor=True)
    param.grad = torch.randn(16, 96)
    optimizer.step()
    del optimizer.state[param][key]
    optimizer.step()
    assert key in optimizer.state[param]


def test_an_interval_that_is_shortened_by_hand_is_seen():
    param = torch.nn.Parameter(torch.ones(16, 96))
    subspace = Subspace(lazy=0.0001, stagger=False)
    groups = [{"params": [param], "rank": 8, "update_proj_gap": 2}]
    optimizer = GaLoreAdamW(groups, lr=0.01, subspace=subspace)
    for _ in range(16):
        param.grad = torch.randn(16, 96)
        optimizer.step()
    state = optimizer.state[param]
    assert state["gap_factor"] > 1
    state["gap_factor"], before = 1, state["basis_step"]
    for _ in range(3):
        optimizer.step()
    assert state["basis_step"] > before


def test_a_count_of_steps_that_is_set_back_is_seen():
    param = torch.nn.Parameter(torch.ones(16, 96))
    subspace = Subspace(criterion="norm", threshold=1.0, check_gap=3, stagger=False)
    groups = [{"params": [param], "rank": 8, "update_proj_gap": 1000}]
    optimizer = GaLoreAdamW(groups, lr=0.01, subspace=subspace)
    for step in range(15):
        param.grad = torch.randn(16, 96) * (1.0 if step < 11 else 1e-3)
        if step == 11:
            optimizer.state[param]["step"].fill_(2)
        optimizer.step()
    assert optimizer.state[param]["basis_step"] == 3
