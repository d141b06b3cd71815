"""What torch's batched operations promise beside their results: few calls, bounded temporaries, and
a matrix whose bits do not depend on the others.
"""

from collections import Counter

import pytest
import torch
from oracles.low_rank import orthonormal
from pairs import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_kernels.ops import AdamScalars, Matrices, Residual, Scalars, Side, prepare
from lowrank_kernels.ops import foreach as foreach_module
from lowrank_kernels.ops.contract import moment_dtype, projected_shape
from lowrank_kernels.ops.dry import meta_stands_for
from lowrank_kernels.ops.reference import stochastically_rounded
from lowrank_kernels.optim.allocations import Allocations

GALORE, OFFICIAL, PAPER = None, Residual(0.25, 1.0), Residual(1.0, 0.25)
RESIDUALS = {"galore": GALORE, "official": OFFICIAL, "paper": PAPER}
FLOAT, HALF, BF16, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64
SCALARS = Scalars(AdamScalars(0.9, 0.999, 1e-6), 0.25, 0.125, 0.125, 3)
# Views launch nothing.
VIEWS = {
    "alias",
    "detach",
    "expand",
    "permute",
    "select",
    "slice",
    "split",
    "unbind",
    "unsqueeze",
    "view",
}


def matrices_of(count, shape, rank, side, dtype, residual, grad_dtype=None, salts=None):
    """Matrices in mid-training, each unlike the others."""
    rng = torch.Generator().manual_seed(0)
    wide, low = moment_dtype(dtype), projected_shape(shape, side, rank)

    def each(*size, of=wide, offset=0.0):
        return [
            (torch.rand(size, generator=rng, dtype=DOUBLE) - offset).to(of) for _ in range(count)
        ]

    size = shape[0] if side is Side.LEFT else shape[1]
    return Matrices(
        side,
        residual,
        each(*shape, of=dtype, offset=0.5),
        each(*shape, of=grad_dtype or dtype, offset=0.5),
        [orthonormal(size, rank, rng).to(dtype) for _ in range(count)],
        each(*low, offset=0.5),
        each(*low),
        [] if residual is None else each(),
        salts,
    )


def copied(matrices, some=slice(None)):
    tensors = ([tensor.clone() for tensor in each[some]] for each in matrices[2:8])
    salts = None if matrices.salts is None else matrices.salts[some]
    return Matrices(matrices.side, matrices.residual, *tensors, salts)


def step(matrices, scalars=SCALARS, backend="foreach"):
    """A step, and all that it wrote."""
    operations = prepare(matrices, backend=backend)
    projection = operations.project_moments(matrices, scalars.adam)
    factor = None
    if projection.sums is not None:
        factor = operations.channel_scale(matrices, projection.sums)
    operations.back_project_update(matrices, projection, factor, scalars)
    return {
        "param": matrices.params,
        "exp_avg": matrices.exp_avgs,
        "exp_avg_sq": matrices.exp_avg_sqs,
        "limiter_norm": matrices.limiter_norms,
        "direction": list(projection.direction),
        "projected": list(projection.projected),
    }


def with_tensors(count, device="cpu"):
    """Scalars as a captured graph reads them."""

    def tensor(number, dtype=DOUBLE):
        return torch.full((count,), number, dtype=dtype, device=device)

    adam = AdamScalars(0.9, 0.999, 1e-6, tensor(0.25), tensor(0.015625))
    return Scalars(adam, 0.25, tensor(0.125), tensor(0.125), tensor(3, torch.int32))


def assert_same_bits(got, expected):
    for name, tensors in expected.items():
        for one, other in zip(got[name], tensors, strict=True):
            assert torch.equal(one, other), name


class Calls(TorchDispatchMode):
    """Counts what may launch a kernel."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.names.update({name} - VIEWS)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("residual", "a_matrix", "a_batch"), [("galore", 2, 30), ("official", 9, 100)]
)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_calls_of_torch_a_matrix_and_a_batch(dtype, side, residual, a_matrix, a_batch):
    """The official packages make 13 calls a matrix, and with Fira 30."""

    def calls(count):
        matrices = matrices_of(count, (24, 36), 8, side, dtype, RESIDUALS[residual])
        operations = prepare(matrices, backend="foreach")
        with Calls() as seen:
            projection = operations.project_moments(matrices, SCALARS.adam)
            factor = None
            if projection.sums is not None:
                factor = operations.channel_scale(matrices, projection.sums)
            operations.back_project_update(matrices, projection, factor, SCALARS)
        return seen.names.total()

    few, many = calls(2), calls(12)
    assert many - few <= 10 * a_matrix
    assert few <= 2 * a_matrix + a_batch


CASES = pairwise(
    [((37, 61), 13), ((61, 37), 1), ((180, 211), 64)],
    Side,
    RESIDUALS,
    [FLOAT, BF16, HALF, DOUBLE],
    [1, 2],
    ["numbers", "tensors"],
)


@pytest.mark.parametrize(
    ("shape_rank", "side", "residual", "dtype", "threads", "scalars"), CASES, ids=str
)
def test_the_bits_of_a_matrix_do_not_depend_on_its_batch(
    shape_rank, side, residual, dtype, threads, scalars
):
    torch.set_num_threads(threads)
    matrices = matrices_of(5, *shape_rank, side, dtype, RESIDUALS[residual])

    def scalars_for(count):
        return SCALARS if scalars == "numbers" else with_tensors(count)

    together = step(copied(matrices), scalars_for(5))
    for index in range(5):
        alone = step(copied(matrices, slice(index, index + 1)), scalars_for(1))
        mine = {name: tensors[index : index + 1] for name, tensors in together.items()}
        assert_same_bits(mine, alone)


@pytest.mark.parametrize("scalars", ["numbers", "tensors"])
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
def test_blocks_and_tiles_change_the_result_by_roundings(
    monkeypatch, dtype, residual, side, scalars
):
    matrices = matrices_of(2, (37, 61), 13, side, dtype, RESIDUALS[residual])
    matrices.grads[1][5, 7] = float("inf")
    scalars = SCALARS if scalars == "numbers" else with_tensors(2)
    whole = step(copied(matrices), scalars)
    monkeypatch.setattr(foreach_module, "BLOCK_ELEMENTS", {"cpu": 200})
    monkeypatch.setattr(foreach_module, "TILE_ROWS", 8)
    cut = step(copied(matrices), scalars)
    for name, tensors in whole.items():
        for one, other in zip(cut[name], tensors, strict=True):
            allowed = 4 * torch.finfo(dtype).eps * torch.linalg.norm(other.double())
            assert torch.dist(one.double(), other.double()) <= allowed, name


@pytest.mark.parametrize("scalars", ["numbers", "tensors"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_no_temporary_grows_with_the_weight(residual, dtype, device_type, scalars):
    """From a dry run, whose tensors have no values: a look at one would be an error."""
    block = foreach_module.BLOCK_ELEMENTS.get(device_type, foreach_module.BLOCK_ELEMENTS_ELSEWHERE)
    side, rank, size = Side.LEFT, 16, 2**13
    small = matrices_of(1, (rank, rank), rank, side, dtype, RESIDUALS[residual])
    shapes = ((size, size), (size, size), (size, rank), (rank, size), (rank, size), ())
    tensors = (
        [each[0].new_empty(shape, device="meta")] if each else []
        for each, shape in zip(small[2:8], shapes, strict=True)
    )
    matrices = Matrices(side, RESIDUALS[residual], *tensors)
    scalars = SCALARS if scalars == "numbers" else with_tensors(1, "meta")
    with meta_stands_for(device_type), Allocations() as allocations:
        step(matrices, scalars)
    low = 4 * rank * size
    in_place = residual == "galore" and scalars is SCALARS
    in_place = in_place and (dtype is not HALF or device_type == "cuda")
    assert allocations.peak_bytes <= 8 * low + (0 if in_place else 3 * 4 * block)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_an_entry_too_large_to_be_squared_is_left_out(eps, dtype, side, residual):
    matrices = matrices_of(2, (24, 36), 8, side, dtype, RESIDUALS[residual])
    large = 1e25 if dtype is FLOAT else 1e160
    matrices.grads[1][3, 5] = large
    matrices.exp_avg_sqs[1].zero_()
    matrices.exp_avgs[1].zero_()
    before = copied(matrices)
    scalars = SCALARS._replace(adam=AdamScalars(0.9, 0.999, eps))
    got, expected = (step(copied(matrices), scalars, backend=x) for x in ("foreach", "reference"))
    channel = (slice(None), 5) if side is Side.LEFT else 3
    assert not got["direction"][1][channel].any()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(got[name][1][channel], getattr(before, name + "s")[1][channel])
    for name, tensors in expected.items():
        for one, other in zip(got[name], tensors, strict=True):
            assert one.isfinite().all(), name
            torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("dtype", "grad_dtype"), [(BF16, FLOAT), (FLOAT, BF16), (HALF, BF16)])
def test_gradients_of_another_dtype(dtype, grad_dtype, side, residual):
    matrices = matrices_of(2, (24, 36), 8, side, dtype, RESIDUALS[residual], grad_dtype)
    assert_near_the_reference(matrices, max(torch.finfo(x).eps for x in (dtype, grad_dtype)))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_expanded_gradients_stay_as_they_are(dtype, side, residual):
    matrices = matrices_of(2, (24, 36), 8, side, dtype, RESIDUALS[residual])
    rows = [grad[:1].expand(24, 36) for grad in matrices.grads]
    before = [row.clone() for row in rows]
    assert_near_the_reference(matrices._replace(grads=rows), torch.finfo(dtype).eps)
    assert all(map(torch.equal, rows, before))


def assert_near_the_reference(matrices, eps):
    other = copied(matrices)._replace(grads=matrices.grads)
    expected, got = step(other, backend="reference"), step(matrices)
    for name, tensors in expected.items():
        for one, exact in zip(got[name], tensors, strict=True):
            assert torch.dist(one, exact) <= 2 * eps * torch.linalg.norm(exact), name


@pytest.mark.parametrize("side", list(Side))
def test_a_part_of_a_matrix_is_rounded_as_in_the_whole(side):
    values = torch.rand((40, 56), generator=torch.Generator().manual_seed(0))
    whole = stochastically_rounded(values, side, 7, 3)
    part = stochastically_rounded(values[8:24, 16:], side, 7, 3, (8, 16))
    assert torch.equal(part, whole[8:24, 16:])


@pytest.mark.parametrize("scalars", ["numbers", "tensors"])
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("residual", ["galore", "official"])
def test_stochastic_rounding_draws_what_the_reference_draws(monkeypatch, residual, side, scalars):
    """On sums that no order of addition changes: of the products nothing is left."""
    monkeypatch.setattr(foreach_module, "BLOCK_ELEMENTS", {"cpu": 200})
    monkeypatch.setattr(foreach_module, "TILE_ROWS", 8)
    matrices = matrices_of(2, (37, 61), 13, side, BF16, RESIDUALS[residual], salts=(5, 9))
    scalars = SCALARS if scalars == "numbers" else with_tensors(2)
    scalars = scalars._replace(scale=0.0)
    projected = matrices.exp_avgs[0].new_zeros(2, *matrices.exp_avgs[0].shape)
    channels = projected.shape[2 - (side is Side.RIGHT)]
    factor = None if residual == "galore" else torch.full((2, channels), 2.0**-6)
    written = []
    for backend in ("foreach", "reference"):
        of_backend = copied(matrices)
        operations = prepare(of_backend, backend=backend)
        projection = operations.project_moments(copied(matrices), scalars.adam)
        zero = projection._replace(direction=projected, projected=projected)
        operations.back_project_update(of_backend, zero, factor, scalars)
        written.append(of_backend.params)
    for one, other in zip(*written, strict=True):
        assert torch.equal(one, other)


def test_batch_sizes_keep_the_workspace_bounded():
    def size(*shape, rank=8, device="cpu"):
        with meta_stands_for(device):
            weight = torch.empty(shape, device="meta")
            return foreach_module.batch_size(weight, weight, rank)

    assert size(64, 64) == 2**20 // (8 * 64)
    assert size(2048, 2048, rank=512) == 1
    assert size(2048, 2048, rank=512, device="cuda") == 8
    assert size(0, 5, rank=0) >= 1
