"""What only the Triton kernels can get wrong: tiles, batches, split sums, workspaces, launches.

Without a GPU they run in Triton's interpreter, in float32. It has no bounds checks, so every buffer
lies between zones of NaN: a read outside spoils the result, a write outside spoils the zone. What a
GPU may do and the interpreter does not is left to `test_triton_pipelined`.
"""

import ctypes
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from devices import device_of
from ops.test_operations import Run, assert_as_accurate, take_step
from pairs import pairwise

from lowrank_kernels import FiraAdamW, GaLoreAdamW
from lowrank_kernels.ops import Matrices, Side, notices, prepare, products
from lowrank_kernels.ops.reference import stochastically_rounded
from lowrank_kernels.optim.batches import step_scalars

pytest.importorskip("triton")
from triton.runtime import interpreter

from lowrank_kernels.ops import triton as kernels
from lowrank_kernels.ops.triton import addresses, config
from lowrank_kernels.ops.triton import launch as launches
from lowrank_kernels.ops.triton.addresses import Addresses
from lowrank_kernels.ops.triton.config import Config, Gpu, Problem, candidates, config_of, forced

# Interpreted or compiled, the kernels have to do the same.
pytestmark = pytest.mark.gpu

DEVICE = device_of("triton")
INTERPRETED = DEVICE.type == "cpu"
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="looks into the interpreter")

FORMS = [None, "official", "paper"]
SHAPES_AND_RANKS = [((18, 37), 13), ((21, 20), 20), ((16, 67), 7)]
STATE = ("weight", "exp_avg", "exp_avg_sq", "limiter_norm")
ROLES = ("weight", "basis", "exp_avg", "exp_avg_sq", "limiter_norm")


def large_tiles():
    """The interpreter pays for each program: few large ones for larger matrices."""
    if not INTERPRETED:
        return nullcontext()
    return forced(
        project=Config(256, 64, 64, cuts=0, warps=8, stages=1),
        update=Config(256, 64, 256, cuts=0, warps=8, stages=1),
    )


def small_tiles(split=1):
    """Many tiles and pieces even in a small matrix."""
    return forced(
        project=Config(16, 16, 16, cuts=1, warps=4, stages=1, split=split),
        update=Config(16, 16, 16, cuts=1, warps=4, stages=1),
    )


@pytest.fixture
def poisoned_workspaces():
    """torch fills what it does not initialize with NaN in this mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def made(count, shape=(19, 37), rank=13, side=Side.RIGHT, form="official"):
    """Equal problems whose gradients, weights and bases differ."""
    runs = [
        Run("triton", torch.float32, shape, rank, side, form, seed=seed) for seed in range(count)
    ]
    for seed, run in enumerate(runs):
        run.limiter_norm = torch.tensor(float(seed), device=DEVICE)
    return runs


def scalars_of(run, index, count, *, device_scalars=False, noise_step=0):
    step = torch.full((count,), index + 1.0, device=DEVICE) if device_scalars else index + 1
    group = {**run.options, "betas": (0.9, 0.999)}
    return step_scalars(group, step, run.form == "paper")._replace(step=noise_step)


def launch(runs, index=0, *, device_scalars=False, salts=None, noise_step=0):
    """One step of a batch, prepared for it."""
    matrices = Run.matrices(runs, index)._replace(salts=salts)
    scalars = scalars_of(
        runs[0], index, len(runs), device_scalars=device_scalars, noise_step=noise_step
    )
    take_step(kernels.Operations(matrices), matrices, scalars)


def assert_equal(runs, others):
    for run, other in zip(runs, others, strict=True):
        for name in STATE:
            assert torch.equal(getattr(run, name), getattr(other, name)), name


# One tile or several, whole and overhanging; a basis that spans everything; up to three programs a
# matrix for the channel factors.
LARGER = [
    ((1, 1), 1, Side.RIGHT, "paper"),
    ((37, 61), 1, Side.LEFT, "official"),
    ((37, 61), 1, Side.RIGHT, "paper"),
    ((211, 307), 13, Side.RIGHT, "official"),
    ((211, 307), 64, Side.LEFT, "paper"),
    ((307, 211), 211, Side.RIGHT, None),
    ((307, 211), 307, Side.LEFT, "official"),
    ((307, 211), 211, Side.RIGHT, "paper"),
    ((24, 700), 16, Side.LEFT, "official"),
    ((700, 24), 16, Side.RIGHT, "paper"),
    ((512, 256), 128, Side.RIGHT, "official"),
]


@pytest.mark.parametrize(("shape", "rank", "side", "form"), LARGER, ids=str)
def test_larger_shapes_against_oracle(shape, rank, side, form):
    """One step; `test_operations` takes small shapes through several."""
    run = Run("triton", torch.float32, shape, rank, side, form)
    with large_tiles():
        run.step(0)
    assert_as_accurate(run)


@pytest.mark.parametrize("rows_cols", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("side", list(Side))
def test_empty_batches(side, rows_cols):
    runs = [Run("triton", torch.float32, rows_cols, 0, side, "official") for _ in range(2)]
    launch(runs)
    for run in runs:
        assert run.weight.shape == rows_cols
        assert float(run.limiter_norm) == 0


@pytest.mark.parametrize(
    ("shape_rank", "parts", "form", "side"),
    pairwise(SHAPES_AND_RANKS, (1, 2, 7), FORMS, Side),
    ids=str,
)
def test_split_sums_and_many_tiles(shape_rank, parts, form, side, poisoned_workspaces):
    """More parts than blocks of the reduction leave some of them empty."""
    run = Run("triton", torch.float32, *shape_rank, side, form)
    with small_tiles(parts):
        run.step(0)
        run.step(1)
    assert_as_accurate(run)


@pytest.mark.parametrize("rank", [13, 18])
@pytest.mark.parametrize("side", list(Side))
def test_a_tile_that_overhangs_adds_nothing_without_eps(side, rank):
    """There N is 0 / (0 + eps)."""
    run = Run("triton", torch.float32, (19, 37), rank, side, "official")
    run.options["eps"] = 0.0
    with small_tiles():
        run.step(0)
    assert_as_accurate(run)


def scattered(runs, gap, backwards):
    """The runs' tensors as views into one buffer a role, NaN between them; returns the buffers."""
    buffers = []
    for role in (*ROLES, 0, 1, 2):
        tensors = [run.grads[role] if isinstance(role, int) else getattr(run, role) for run in runs]
        size = tensors[0].numel()
        pitch = size + gap + (-size) % 16
        buffer = tensors[0].new_full((len(runs) * pitch + gap,), float("nan"))
        outside = torch.ones_like(buffer, dtype=torch.bool)
        for index, (run, tensor) in enumerate(zip(runs, tensors, strict=True)):
            start = gap + pitch * (len(runs) - 1 - index if backwards else index)
            view = buffer[start : start + size].view(tensor.shape).copy_(tensor)
            outside[start : start + size] = False
            if isinstance(role, int):
                run.grads[role] = view
            else:
                setattr(run, role, view)
        buffers.append((buffer, outside))
    return buffers


@pytest.mark.parametrize(
    ("count", "gap", "unit", "backwards"),
    [(1, 4096, 16, False), (3, 4096, 16, True), (2, 4099, 1, False)],
)
@pytest.mark.parametrize(("side", "form"), [(Side.LEFT, "paper"), (Side.RIGHT, "official")])
def test_a_batch_is_its_matrices_one_by_one(
    side, form, count, gap, unit, backwards, poisoned_workspaces
):
    """Bit for bit, and nothing outside of them is read or written.

    Wherever they lie; on a GPU, where the compiler orders sums as memory is accessed, at distances
    of 16 elements.
    """
    alone, together = (made(count, rank=18, side=side, form=form) for _ in "ab")
    buffers = scattered(together, gap, backwards)
    assert addresses.addresses_of([run.weight for run in together]).unit == unit
    with small_tiles(3 if backwards else 1):
        for run in alone:
            launch([run])
        launch(together)
    if INTERPRETED or unit == 16:
        assert_equal(alone, together)
    for buffer, outside in buffers:
        assert buffer[outside].isnan().all()
        assert not buffer[~outside].isnan().any()


@pytest.mark.parametrize("shape_rank", SHAPES_AND_RANKS, ids=str)
@pytest.mark.parametrize("side", list(Side))
def test_nothing_is_touched_outside_the_tensors(side, shape_rank, poisoned_workspaces):
    """At the tiles that the heuristics choose for matrices that lie like these."""
    plain, guarded = (made(2, *shape_rank, side) for _ in "ab")
    buffers = scattered(guarded, 70001, False)
    (rows, cols), rank = shape_rank
    sizes = (rows, cols) if side is Side.RIGHT else (cols, rows)
    problem = Problem(side, *sizes, rank, 2, (torch.float32,) * 2, wide=False)
    gpu = config.gpu_of(DEVICE)
    with forced(**{name: config_of(name, problem, gpu) for name in ("project", "update")}):
        launch(plain)
    launch(guarded)
    if INTERPRETED:
        assert_equal(plain, guarded)
    for buffer, outside in buffers:
        assert buffer[outside].isnan().all()
        assert not buffer[~outside].isnan().any()


@pytest.mark.parametrize(("parts", "form"), [(5, "official"), (9, None)])
def test_split_batches_leave_no_count_behind(parts, form):
    """A second launch would wait for arrivals that the first one counted."""
    runs = made(2, (16, 70), 18, Side.RIGHT, form)
    for run in runs:
        run.limiter_norm.zero_()
    with small_tiles(parts):
        operations = prepare(Run.matrices(runs, 0), backend="triton")
        for index in range(2):
            group = {**runs[0].options, "betas": (0.9, 0.999)}
            scalars = step_scalars(group, index + 1, form == "paper")
            take_step(operations, Run.matrices(runs, index), scalars)
            for run in runs:
                run.literal_step(index)
            assert len(operations._arrived) > len(runs)
            assert not operations._arrived.any()
    for run in runs:
        assert_as_accurate(run)


@in_the_interpreter
@pytest.mark.parametrize("parts", [1, 3])
def test_the_order_of_programs_changes_no_bit(parts, monkeypatch):
    """Who arrives last is chance on a GPU; in the interpreter it is the last program."""

    def step():
        runs = made(2, (40, 20), 18, Side.LEFT)
        with small_tiles(parts):
            launch(runs)
        return runs

    ordered = step()
    builder = interpreter.interpreter_builder
    set_index = builder.set_grid_idx

    def backwards(*index):
        set_index(*(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    assert_equal(ordered, step())


def test_two_runs_are_bitwise_equal():
    """At the tiles that the heuristics choose, parts included."""
    first, second = (made(1, (40, 1100), 20, Side.RIGHT) for _ in "ab")
    one = problem(40, 1100, 20, dtype=torch.float32)
    assert config_of("project", one, config.gpu_of(DEVICE)).split == 2
    launch(first)
    launch(second)
    assert_equal(first, second)


@in_the_interpreter
@pytest.mark.parametrize(("side", "parts"), [(Side.LEFT, 1), (Side.RIGHT, 3)])
def test_squares_of_gradients_that_are_read_again_are_the_same(side, parts, monkeypatch):
    """Also of float32, where its product is TF32; the interpreter knows nothing of that."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    once, twice = (made(2, side=side) for _ in "ab")
    for runs, again in ((once, False), (twice, True)):
        monkeypatch.setattr(kernels, "rereads_gradients", lambda _, again=again: again)
        with small_tiles(parts):
            launch(runs)
    assert_equal(once, twice)


def test_only_sm_90_reads_gradients_again(monkeypatch):
    assert not kernels.rereads_gradients(torch.device("cpu"))
    for capability, again in (((8, 9), False), ((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert kernels.rereads_gradients(torch.device("cuda", 0)) is again


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", list(Side))
def test_scalars_on_the_device_equal_numbers(side, form):
    numbers, tensors = (made(2, side=side, form=form) for _ in "ab")
    for index in range(2):
        launch(numbers, index)
        launch(tensors, index, device_scalars=True)
    assert_equal(numbers, tensors)


def test_each_matrix_has_its_own_scalars_on_the_device(monkeypatch):
    """As in a batch whose parameters were added at different steps."""
    alone, together = made(2, form="paper"), made(2, form="paper")
    steps = [torch.tensor([1.0], device=DEVICE), torch.tensor([9.0], device=DEVICE)]
    monkeypatch.setattr(torch, "full", lambda *_, **__: torch.cat(steps))
    launch(together, device_scalars=True)
    for run, step in zip(alone, steps, strict=True):
        monkeypatch.setattr(torch, "full", lambda *_, step=step, **__: step)
        launch([run], device_scalars=True)
    assert_equal(alone, together)


def half_weights(runs):
    for run in runs:
        run.weight = run.weight.bfloat16()
    return runs


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("side", list(Side))
def test_stochastic_rounding_is_the_references_bit_for_bit(side, on_device):
    """Applied to the float32 result; the channel and its entry count from the matrix's corner."""
    exact, rounded = (half_weights(made(2, side=side)) for _ in "ab")
    for run in exact:
        run.weight = run.weight.float()
    salts, step = (7, 2**32 - 1), 70000
    steps = torch.tensor([step, step + 1], dtype=torch.int32, device=DEVICE)
    with small_tiles():
        launch(exact)
        launch(rounded, salts=salts, noise_step=steps if on_device else step)
    for index, (run, other) in enumerate(zip(exact, rounded, strict=True)):
        of_matrix = step + index if on_device else step
        expected = stochastically_rounded(run.weight, side, salts[index], of_matrix)
        assert torch.equal(other.weight.float(), expected)
        assert not torch.equal(expected, run.weight)


def test_stochastic_rounding_keeps_inf_and_nan():
    (run,) = half_weights(made(1, (16, 16), 4))
    for column, value in enumerate((float("inf"), -float("inf"), float("nan"))):
        run.weight[0, column] = value
    launch([run], salts=(3,), noise_step=1)
    assert run.weight[0, 0] == float("inf")
    assert run.weight[0, 1] == -float("inf")
    assert run.weight[0, 2].isnan()
    assert run.weight.isfinite().sum() == 253


def count_launches(monkeypatch, run=True):
    log, by_jit = [], launches.by_jit

    def counted(kernel, *arguments):
        log.append(kernel.__name__)
        return by_jit(kernel, *arguments) if run else None

    monkeypatch.setattr(launches, "by_jit", counted)
    return log


@pytest.mark.parametrize("parts", [1, 4])
def test_a_batch_is_three_launches_for_fira_and_two_for_galore(parts, monkeypatch):
    log = count_launches(monkeypatch)
    with small_tiles(parts):
        launch(made(3, (16, 64)))
        assert log == ["project_kernel", "channel_scale_kernel", "update_kernel"]
        log.clear()
        launch(made(3, (16, 64), form=None))
    assert log == ["project_kernel", "update_kernel"]


@pytest.mark.parametrize(("cls", "launches"), [(FiraAdamW, 3), (GaLoreAdamW, 2)])
def test_an_optimizer_launches_no_more_than_that(cls, launches, monkeypatch):
    weight = torch.nn.Parameter(torch.ones(64, 48, device=DEVICE))
    optimizer = cls([{"params": [weight], "rank": 8}], lr=0.1, backend="triton")
    weight.grad = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    log = count_launches(monkeypatch)
    optimizer.step()
    assert len(log) == launches


def test_launching_asks_nothing_of_the_device(monkeypatch):
    """Each of these methods would wait for a GPU."""
    numbers, tensors = made(2), made(2)
    steps = torch.tensor([3, 4], dtype=torch.int32, device=DEVICE)
    log = count_launches(monkeypatch, run=False)

    def refuse(*_, **__):
        raise AssertionError("the host waits for the device")

    for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    launch(numbers)
    launch(half_weights(tensors), device_scalars=True, salts=(1, 2), noise_step=steps)
    assert len(log) == 6


LAYOUTS = {
    "transposed": (lambda like, rows, cols: like.new_empty(cols, rows).T, False),
    "every other row": (lambda like, rows, cols: like.new_empty(2 * rows, cols)[::2], False),
    "every other column": (lambda like, rows, cols: like.new_empty(rows, 2 * cols)[:, ::2], True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", list(Side))
def test_gradients_without_a_contiguous_axis_are_copied_and_reported(side, layout, caplog):
    empty, copied = LAYOUTS[layout]
    dense, strided = made(2, side=side), made(2, side=side)
    for run in strided:
        run.grads = [empty(grad, *grad.shape).copy_(grad) for grad in run.grads]
    notices.notice_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="lowrank_kernels"):
        launch(dense)
        assert not caplog.records
        launch(strided)
        # The compiler orders sums as memory is accessed.
        if INTERPRETED or layout != "transposed":
            assert_equal(dense, strided)
        launch(strided)
    assert len(caplog.records) == copied
    if copied:
        assert "(74, 2) are copied" in caplog.text


@pytest.mark.parametrize("side", list(Side))
def test_transposed_weights(side):
    dense, transposed = made(2, side=side), made(2, side=side)
    for run in transposed:
        run.weight = run.weight.new_empty(37, 19).T.copy_(run.weight)
        assert kernels.obstacle(run.weight, run.grads[0]) is None
    launch(dense)
    launch(transposed)
    assert_equal(dense, transposed)


def test_obstacles_are_named():
    weight = torch.empty(64, 48, device="meta")
    assert kernels.obstacle(weight, weight) is None
    assert kernels.obstacle(weight, torch.empty(64, 96, device="meta")[:, ::2]) is None
    for strided in (weight[::2], weight[:, ::2]):
        reason = kernels.obstacle(strided, strided)
        assert "dense weights" in reason
        assert str(strided.stride()) in reason
    longest = 2**31 // config.LARGEST_TILE
    long = torch.empty_strided((2, longest - 2), (longest - 2, 1), device="meta")
    assert kernels.obstacle(long, long) is None
    longer = torch.empty_strided((2, longest - 1), (longest - 1, 1), device="meta")
    assert "strides (8388607, 1) of the weight" in kernels.obstacle(longer, longer)
    # Strides of moments are those of their own shape, whatever the weight's are.
    for length, served in ((longest - 1, True), (longest, False)):
        wide = torch.empty_strided((2, length), (1, 2), device="meta")
        reason = kernels.obstacle(wide, wide)
        assert (reason is None) == served
    assert "too few for the moments of a weight of shape (2, 8388608)" in reason
    grad = torch.empty_strided((64, 48), (2**24, 1), device="meta")
    assert "strides (16777216, 1) of the gradient" in kernels.obstacle(weight, grad)


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({"allow_tf32": True}, "tf32"),
        ({"allow_tf32": False}, "ieee"),
        ({"fp32_precision": "tf32"}, "tf32"),
        ({"fp32_precision": "ieee"}, "ieee"),
        ({"fp32_precision": "none"}, "ieee"),
    ],
)
def test_the_users_precision_of_float32_products(switches, expected, monkeypatch):
    """The old switch is not even there in the new cases: reading it can raise."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(**switches))
    assert kernels._precision(torch.float32, torch.float32) == expected


def test_a_product_of_two_dtypes_is_not_left_to_ieee():
    """Of which Triton makes TF32 on sm_100."""
    assert kernels._precision(torch.float32, torch.bfloat16) == "tf32x3"


def test_the_new_precision_switch_of_torch_itself():
    """In a process of its own: once the new switch was set, torch refuses to read the old one."""
    code = (
        "import torch; from lowrank_kernels.ops import triton as kernels\n"
        "matmul = torch.backends.cuda.matmul\n"
        "if hasattr(matmul, 'fp32_precision'): matmul.fp32_precision = 'tf32'\n"
        "else: matmul.allow_tf32 = True\n"
        "print(kernels._precision(torch.float32, torch.float32))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "tf32\n", run.stderr


H200 = Gpu("NVIDIA H200 (x)", 132, 227 * 1024)


def problem(channels, depth, rank, matrices=1, dtype=torch.bfloat16, side=Side.RIGHT):
    return Problem(side, channels, depth, rank, matrices, (dtype, dtype))


def tile(operation, one):
    """Its size in channels, and in directions or depth."""
    found = config_of(operation, one, H200)
    return found.channels, found.rank if operation == "project" else found.depth


def test_tiles_are_large_or_share_a_processor_by_what_is_predicted():
    large = config_of("project", problem(4096, 4096, 1024), H200)
    assert (large.channels, large.rank, large.registers) == (128, 256, 255)
    assert tile("update", problem(4096, 4096, 1024)) == (128, 256)
    for operation in ("project", "update"):
        shared = config_of(operation, problem(2048, 2048, 512, matrices=4), H200)
        assert shared.registers == 128
    alone = problem(512, 4096, 128)
    assert tile("project", alone) == (64, 64)
    assert config_of("project", alone, H200).split == 4096 // 512


def test_b_stays_in_a_block_where_a_rank_is_small_and_accesses_are_wide():
    one = problem(4096, 4096, 64)
    assert config_of("update", one, H200).resident
    narrow = one._replace(even=False), one._replace(wide=False)
    for other in (*narrow, one._replace(rank=129), one._replace(side=Side.LEFT)):
        assert not config_of("update", other, H200).resident


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_that_may_be_chosen_is_predicted_to_be_faster(dtype):
    for shape in ((4096, 4096, 1024), (5461, 2048, 512), (512, 4096, 128), (11008, 4096, 64)):
        one = problem(*shape, dtype=dtype)
        for operation in ("project", "update"):
            chosen = config_of(operation, one, H200)
            times = {
                candidate: config.predicted_seconds(operation, one, candidate, H200)
                for candidate in [*config._configs(operation, one, H200), chosen]
            }
            assert times[chosen] == min(times.values())


def test_two_blocks_share_a_processor_only_where_all_accesses_are_wide():
    """Narrow ones, and operands of older GPUs' products, take more registers than there are."""
    one = problem(2048, 2048, 512, matrices=16)
    a100 = Gpu("A100", 108, 163 * 1024, 80)
    for operation in ("project", "update"):
        assert config_of(operation, one, H200).registers == 128
        for other, gpu in ((one._replace(even=False), H200), (one, a100)):
            assert config_of(operation, other, gpu).registers == 255


def test_batches_that_16_does_not_divide_have_no_tile_that_spills_there():
    one = problem(4096, 4096, 1024)
    assert config_of("project", one._replace(wide=False), H200)[:3] == (128, 128, 32)
    assert tile("update", one._replace(wide=False)) == (128, 128)
    mixed = one._replace(dtypes=(torch.float32, torch.bfloat16))
    assert tile("project", mixed) == (64, 128)


@pytest.mark.parametrize(
    ("cols", "gap", "stages"), [(48, 4096, 4), (48, 4099, 3), (37, 4096, 2), (37, 4099, 1)]
)
def test_launches_have_the_tiles_for_what_16_does_not_divide(cols, gap, stages, monkeypatch):
    """Matrices' places and their rows; told apart by stages, which the interpreter ignores."""

    def marked(operation, problem, gpu):
        found = config_of(operation, problem, gpu)
        return found._replace(stages=1 + problem.wide + 2 * problem.even)

    monkeypatch.setattr(kernels, "config_of", marked)
    runs, seen = made(2, (19, cols), 16), []
    scattered(runs, gap, False)
    monkeypatch.setattr(launches, "by_jit", lambda *args: seen.append(args[3].get("num_stages")))
    launch(runs)
    assert seen == [stages, None, stages]


def at(address, like):
    """A tensor of the same dtype that begins at an address; numbers stay, tuples go by element."""
    if isinstance(like, torch.Tensor):
        return torch.frombuffer((ctypes.c_char * 8).from_address(address), dtype=like.dtype)
    assert type(address) is tuple if isinstance(like, tuple) else type(address) is type(like)
    return type(like)(*map(at, address, like)) if isinstance(like, Addresses) else address


@pytest.fixture
def bound_launches(monkeypatch):
    """Launches are bound as on a GPU, and run in the interpreter; logs how each was made."""
    if not INTERPRETED:
        pytest.skip("stands for what a GPU does")
    log, by_jit = [], launches.by_jit

    def first(*arguments):
        log.append("jit")
        by_jit(*arguments)
        return arguments

    def bound(compiled, grid):
        kernel, _, first, options = compiled

        def run(*numbers, stream):
            log.append("bound")
            constants = dict(
                zip(kernel.arg_names[len(first) :], numbers[len(first) :], strict=True)
            )
            assert constants.items() <= options.items()
            kernel[grid](*map(at, numbers[: len(first)], first), **options)

        return run

    monkeypatch.setattr(launches, "by_jit", first)
    monkeypatch.setattr(launches, "bound", bound)
    return log


def moved(grads, skipped):
    """The gradients somewhere else, elements off a multiple of 16 bytes."""
    return [g.new_empty(g.numel() + skipped)[skipped:].view(g.shape).copy_(g) for g in grads]


@pytest.mark.parametrize(("side", "form"), pairwise(Side, FORMS), ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_bound_launches_have_the_bits_of_the_jits(side, form, parts, bound_launches):
    """Wherever the gradients lie; Triton's JIT is asked once for each kind of alignment."""
    plain, prepared = (made(3, side=side, form=form) for _ in "ab")
    kernels_of_step = 2 if form is None else 3
    with small_tiles(parts):
        operations = kernels.Operations(Run.matrices(prepared, 0))
    expected = [["jit"] * kernels_of_step, ["bound"] * kernels_of_step]
    expected += [["jit", "bound", "jit"] if form else ["jit", "bound"]]
    expected += [["bound"] * kernels_of_step] * 3
    for turn, (skipped, how) in enumerate(zip((0, 0, 1, 1, 0, 4), expected, strict=True)):
        index = turn % 3
        matrices = Run.matrices(prepared, index)
        matrices = matrices._replace(grads=moved(matrices.grads, skipped))
        bound_launches.clear()
        take_step(operations, matrices, scalars_of(prepared[0], index, 3))
        assert bound_launches == how, skipped
        with small_tiles(parts):
            launch(plain, index)
        assert_equal(plain, prepared)


def test_the_types_of_scalars_tell_kinds_of_launches_apart_and_their_values_do_not(bound_launches):
    """Triton is asked not to compile for a scalar that is 1 or that 16 divides."""
    runs = half_weights(made(2))
    matrices = Run.matrices(runs, 0)._replace(salts=(1, 2))
    operations = kernels.Operations(matrices)
    on_device = {"device_scalars": True, "noise_step": torch.tensor([3, 4], dtype=torch.int32)}
    for options, new in (
        ({"noise_step": 17}, 3),
        ({"noise_step": 1}, 0),
        ({"noise_step": 16}, 0),
        (on_device, 1),
        (on_device, 0),
    ):
        bound_launches.clear()
        take_step(operations, matrices, scalars_of(runs[0], 0, 2, **options))
        assert bound_launches.count("jit") == new, options
        assert len(bound_launches) == 3
    scalars = scalars_of(runs[0], 0, 2, noise_step=18)._replace(decay=1)
    bound_launches.clear()
    take_step(operations, matrices, scalars)
    assert bound_launches == ["bound", "bound", "jit"]


def test_triton_does_not_compile_for_the_values_of_scalars():
    """In a process of its own: the interpreter knows nothing of it."""
    code = (
        "from lowrank_kernels.ops.triton import project_kernel, update_kernel\n"
        "for kernel in (project_kernel, update_kernel):\n"
        "    print(*[x.name for x in kernel.params if x.do_not_specialize])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    varying = kernels.project_kernel.arg_names[7:15], kernels.update_kernel.arg_names[6:10]
    assert run.stdout.split() == [*varying[0], *varying[1]], run.stderr


def test_a_captured_launch_is_never_bound_and_one_of_another_stream_anew(
    bound_launches, monkeypatch
):
    """A graph owns the tables of its launches; another stream would not wait for their copies."""
    runs = made(2)
    matrices, scalars = Run.matrices(runs, 0), scalars_of(runs[0], 0, 2)
    operations = kernels.Operations(matrices)
    for stream, how in ((None, "jit"), (1, "jit"), (1, "bound"), (2, "jit"), (None, "jit")):
        monkeypatch.setattr(kernels, "current_stream", lambda _, stream=stream: stream)
        bound_launches.clear()
        take_step(operations, matrices, scalars)
        assert bound_launches == [how] * 3, stream


def counters_of_a_step(operations, matrices, scalars):
    """What its launches that count arrivals are given, by Triton's JIT."""
    found, by_jit = [], launches.by_jit

    def record(kernel, grid, arguments, options):
        found.extend(x for x in arguments if getattr(x, "dtype", None) is torch.int32)
        return by_jit(kernel, grid, arguments, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "by_jit", record)
        take_step(operations, matrices, scalars)
    assert len(found) == 2
    return found


def test_counters_of_a_captured_launch_outlive_its_batch(monkeypatch):
    """A graph may be replayed when the optimizer has long made other batches."""
    monkeypatch.setattr(addresses, "_kept_for_graphs", [])
    runs = made(2)
    matrices, scalars = Run.matrices(runs, 0), scalars_of(runs[0], 0, 2)
    operations = kernels.Operations(matrices)
    eager = counters_of_a_step(operations, matrices, scalars)
    assert not addresses._kept_for_graphs
    monkeypatch.setattr(kernels, "current_stream", lambda _: None)
    captured = counters_of_a_step(operations, matrices, scalars)
    assert all(each is eager[0] for each in eager + captured)
    assert any(kept is captured[0] for kept in addresses._kept_for_graphs)


def test_counters_that_a_capture_made_are_of_no_use_to_an_eager_step(monkeypatch):
    """They are set to 0 when the graph is replayed, and not before."""
    runs = made(2)
    matrices, scalars = Run.matrices(runs, 0), scalars_of(runs[0], 0, 2)
    operations = kernels.Operations(matrices)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "current_stream", lambda _: None)
        captured = counters_of_a_step(operations, matrices, scalars)
    eager = counters_of_a_step(operations, matrices, scalars)
    assert eager[0] is eager[1]
    assert all(each is not eager[0] for each in captured)


def test_the_users_precision_is_read_at_every_step(bound_launches, monkeypatch):
    runs = made(1)
    matrices, scalars = Run.matrices(runs, 0), scalars_of(runs[0], 0, 1)
    operations = kernels.Operations(matrices)
    for precision, new in (("ieee", 3), ("tf32", 2), ("ieee", 0), ("tf32", 0)):
        switches = SimpleNamespace(fp32_precision=precision)
        monkeypatch.setattr(torch.backends.cuda, "matmul", switches)
        bound_launches.clear()
        take_step(operations, matrices, scalars)
        assert bound_launches.count("jit") == new


def on_meta(matrices):
    return Matrices(
        *(
            [tensor.to("meta") for tensor in field] if isinstance(field, list) else field
            for field in matrices
        )
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape_rank", [((40, 1100), 20), ((19, 37), 13)], ids=str)
def test_a_step_on_the_meta_device_allocates_what_a_real_one_does(shape_rank, form, monkeypatch):
    """By its operations; at (40, 1100) the sums are split."""
    runs = made(2, *shape_rank, form=form)
    sizes = {}
    matrices, scalars = Run.matrices(runs, 0), scalars_of(runs[0], 0, 2)
    for each in (matrices, on_meta(matrices)):
        found = sizes[each.params[0].device.type] = []
        operations = kernels.Operations(each)
        new = operations._empty
        operations._empty = lambda *size, new=new, found=found: (found.append(size), new(*size))[1]
        take_step(operations, each, scalars)
    assert sizes[DEVICE.type] == sizes["meta"]
    assert len(sizes["meta"]) == (2 if form is None else 5) + 2 * (shape_rank[1] == 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shared", [99 * 1024, 163 * 1024, 227 * 1024])
def test_configurations_fit_into_shared_memory(shared, dtype):
    """As `bench.triton_compile` shows for 163 and 227 KiB; 99 KiB is a consumer GPU's."""
    gpu = H200._replace(shared_bytes=shared)
    for rank in (16, 128, 1024):
        one = problem(4096, 4096, rank, dtype=dtype)
        for candidate in (config_of("project", one, gpu), *candidates("project", one, gpu)):
            tiles = candidate.depth * (candidate.channels + candidate.rank)
            assert candidate.stages * tiles * dtype.itemsize <= shared
        for candidate in (config_of("update", one, gpu), *candidates("update", one, gpu)):
            if candidate.resident:
                tiles = (candidate.rank + 2 * candidate.channels) * candidate.depth * 2
            else:
                low = 8 if dtype is torch.float32 else 2
                tiles = candidate.channels * low + candidate.depth * dtype.itemsize
                tiles *= candidate.rank
            assert candidate.stages * tiles <= shared


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((512, 512), 128, 1779),
        ((2048, 2048), 512, 111),
        ((4096, 11008), 1024, 10),
        ((5461, 2048), 512, 41),
        ((2048, 5461), 512, 23),  # with copies of G
        ((2**16, 2**16), 2**14, 1),
        ((0, 5), 0, None),
    ],
)
def test_batches_fill_a_share_of_the_memory(monkeypatch, shape, rank, expected):
    monkeypatch.setattr(products, "_workspace_bytes", lambda _: 139 * 2**30 // 128)
    weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    size = kernels.batch_size(weight, weight, rank)
    assert size == expected or (expected is None and size >= 1)


class FakeCuda(SimpleNamespace):
    """torch as `addresses` sees it on a GPU: a stream that may be capturing, pinned sources."""

    int64, int32, Tensor, device = torch.int64, torch.int32, torch.Tensor, torch.device

    def __init__(self):
        self.capturing, self.stream, self.pinned = False, 1, []
        self.cuda = SimpleNamespace(
            is_current_stream_capturing=lambda: self.capturing,
        )
        self._C = SimpleNamespace(_cuda_getCurrentRawStream=lambda _: self.stream)

    def tensor(self, values, dtype, device, pin_memory):
        assert (device, pin_memory) == ("cpu", True)
        self.pinned.append(SimpleNamespace(to=lambda device, non_blocking: (values, non_blocking)))
        return self.pinned[-1]

    def zeros(self, count, dtype, device):
        return torch.zeros(count, dtype=dtype)


@pytest.fixture
def fake_cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(addresses, "torch", fake)
    monkeypatch.setattr(addresses, "_tables", {})
    monkeypatch.setattr(addresses, "_kept_for_graphs", [])
    return fake


def test_a_table_is_uploaded_once_and_anew_where_another_stream_would_not_wait(fake_cuda):
    device = torch.device("cuda", 0)
    first = addresses.device_table((0, 5), device)
    assert first == ((0, 5), True)
    assert addresses.device_table((0, 5), device) is first
    fake_cuda.stream = 2
    second = addresses.device_table((0, 5), device)
    assert second is not first
    assert addresses.device_table((0, 5), device) is second
    assert not addresses._kept_for_graphs


def test_a_graph_copies_no_table_that_an_eager_step_has_uploaded(fake_cuda):
    device = torch.device("cuda", 0)
    eager = addresses.device_table((0, 5), device)
    uploads = len(fake_cuda.pinned)
    fake_cuda.capturing = True
    assert addresses.device_table((0, 5), device) is eager
    assert len(fake_cuda.pinned) == uploads
    assert addresses._kept_for_graphs == [eager]


def test_a_table_that_is_new_in_a_graph_is_the_graphs_own(fake_cuda):
    device = torch.device("cuda", 0)
    fake_cuda.capturing = True
    captured = [addresses.device_table((0, 5), device) for _ in "ab"]
    assert captured[0] is not captured[1]
    assert addresses._kept_for_graphs == fake_cuda.pinned
    fake_cuda.capturing = False
    assert all(addresses.device_table((0, 5), device) is not table for table in captured)


def test_tables_are_forgotten_from_the_oldest_on(fake_cuda, monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(addresses, "MOST_TABLES", 2)
    first, second, third = (addresses.device_table((place,), device) for place in range(3))
    assert addresses.device_table((1,), device) is second
    assert addresses.device_table((2,), device) is third
    assert addresses.device_table((0,), device) is not first
