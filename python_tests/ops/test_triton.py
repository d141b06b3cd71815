"""What only the Triton kernels can get wrong: tiles, split sums, workspaces, launches.

Without a GPU they run in Triton's interpreter, in float32. It has no bounds checks, so every buffer
lies between zones of NaN: a read outside spoils the result, a write outside spoils the zone.
"""

import pytest
import torch
from ops.test_operations import STEPS, Run, assert_limiter_norm, error, steps_through

from lowrank_kernels import FiraAdamW, GaLoreAdamW
from lowrank_kernels.ops import Side

pytest.importorskip("triton")
from lowrank_kernels.ops import triton as kernels

FORMS = [None, "official", "paper"]
SHAPES_AND_RANKS = [((37, 61), 13), ((50, 34), 34), ((16, 131), 7)]
GUARD = 4099


@pytest.fixture
def poisoned_workspaces():
    """torch fills what it does not initialize with NaN in this mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def split_into(parts):
    """The configurations as they are, but for the parts of the reduction and small tiles."""
    original = kernels.project_config

    def config(*shape):
        return original(*shape)._replace(split=parts, channels=16, rank=16, depth=16)

    return config


@pytest.mark.parametrize("shape_rank", SHAPES_AND_RANKS, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", list(Side))
def test_split_sums_and_many_tiles(side, form, parts, shape_rank, monkeypatch, poisoned_workspaces):
    """More parts than blocks of the reduction leave some of them empty."""
    monkeypatch.setattr(kernels, "project_config", split_into(parts))
    run = steps_through("triton", torch.float32, *shape_rank, side, form)
    for name, value, plain, exact in run.outputs():
        rounding = torch.finfo(value.dtype).eps * float(torch.linalg.norm(exact))
        assert error(value, exact) <= 2 * max(error(plain, exact), rounding), name
    if form:
        assert_limiter_norm(run, torch.float32)


def guarded(tensor):
    storage = torch.full((tensor.numel() + 2 * GUARD,), float("nan"), dtype=tensor.dtype)
    inside = storage[GUARD:-GUARD].view(tensor.shape)
    inside.copy_(tensor)
    return inside, storage


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("form", [None, "official"])
@pytest.mark.parametrize("shape_rank", SHAPES_AND_RANKS, ids=str)
@pytest.mark.parametrize("side", list(Side))
def test_nothing_is_touched_outside_the_tensors(side, shape_rank, form, parts, monkeypatch):
    monkeypatch.setattr(kernels, "project_config", split_into(parts))
    plain = steps_through("triton", torch.float32, *shape_rank, side, form)
    run = Run("triton", torch.float32, *shape_rank, side, form)
    zones = []
    for name in ("weight", "basis", "exp_avg", "exp_avg_sq", "limiter_norm"):
        inside, storage = guarded(getattr(run, name))
        setattr(run, name, inside)
        zones.append(storage)
    for index, grad in enumerate(run.grads):
        run.grads[index], storage = guarded(grad)
        zones.append(storage)
    for index in range(STEPS):
        run.step(index)
    for storage in zones:
        assert storage[:GUARD].isnan().all()
        assert storage[-GUARD:].isnan().all()
    for name in ("weight", "exp_avg", "exp_avg_sq", "limiter_norm"):
        assert torch.equal(getattr(run, name), getattr(plain, name)), name


class Counted:
    """Stands for a kernel: counts its launches, and runs it unless told not to."""

    def __init__(self, kernel, log, run):
        self.kernel, self.log, self.run = kernel, log, run

    def __getitem__(self, grid):
        self.log.append(self.kernel.__name__)
        return self.kernel[grid] if self.run else lambda *args, **options: None


def count_launches(monkeypatch, run=True):
    log = []
    for name in ("project_kernel", "finish_split_kernel", "channel_scale_kernel", "update_kernel"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, Counted(kernel, log, run))
    return log


def one_step(cls, shape=(64, 48)):
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = cls([{"params": [weight], "rank": 8}], lr=0.1, backend="triton")
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    return weight, optimizer


def test_a_step_is_three_launches_for_fira_and_two_for_galore(monkeypatch):
    log = count_launches(monkeypatch)
    one_step(FiraAdamW)
    assert log == ["project_kernel", "channel_scale_kernel", "update_kernel"]
    log.clear()
    one_step(GaLoreAdamW)
    assert log == ["project_kernel", "update_kernel"]


def test_launching_asks_nothing_of_the_device(monkeypatch):
    """Each of these methods would wait for a GPU."""
    run = Run("triton", torch.float32, (64, 48), 8, Side.RIGHT, "official")
    run.step(0)
    count_launches(monkeypatch, run=False)
    monkeypatch.setattr("ops.test_operations.literal_step", lambda *_, **__: None)
    monkeypatch.setattr("ops.test_operations.float", lambda _: 0.0, raising=False)

    def refuse(*_, **__):
        raise AssertionError("the host waits for the device")

    for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    run.step(1)


def test_two_runs_are_bitwise_equal():
    for form in FORMS:
        runs = [
            steps_through("triton", torch.float32, (130, 70), 64, Side.RIGHT, form) for _ in "ab"
        ]
        for name in ("weight", "exp_avg", "exp_avg_sq", "limiter_norm"):
            assert torch.equal(*(getattr(run, name) for run in runs))
