"""What is planned is what a real step takes, to the byte."""

from functools import partial

import pytest
import torch
from devices import device_of
from torch import nn

from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, LowRankAdamW, Subspace
from lowrank_kernels.optim.allocations import Allocations
from lowrank_kernels.optim.state import state_bytes
from lowrank_kernels.optim.workspace import planned_workspace
from lowrank_kernels.subspace import refresh_bases
from lowrank_kernels.subspace.moments import MOMENTS

DTYPES = [torch.float32, torch.bfloat16]
BACKENDS = ["reference", "foreach", "native"]
# Equal and unequal ones of either side, ranks and rows that are and are not aligned, one that is
# larger than a tile, and a plain parameter; the largest decides.
MODELS = {
    "left": ([(200, 300)], 30),
    "right": ([(300, 201)], 30),
    "square": ([(256, 256)], 64),
    "equal": ([(201, 300)] * 5, 32),
    "unequal": ([(300, 200)] * 3 + [(64, 64), (90, 310), (50,)], 30),
    "tiles": ([(1500, 1400)], 20),
    "long": ([(700, 48)], 40),
    "thin": ([(30, 400)], 1),
    "plain": ([(40, 60), (3000,)], 8),
}
OPTIMIZERS = {
    "galore": GaLoreAdamW,
    "fira": FiraAdamW,
    "paper": lambda params, **options: FiraAdamW(params, residual="paper", **options),
}
# What they change of a batch is the same whatever the shapes.
FORMS = {
    "apollo": {"residual": "scale", "per": "channel"},
    "mini": {"residual": "scale", "per": "matrix"},
    "normalize": {"residual": "normalize"},
    "sign": {"residual": "sign", "residual_momentum": 0.9},
    "orthogonal": {"residual": "orthogonal"},
    "orthogonal, averaged": {"residual": "orthogonal", "residual_momentum": 0.9},
}
EVERY = OPTIMIZERS | {name: partial(LowRankAdamW, **own) for name, own in FORMS.items()}


def parameters(shapes, dtype, device="cpu"):
    rng = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=rng).to(device, dtype) for shape in shapes]
    return [nn.Parameter(value) for value in values]


def grouped(params, rank, **options):
    plain = [param for param in params if param.dim() != 2]
    matrices = {"params": [p for p in params if p.dim() == 2], "rank": rank, **options}
    return [matrices, {"params": plain}] if plain else [matrices]


def set_gradients(params):
    for param in params:
        param.grad = torch.randn_like(param)


def peak_of_a_step(optimizer, params):
    """Of the second one: the first makes the state."""
    for _ in range(2):
        set_gradients(params)
        with Allocations() as allocations:
            optimizer.step()
    return allocations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_workspace_of_a_step_is_what_it_holds(dtype, backend, method, model):
    shapes, rank = MODELS[model]
    params = parameters(shapes, dtype)
    optimizer = OPTIMIZERS[method](grouped(params, rank), lr=0.01, backend=backend)
    allocations = peak_of_a_step(optimizer, params)
    planned = planned_workspace(optimizer, "cpu").step
    assert planned == allocations.peak_bytes > 0
    assert allocations.live_bytes == 0


@pytest.mark.parametrize("proj_type", ["left", "right"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", EVERY)
def test_workspace_of_either_side(dtype, backend, method, proj_type):
    if backend == "native" and dtype is torch.float64:
        pytest.skip("the native backend keeps float32 state")
    params = parameters([(210, 150)] * 2, dtype)
    groups = grouped(params, 17, proj_type=proj_type)
    optimizer = EVERY[method](groups, lr=0.01, backend=backend)
    allocations = peak_of_a_step(optimizer, params)
    planned = planned_workspace(optimizer, "cpu").step
    assert planned == allocations.peak_bytes > 0


@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"monitor": True},
        {"rounding": "stochastic"},
        {"capturable": True},
        {"subspace": Subspace(criterion="displacement", check_gap=1, threshold=1e-9)},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
def test_workspace_of_what_can_be_asked_for_besides(backend, options):
    if backend == "native" and "capturable" in options:
        pytest.skip("the native backend is not capturable")
    params = parameters([(210, 150)] * 2 + [(70,)], torch.bfloat16)
    optimizer = FiraAdamW(grouped(params, 17), lr=0.01, backend=backend, **options)
    allocations = peak_of_a_step(optimizer, params)
    planned = planned_workspace(optimizer, "cpu").step
    assert allocations.peak_bytes <= planned <= 1.25 * allocations.peak_bytes
    assert not optimizer.state.keys() - set(params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"master": 24}], ids=str)
@pytest.mark.parametrize("state", ["bfloat16", "int8"])
def test_workspace_of_whole_parameters_in_fewer_bits(state, options, dtype):
    """Larger than a block of torch's operations, which only weights of 24 bits take on a CPU."""
    params = parameters([(700, 500)], dtype)
    optimizer = GaLoreAdamW(params, lr=0.01, state=state, **options)
    allocations = peak_of_a_step(optimizer, params)
    planned = planned_workspace(optimizer, "cpu").step
    assert planned == allocations.peak_bytes
    assert (planned > 0) == (bool(options) and dtype is torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_whole_parameters_in_fewer_bits_take_one_launch_of_triton():
    """Predicted of a GPU that is not there."""
    pytest.importorskip("triton")
    optimizer = GaLoreAdamW(parameters([(700, 500)], torch.bfloat16), lr=0.01, state="int8")
    assert planned_workspace(optimizer, "cuda").step <= 64


class NoKernel:
    """The interpreter copies what a kernel reads and writes; only the launchers are looked at."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("method", ["galore", "fira"])
@pytest.mark.parametrize("shapes", [[(100, 90)] * 2, [(40, 2100)]], ids=["whole", "split"])
def test_workspace_of_triton(shapes, method, monkeypatch):
    for kernel in ("project_kernel", "channel_scale_kernel", "update_kernel"):
        monkeypatch.setattr(f"lowrank_kernels.ops.triton.{kernel}", NoKernel())
    device = device_of("triton")
    params = parameters(shapes, torch.float32, device)
    groups = grouped(params, 17, proj_type="right")
    optimizer = OPTIMIZERS[method](groups, lr=0.01, backend="triton")
    allocations = peak_of_a_step(optimizer, params)
    planned = planned_workspace(optimizer, device.type).step
    # Counters and tables, which are kept from one step to the next, are planned with each.
    assert allocations.peak_bytes <= planned <= 1.25 * allocations.peak_bytes


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"range_finder": "power"},
        {"range_finder": "power", "moments": "carry_ldadam", "interpolation": 0.9},
        *({"moments": moments} for moments in MOMENTS if moments != "keep"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "model", ["left", "right", "square", "equal", "unequal", "tiles", "long", "thin"]
)
def test_workspace_of_a_refresh_is_what_it_holds(dtype, parts, model, monkeypatch):
    shapes, rank = MODELS[model]
    params = parameters(shapes, dtype)
    groups = grouped(params, rank, update_proj_gap=1)
    subspace = Subspace(**parts, stagger=False)
    optimizer = GaLoreAdamW(groups, lr=0.01, subspace=subspace)
    peaks = []

    def measured(due, subspace):
        with Allocations() as allocations:
            refresh_bases(due, subspace)
        peaks.append(allocations.peak_bytes)

    monkeypatch.setattr("lowrank_kernels.optim.lowrank_adamw.refresh_bases", measured)
    for _ in range(2):
        set_gradients(params)
        optimizer.step()
    planned = planned_workspace(optimizer, "cpu").refresh
    assert planned == peaks[1] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_workspace_does_not_grow_with_the_layers(backend):
    sizes = []
    for layers in (8, 80):
        with torch.device("meta"):
            params = [nn.Parameter(torch.empty(1024, 2736)) for _ in range(layers)]
        optimizer = FiraAdamW(grouped(params, 256), backend=backend)
        sizes.append(planned_workspace(optimizer, "cpu"))
    assert sizes[0] == sizes[1]
    assert min(sizes[0].step, sizes[0].refresh) > 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "build",
    [
        GaLoreAdamW,
        FiraAdamW,
        lambda params, **options: FiraAdamW(params, monitor=True, **options),
        lambda params, **options: AdaRankGradAdamW(params, residual_energy=0.0, **options),
        lambda params, **options: LowRankAdamW(
            params, subspace=Subspace(criterion="norm", threshold=1.0), **options
        ),
        lambda params, **options: LowRankAdamW(
            params, subspace=Subspace(criterion="displacement", threshold=0.1), **options
        ),
    ],
    ids=["galore", "fira", "monitor", "adarankgrad", "norm", "displacement"],
)
def test_state_is_planned_to_the_byte(build, dtype, device):
    shapes = [(40, 60), (61, 37), (5, 9), (50,), (2, 3, 4)]
    params = parameters(shapes, dtype)
    optimizer = build(grouped(params, 7), lr=0.01)
    set_gradients(params)
    optimizer.step()
    held = {tuple(param.shape): state_bytes(optimizer.state[param]) for param in params}
    asked = build(grouped([nn.Parameter(param.detach().to(device)) for param in params], 7))
    rows = asked.plan()
    assert {row["shape"]: row["state_bytes"] for row in rows} == held
    assert not asked.state
    for row in rows:
        elements = torch.Size(row["shape"]).numel()
        assert row["weight_bytes"] == row["gradient_bytes"] == elements * dtype.itemsize
        assert row["dtype"] is dtype


def test_planning_allocates_nothing_of_the_size_of_a_parameter():
    params = parameters([(400, 300), (5000,)], torch.float32)
    optimizer = FiraAdamW(grouped(params, 30))
    with Allocations(device="cpu") as allocations:
        optimizer.plan()
    steps = 4 * len(params)
    assert allocations.peak_bytes <= steps


def test_rows_name_side_and_rank():
    params = parameters([(40, 60), (60, 40), (5, 9), (50,)], torch.float32)
    rows = GaLoreAdamW(grouped(params, 7)).plan()
    assert [row["projected"] for row in rows] == [True, True, True, False]
    assert [row["side"] for row in rows] == ["left", "right", "left", None]
    assert [row["rank"] for row in rows] == [7, 7, 5, None]


def test_frozen_parameters_have_neither_gradient_nor_state():
    params = parameters([(40, 60), (50,)], torch.float32)
    for param in params:
        param.requires_grad_(False)
    optimizer = FiraAdamW(grouped(params, 7))
    for row in optimizer.plan():
        assert row["weight_bytes"] > 0
        assert row["gradient_bytes"] == row["state_bytes"] == 0
    assert planned_workspace(optimizer, "cpu") == (0, 0, 0)


@pytest.mark.parametrize("method", ["sign", "orthogonal", "orthogonal, averaged"])
def test_forms_that_change_a_matrix_stay_within_the_workspace(method):
    """On a GPU, where as many small matrices as have room in it are stepped together."""
    memory = 16 * 2**30
    for count, size in ((40, 256), (40, 1024), (40, 2048)):
        params = [nn.Parameter(torch.empty(size, size, device="meta")) for _ in range(count)]
        optimizer = EVERY[method]([{"params": params, "rank": 32}])
        step = planned_workspace(optimizer, "cuda", memory).step
        whole = 16 * size * size
        assert whole <= step <= 1.25 * memory / 128 + whole
