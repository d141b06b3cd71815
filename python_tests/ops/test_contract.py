"""What `prepare` refuses, whoever computes the step, and which odd layouts it lets through."""

import pytest
import torch

from lowrank_kernels.ops import (
    AdamScalars,
    Matrices,
    Projection,
    Residual,
    Scalars,
    Side,
    prepare,
)

SHAPE, RANK = (8, 12), 4
HALF, DOUBLE = torch.bfloat16, torch.float64


def batch(**changed):
    """Two matrices of the left side, with a residual."""

    def two(*shape):
        return [torch.zeros(shape), torch.zeros(shape)]

    low = RANK, SHAPE[1]
    lists = (two(*SHAPE), two(*SHAPE), two(SHAPE[0], RANK), two(*low), two(*low), two())
    return Matrices(Side.LEFT, Residual(0.25, 1.0), *lists)._replace(**changed)


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


def both(*shape, **options):
    return [zeros(*shape, **options)] * 2


def given(**changed):
    return {"residual": None, "grads": both(RANK, SHAPE[1]), "projected": True} | changed


# What is changed of a batch that could run, and what is said of it.
REFUSED = [
    ({"params": []}, ValueError, "param: a batch needs at least 1 tensors, got 0"),
    *(
        ({f"{name}{plural}": [zeros(*shape)]}, ValueError, f"{text}: a batch needs 2 .* got 1")
        for name, plural, text, shape in (
            ("grad", "s", "grad", SHAPE),
            ("bas", "es", "basis", (8, 4)),
            ("exp_avg", "s", "exp_avg", (4, 12)),
            ("exp_avg_sq", "s", "exp_avg_sq", (4, 12)),
            ("limiter_norm", "s", "limiter_norm", ()),
        )
    ),
    ({"limiter_norms": both()[:1]}, ValueError, "limiter_norm: a batch needs 2 tensors, got 1"),
    # Unlike the first of the batch.
    ({"grads": [zeros(8, 12), zeros(7, 12)]}, ValueError, r"grad 1 must have shape \(8, 12\)"),
    ({"grads": [zeros(8, 12), zeros(12, 8).T]}, ValueError, r"grad 1 must .* strides .*\(12, 1\)"),
    ({"bases": [zeros(8, 4), zeros(8, 4, dtype=DOUBLE)]}, TypeError, "basis 1 must be .*float32"),
    ({"params": [zeros(8, 12), zeros(8, 12, device="meta")]}, ValueError, "param 1 must be on cpu"),
    # No real floating-point matrices.
    ({"params": both(8)}, ValueError, "param must be a real floating-point matrix"),
    ({"grads": both(8)}, ValueError, "grad must be a real floating-point matrix"),
    ({"grads": both(8, 12, dtype=torch.int32)}, ValueError, "grad must be a real .* torch.int32"),
    ({"bases": both(8)}, ValueError, "basis must be a real floating-point matrix"),
    ({"bases": both(8, 4, dtype=torch.complex64)}, ValueError, "basis must be a real"),
    # Of a shape, place or dtype that does not fit the weight.
    ({"grads": both(12, 8)}, ValueError, r"grad must have shape \(8, 12\)"),
    ({"grads": both(8, 12, device="meta")}, ValueError, "grad must be on cpu"),
    ({"bases": both(12, 4)}, ValueError, r"basis must have shape \(8, 4\)"),
    ({"bases": both(8, 4, device="meta")}, ValueError, "basis must be on cpu"),
    ({"exp_avgs": both(12, 4)}, ValueError, r"exp_avg must have shape \(4, 12\)"),
    ({"exp_avgs": both(4, 12, device="meta")}, ValueError, "exp_avg must be on cpu"),
    ({"exp_avgs": both(4, 12, dtype=torch.float16)}, TypeError, "exp_avg must be float32, float64"),
    ({"exp_avgs": both(4, 12, dtype=HALF)}, TypeError, "exp_avg_sq must be torch.bfloat16"),
    ({"exp_avgs": both(4, 12, dtype=torch.int8)}, TypeError, "exp_avg_sq must be torch.uint8"),
    ({"exp_avgs": [zeros(12, 4).T] * 2}, ValueError, "exp_avg must be contiguous"),
    ({"exp_avg_sqs": both(12, 4)}, ValueError, r"exp_avg_sq must have shape \(4, 12\)"),
    ({"exp_avg_sqs": both(4, 12, device="meta")}, ValueError, "exp_avg_sq must be on cpu"),
    ({"exp_avg_sqs": both(4, 12, dtype=DOUBLE)}, TypeError, "exp_avg_sq must be torch.float32"),
    ({"exp_avg_sqs": [zeros(12, 4).T] * 2}, ValueError, "exp_avg_sq must be contiguous"),
    ({"limiter_norms": both(1)}, ValueError, r"limiter_norm must have shape \(\)"),
    ({"limiter_norms": both(dtype=DOUBLE)}, TypeError, "limiter_norm must be torch.float32"),
    ({"limiter_norms": both(device="meta")}, ValueError, "limiter_norm must be on cpu"),
    # Gradients that arrive projected.
    (given(residual=Residual(0.25, 1.0)), ValueError, "a residual needs gradients that are not"),
    (given(grads=both(*SHAPE)), ValueError, r"grad must have shape \(4, 12\), got \(8, 12\)"),
    (given(grads=both(4, 12, dtype=DOUBLE)), TypeError, "projected grad of torch.float32 moments"),
    (
        given(grads=both(4, 12, dtype=torch.int32)),
        ValueError,
        r"grad must be .*\(4, 12\) and torch.int32",
    ),
    (given(grads=[zeros(12, 4).T] * 2), ValueError, "a projected grad must be contiguous, got"),
    # Stochastic rounding.
    ({"salts": (1, 2)}, TypeError, "stochastic rounding serves bfloat16 weights, .*float32"),
    ({"params": both(8, 12, dtype=HALF), "salts": (1,)}, ValueError, "salts: .* needs 2, got 1"),
]


@pytest.mark.parametrize(
    ("changed", "error", "text"), REFUSED, ids=[text for _, _, text in REFUSED]
)
def test_what_does_not_fit_is_refused_by_name(changed, error, text):
    prepare(batch())
    with pytest.raises(error, match=text):
        prepare(batch(**changed))


def test_without_a_residual_no_limiter_is_asked_for():
    prepare(batch(residual=None, limiter_norms=[]))


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16], ids=str)
def test_a_projected_gradient_may_be_in_half_precision(dtype):
    prepare(batch(**given(grads=both(RANK, SHAPE[1], dtype=dtype))))


BACKENDS = pytest.mark.parametrize("backend", ["reference", "foreach", "native"])


def update(param, backend):
    """W <- W - 2, from a basis and a direction of ones."""
    rows, cols = param.shape
    direction = torch.ones(1, RANK, cols)
    state = [[torch.ones(rows, RANK)], [zeros(RANK, cols)], [zeros(RANK, cols)], []]
    matrices = Matrices(Side.LEFT, None, [param], [torch.ones(rows, cols)], *state)
    scalars = Scalars(AdamScalars(0.9, 0.999, 1e-6), scale=1.0, step_size=0.5, decay=0.0)
    projection = Projection(direction, direction, None)
    prepare(matrices, backend=backend).back_project_update(matrices, projection, None, scalars)


@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (0, 0)], ids=str)
@BACKENDS
def test_a_weight_that_overlaps_itself_is_refused_and_not_written(backend, strides):
    memory = torch.zeros(12)
    with pytest.raises(ValueError, match="param must not overlap itself, got strides") as raised:
        update(memory.as_strided((8, 12), strides), backend)
    assert str(strides) in str(raised.value)
    assert not memory.any()


@pytest.mark.parametrize(("shape", "strides"), [((1, 12), (0, 1)), ((8, 1), (1, 0))], ids=str)
@BACKENDS
def test_a_single_row_or_column_may_have_any_stride(backend, shape, strides):
    memory = torch.zeros(12)
    update(memory.as_strided(shape, strides), backend)
    assert torch.equal(memory, -2.0 * (torch.arange(12) < max(shape)))
