"""What only the Triton kernels can get wrong: tiles, groups, split sums, workspaces, launches.

Without a GPU they run in Triton's interpreter, in float32. It has no bounds checks, so every buffer
lies between zones of NaN: a read outside spoils the result, a write outside spoils the zone.
"""

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from ops.test_operations import Run, assert_as_accurate
from pairs import pairwise

from lowrank_kernels import FiraAdamW, GaLoreAdamW
from lowrank_kernels.ops import Noise, Side, notices
from lowrank_kernels.ops.reference import stochastically_rounded
from lowrank_kernels.optim.schedule import step_scalars

pytest.importorskip("triton")
from triton.runtime import interpreter

from lowrank_kernels.ops import triton as kernels
from lowrank_kernels.ops.triton import config, groups, tuned
from lowrank_kernels.ops.triton.config import Gpu, forced, project_config, update_config
from lowrank_kernels.ops.triton.tuned import Problem, ProjectConfig, UpdateConfig

FORMS = [None, "official", "paper"]
SHAPES_AND_RANKS = [((18, 37), 13), ((21, 20), 20), ((16, 67), 7)]
STATE = ("weight", "exp_avg", "exp_avg_sq", "limiter_norm")
ROLES = ("weight", "basis", "exp_avg", "exp_avg_sq", "limiter_norm")

# The interpreter pays for each program: few large ones for larger matrices.
WHOLE = {
    "project": ProjectConfig(256, 64, 64, split=1, cuts=0, warps=8, stages=1),
    "update": UpdateConfig(256, 256, 64, cuts=0, warps=8, stages=1),
}


def small_tiles(split=1):
    """Many tiles and pieces even in a small matrix."""
    return forced(
        project=ProjectConfig(16, 16, 16, split=split, cuts=1, warps=4, stages=1),
        update=UpdateConfig(16, 16, 16, cuts=1, warps=4, stages=1),
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
        run.limiter_norm = torch.tensor(float(seed))
    return runs


def launch(runs, index=0, *, device_scalars=False, noise=None):
    """One step of a group through the launchers themselves."""
    first = runs[0]
    side, grads, bases = first.side, [run.grads[index] for run in runs], [r.basis for r in runs]
    step = torch.full((len(runs),), index + 1.0) if device_scalars else index + 1
    scalars = step_scalars(
        {**first.options, "betas": (0.9, 0.999)}, step, first.form, first.form == "paper"
    )
    projection = kernels.project_moments(
        grads,
        bases,
        side,
        [run.exp_avg for run in runs],
        [run.exp_avg_sq for run in runs],
        scalars.adam,
        scalars.residual,
    )
    factor = None
    if scalars.residual:
        factor = kernels.channel_scale(projection.sums, [run.limiter_norm for run in runs])
    kernels.back_project_update(
        [run.weight for run in runs],
        grads,
        bases,
        side,
        projection,
        scalars.residual,
        factor,
        scale=scalars.scale,
        step_size=scalars.step_size,
        decay=scalars.decay,
        noise=noise,
    )


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
    with forced(**WHOLE):
        run.step(0)
    assert_as_accurate(run)


@pytest.mark.parametrize("rows_cols", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("side", list(Side))
def test_empty_groups(side, rows_cols):
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
    assert not groups.arrival_counters(1, torch.device("cpu")).any()


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
        buffer = torch.full((len(runs) * pitch + gap,), float("nan"))
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
def test_a_group_is_its_matrices_one_by_one(
    side, form, count, gap, unit, backwards, poisoned_workspaces
):
    """Bit for bit, wherever they lie, and nothing outside of them is read or written."""
    alone, together = (made(count, rank=18, side=side, form=form) for _ in "ab")
    buffers = scattered(together, gap, backwards)
    assert groups.group([run.weight for run in together]).unit == unit
    with small_tiles(3 if backwards else 1):
        for run in alone:
            launch([run])
        launch(together)
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
    gpu = config.gpu_of(torch.device("cpu"))
    with forced(project=project_config(problem, gpu), update=update_config(problem, gpu)):
        launch(plain)
    launch(guarded)
    assert_equal(plain, guarded)
    for buffer, outside in buffers:
        assert buffer[outside].isnan().all()


@pytest.mark.parametrize(("parts", "form"), [(5, "official"), (9, None)])
def test_split_groups_leave_no_count_behind(parts, form):
    """A second launch would wait for arrivals that the first one counted."""
    runs = made(2, (16, 70), 18, Side.RIGHT, form)
    for run in runs:
        run.limiter_norm.zero_()
    with small_tiles(parts):
        for index in range(2):
            launch(runs, index)
            for run in runs:
                run.literal_step(index)
            for counters in groups._counters.values():
                assert not counters.any()
    for run in runs:
        assert_as_accurate(run)


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
    assert project_config(one, config.gpu_of(torch.device("cpu"))).split == 2
    launch(first)
    launch(second)
    assert_equal(first, second)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", list(Side))
def test_scalars_on_the_device_equal_numbers(side, form):
    numbers, tensors = (made(2, side=side, form=form) for _ in "ab")
    for index in range(2):
        launch(numbers, index)
        launch(tensors, index, device_scalars=True)
    assert_equal(numbers, tensors)


def test_each_matrix_has_its_own_scalars_on_the_device(monkeypatch):
    """As in a group whose parameters were added at different steps."""
    alone, together = made(2, form="paper"), made(2, form="paper")
    steps = [torch.tensor([1.0]), torch.tensor([9.0])]
    monkeypatch.setattr(torch, "full", lambda *_: torch.cat(steps))
    launch(together, device_scalars=True)
    for run, step in zip(alone, steps, strict=True):
        monkeypatch.setattr(torch, "full", lambda *_, step=step: step)
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
    steps = torch.tensor([step, step + 1], dtype=torch.int32)
    noise = Noise(salts, steps if on_device else step)
    with small_tiles():
        launch(exact)
        launch(rounded, noise=noise)
    for index, (run, other) in enumerate(zip(exact, rounded, strict=True)):
        expected = stochastically_rounded(run.weight, side, noise, index)
        assert torch.equal(other.weight.float(), expected)
        assert not torch.equal(expected, run.weight)


def test_stochastic_rounding_keeps_inf_and_nan():
    (run,) = half_weights(made(1, (16, 16), 4))
    run.weight[0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    launch([run], noise=Noise((3,), 1))
    assert run.weight[0, 0] == float("inf")
    assert run.weight[0, 1] == -float("inf")
    assert run.weight[0, 2].isnan()
    assert run.weight.isfinite().sum() == 253


class Counted:
    """Stands for a kernel: counts its launches, and runs it unless told not to."""

    def __init__(self, kernel, log, run):
        self.kernel, self.log, self.run = kernel, log, run

    def __getitem__(self, grid):
        self.log.append(self.kernel.__name__)
        return self.kernel[grid] if self.run else lambda *args, **options: None


def count_launches(monkeypatch, run=True):
    log = []
    for name in ("project_kernel", "channel_scale_kernel", "update_kernel"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, Counted(kernel, log, run))
    return log


@pytest.mark.parametrize("parts", [1, 4])
def test_a_group_is_three_launches_for_fira_and_two_for_galore(parts, monkeypatch):
    log = count_launches(monkeypatch)
    with small_tiles(parts):
        launch(made(3, (16, 64)))
        assert log == ["project_kernel", "channel_scale_kernel", "update_kernel"]
        log.clear()
        launch(made(3, (16, 64), form=None))
    assert log == ["project_kernel", "update_kernel"]


@pytest.mark.parametrize(("cls", "launches"), [(FiraAdamW, 3), (GaLoreAdamW, 2)])
def test_an_optimizer_launches_no_more_than_that(cls, launches, monkeypatch):
    weight = torch.nn.Parameter(torch.ones(64, 48))
    optimizer = cls([{"params": [weight], "rank": 8}], lr=0.1, backend="triton")
    weight.grad = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    log = count_launches(monkeypatch)
    optimizer.step()
    assert len(log) == launches


def test_launching_asks_nothing_of_the_device(monkeypatch):
    """Each of these methods would wait for a GPU."""
    numbers, tensors = made(2), made(2)
    noise = Noise((1, 2), torch.tensor([3, 4], dtype=torch.int32))
    log = count_launches(monkeypatch, run=False)

    def refuse(*_, **__):
        raise AssertionError("the host waits for the device")

    for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    launch(numbers)
    launch(tensors, device_scalars=True, noise=noise)
    assert len(log) == 6


LAYOUTS = {
    "transposed": (lambda rows, cols: torch.empty(cols, rows).T, False),
    "every other row": (lambda rows, cols: torch.empty(2 * rows, cols)[::2], False),
    "every other column": (lambda rows, cols: torch.empty(rows, 2 * cols)[:, ::2], True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", list(Side))
def test_gradients_without_a_contiguous_axis_are_copied_and_reported(side, layout, caplog):
    empty, copied = LAYOUTS[layout]
    dense, strided = made(2, side=side), made(2, side=side)
    for run in strided:
        run.grads = [empty(*grad.shape).copy_(grad) for grad in run.grads]
    notices.notice_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="lowrank_kernels"):
        launch(dense)
        assert not caplog.records
        launch(strided)
        assert_equal(dense, strided)
        launch(strided)
    assert len(caplog.records) == copied
    if copied:
        assert "(74, 2) are copied" in caplog.text


@pytest.mark.parametrize("side", list(Side))
def test_transposed_weights(side):
    dense, transposed = made(2, side=side), made(2, side=side)
    for run in transposed:
        run.weight = torch.empty(37, 19).T.copy_(run.weight)
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
    longest = 2**31 // tuned.LARGEST_TILE
    long = torch.empty_strided((2, longest - 2), (longest - 2, 1), device="meta")
    assert kernels.obstacle(long, long) is None
    longer = torch.empty_strided((2, longest - 1), (longest - 1, 1), device="meta")
    assert "strides (8388607, 1) of the weight" in kernels.obstacle(longer, longer)
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


H200 = Gpu("NVIDIA H200 (x)", 132, 227 * 1024, 50 * 2**20)


def problem(channels, depth, rank, matrices=1, dtype=torch.bfloat16, side=Side.RIGHT):
    return Problem(side, channels, depth, rank, matrices, (dtype, dtype))


def test_tiles_are_large_where_enough_of_them_occupy_the_processors():
    assert project_config(problem(4096, 4096, 1024), H200)[:2] == (128, 256)
    assert project_config(problem(2048, 2048, 512), H200)[:2] == (64, 128)
    assert project_config(problem(2048, 2048, 512, matrices=4), H200)[:2] == (128, 256)
    alone = project_config(problem(512, 4096, 128), H200)
    assert alone[:2] == (64, 64)
    assert alone.split == 132 // 16
    assert update_config(problem(4096, 4096, 1024), H200)[:2] == (128, 256)
    assert update_config(problem(512, 512, 128), H200)[:2] == (64, 64)


def test_groups_that_16_does_not_divide_have_no_tile_that_spills_there():
    one = problem(4096, 4096, 1024)
    assert project_config(one._replace(wide=False), H200)[:3] == (128, 128, 32)
    assert update_config(one._replace(wide=False), H200)[:2] == (128, 128)
    mixed = one._replace(dtypes=(torch.float32, torch.bfloat16))
    assert project_config(mixed, H200)[:2] == (64, 128)


@pytest.mark.parametrize(("gap", "wide"), [(4096, True), (4099, False)])
def test_launchers_see_what_16_does_not_divide(gap, wide, monkeypatch):
    seen = []
    for name, choose in (("project_config", project_config), ("update_config", update_config)):
        monkeypatch.setattr(kernels, name, lambda *a, f=choose: seen.append(a[0]) or f(*a))
    runs = made(2)
    scattered(runs, gap, False)
    launch(runs)
    assert [each.wide for each in seen] == [wide, wide]
    assert {each.matrices for each in seen} == {2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shared", [99 * 1024, 163 * 1024, 227 * 1024])
def test_configurations_fit_into_shared_memory(shared, dtype):
    """As `bench.triton_compile` shows for 163 and 227 KiB; 99 KiB is a consumer GPU's."""
    gpu = H200._replace(shared_bytes=shared)
    for rank in (16, 128, 1024):
        one = problem(4096, 4096, rank, dtype=dtype)
        for candidate in (project_config(one, gpu), *config.project_candidates(one, gpu)):
            tiles = candidate.depth * (candidate.channels + candidate.rank)
            assert candidate.stages * tiles * dtype.itemsize <= shared
        for candidate in (update_config(one, gpu), *config.update_candidates(one, gpu)):
            tiles = candidate.channels * 8 + candidate.depth * dtype.itemsize
            assert candidate.stages * candidate.rank * tiles <= shared


def test_group_sizes_fill_half_of_the_l2_cache(monkeypatch):
    monkeypatch.setattr(kernels, "gpu_of", lambda _: H200)
    for shape, expected in (
        ((512, 512), 50),
        ((2048, 2048), 3),
        ((4096, 11008), 1),
        ((0, 5), None),
    ):
        weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        size = kernels.group_size(weight, weight, 64)
        assert size == expected or (expected is None and size >= 1)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """An empty folder of tuned tables."""

    def forget():
        for cached in (tuned.table_of, config._project_choice, config._update_choice):
            cached.cache_clear()

    monkeypatch.setattr(tuned, "TABLES", tmp_path)
    forget()
    yield tmp_path
    forget()


PROJECT = {"channels": 32, "rank": 16, "depth": 64, "split": 2, "cuts": 0, "warps": 2, "stages": 2}
UPDATE = {"channels": 64, "depth": 32, "rank": 16, "cuts": 0, "warps": 2, "stages": 2}


def test_a_tuned_table_is_asked_first(tables, monkeypatch):
    monkeypatch.setattr(kernels, "gpu_of", lambda _: H200)
    (tables / "nvidia-h200-x.json").write_text(
        json.dumps(
            {
                "project": {"right 4096x4096 r64 bfloat16": PROJECT},
                "update": {"left 4096x2048 r64 float32": UPDATE},
                "group": {"4096x4096 r64 bfloat16": {"matrices": 7}},
            }
        )
    )
    tuned_one = problem(4000, 2049, 33)
    assert project_config(tuned_one, H200) == ProjectConfig(**PROJECT)
    assert project_config(problem(4097, 2049, 33), H200) != ProjectConfig(**PROJECT)
    assert project_config(problem(4000, 2049, 33, side=Side.LEFT), H200) != ProjectConfig(**PROJECT)
    left = problem(4096, 2048, 64, dtype=torch.float32, side=Side.LEFT)
    assert update_config(left, H200) == UpdateConfig(**UPDATE)
    weight = torch.empty(4000, 2049, dtype=torch.bfloat16, device="meta")
    assert kernels.explain(weight, weight, Side.RIGHT, 33) == {
        "project": "tuned for NVIDIA H200 (x)",
        "update": "heuristic tiles",
    }
    assert kernels.group_size(weight, weight, 33) == 7
    other = H200._replace(name="NVIDIA A100")
    assert project_config(tuned_one, other) != ProjectConfig(**PROJECT)
    with forced(project=ProjectConfig(**PROJECT)._replace(warps=1)):
        assert project_config(tuned_one, H200).warps == 1
        assert kernels.explain(weight, weight, Side.RIGHT, 33)["project"] == "forced"
    assert project_config(tuned_one, H200).warps == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "list"),
        ('{"projection": {}}', "projection"),
        (json.dumps({"project": {"k": {**PROJECT, "wraps": 4}}}), "wraps"),
        (json.dumps({"project": {"k": {"channels": 32}}}), "rank"),
        (json.dumps({"update": {"k": {**UPDATE, "depth": 48}}}), "depth is 48"),
        (json.dumps({"update": {"k": {**UPDATE, "depth": 512}}}), "depth is 512"),
        (json.dumps({"update": {"k": {**UPDATE, "warps": "4"}}}), "warps is '4'"),
        (json.dumps({"group": {"k": {"matrices": 0}}}), "matrices is 0"),
        (json.dumps({"group": {"k": 3}}), "mapping"),
    ],
)
def test_a_malformed_table_names_its_file(tables, text, reason):
    (tables / "nvidia-h200-x.json").write_text(text)
    with pytest.raises(ValueError, match=rf"nvidia-h200-x\.json is not a table.*{reason}"):
        project_config(problem(64, 64, 16), H200)


class FakeCuda(SimpleNamespace):
    """torch as `groups` sees it on a GPU: a stream that may be capturing, pinned sources."""

    int64, int32, Tensor, device = torch.int64, torch.int32, torch.Tensor, torch.device

    def __init__(self):
        self.capturing, self.stream, self.pinned = False, 1, []
        self.cuda = SimpleNamespace(
            is_current_stream_capturing=lambda: self.capturing,
            current_stream=lambda _: SimpleNamespace(cuda_stream=self.stream),
        )

    def tensor(self, values, dtype, device, pin_memory):
        assert (device, pin_memory) == ("cpu", True)
        self.pinned.append(SimpleNamespace(to=lambda device, non_blocking: (values, non_blocking)))
        return self.pinned[-1]

    def zeros(self, count, dtype, device):
        return torch.zeros(count, dtype=dtype)


@pytest.fixture
def fake_cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(groups, "torch", fake)
    monkeypatch.setattr(groups, "_counters", {})
    monkeypatch.setattr(groups, "_sources_of_graphs", [])
    groups._uploaded.cache_clear()
    yield fake
    groups._uploaded.cache_clear()


def test_a_table_is_uploaded_once_a_stream_and_anew_in_a_graph(fake_cuda):
    device = torch.device("cuda", 0)
    first = groups.device_table((0, 5), device)
    assert first == ((0, 5), True)
    assert groups.device_table((0, 5), device) is first
    fake_cuda.stream = 2
    assert groups.device_table((0, 5), device) is not first
    assert not groups._sources_of_graphs
    fake_cuda.capturing = True
    uploads = len(fake_cuda.pinned)
    captured = [groups.device_table((0, 5), device) for _ in "ab"]
    assert captured[0] is not captured[1]
    assert groups._sources_of_graphs == fake_cuda.pinned[uploads:]
    fake_cuda.capturing, fake_cuda.stream = False, 1
    assert groups.device_table((0, 5), device) is first


def test_counters_belong_to_a_stream_or_to_a_graph(fake_cuda):
    device = torch.device("cuda", 0)
    first = groups.arrival_counters(3, device)
    assert groups.arrival_counters(first.numel(), device) is first
    grown = groups.arrival_counters(first.numel() + 1, device)
    assert grown.numel() > first.numel()
    assert groups.arrival_counters(3, device) is grown
    fake_cuda.stream = 2
    assert groups.arrival_counters(3, device) is not grown
    fake_cuda.capturing = True
    captured = groups.arrival_counters(3, device)
    assert groups.arrival_counters(3, device) is not captured
    assert captured.numel() == 3
