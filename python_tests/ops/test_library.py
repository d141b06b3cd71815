"""The operators that compilers and exporters see: schemas, fakes, mutations; same bits as eager."""

import pytest
import torch
from ops.test_operations import Run
from pairs import pairwise

from lowrank_kernels.ops import (
    Noise,
    Side,
    back_project_update,
    channel_scale,
    library,
    load,
    project_moments,
)
from lowrank_kernels.optim.schedule import step_scalars

FORMS = [None, "official", "paper"]
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
CASES = [("reference", torch.float64), ("native", torch.float32), ("triton", torch.float32)]


def arguments(backend, dtype, side, form):
    """Two matrices after one step, and the scalars of the second."""
    runs = [Run(backend, dtype, (17, 29), 5, side, form) for _ in "ab"]
    for run in runs:
        run.step(0)
    group = {**runs[0].options, "betas": (0.9, 0.999)}
    return runs, step_scalars(group, 2, form, form == "paper")


def project_arguments(runs, scalars):
    residual = scalars.residual
    return (
        [run.grads[1] for run in runs],
        [run.basis for run in runs],
        int(runs[0].side),
        [run.exp_avg for run in runs],
        [run.exp_avg_sq for run in runs],
        scalars.adam.beta1,
        scalars.adam.beta2,
        scalars.adam.eps,
        float(scalars.adam.bias_correction1),
        float(scalars.adam.bias_correction2),
        residual and residual.kappa,
        runs[0].backend,
    )


@pytest.mark.parametrize(("case", "form", "side"), pairwise(CASES, FORMS, Side), ids=str)
def test_opcheck(case, form, side):
    backend, dtype = case
    if backend == "triton":
        pytest.importorskip("triton")
    runs, scalars = arguments(backend, dtype, side, form)
    first = project_arguments(runs, scalars)
    torch.library.opcheck(torch.ops.lowrank_kernels.project_moments, first, test_utils=CHECKS)
    direction, projected, sums = torch.ops.lowrank_kernels.project_moments(*first)
    factor = None
    if form:
        second = (*sums, [run.limiter_norm for run in runs], backend)
        torch.library.opcheck(torch.ops.lowrank_kernels.channel_scale, second, test_utils=CHECKS)
        factor = torch.ops.lowrank_kernels.channel_scale(*second)
    residual = scalars.residual
    third = (
        [run.weight for run in runs],
        *first[:3],
        direction,
        projected,
        residual and residual.kappa,
        residual and residual.rho,
        factor,
        scalars.scale,
        scalars.step_size,
        scalars.decay,
        None,
        0,
        backend,
    )
    torch.library.opcheck(torch.ops.lowrank_kernels.back_project_update, third, test_utils=CHECKS)


def whole_step(weights, grads, bases, exp_avgs, exp_avg_sqs, norms, side, scalars, noise, backend):
    projection = project_moments(
        grads,
        bases,
        side,
        exp_avgs,
        exp_avg_sqs,
        scalars.adam,
        scalars.residual,
        backend=backend,
    )
    factor = None
    if projection.sums is not None:
        factor = channel_scale(projection.sums, norms, backend=backend)
    back_project_update(
        weights,
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
        backend=backend,
    )


@pytest.mark.parametrize(
    ("case", "form", "side"),
    pairwise([*CASES, ("reference", torch.bfloat16)], FORMS, Side),
    ids=str,
)
def test_compiled_in_one_graph_with_the_bits_of_eager(case, form, side):
    backend, dtype = case
    if backend == "triton":
        pytest.importorskip("triton")
    torch.compiler.reset()
    noise = Noise((3, 4), 2) if dtype is torch.bfloat16 else None
    compiled = torch.compile(whole_step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (whole_step, compiled):
        runs, scalars = arguments(backend, dtype, side, form)
        names = ("weight", "basis", "exp_avg", "exp_avg_sq", "limiter_norm")
        weights, bases, *state = ([getattr(run, name) for run in runs] for name in names)
        grads = [run.grads[1] for run in runs]
        function(weights, grads, bases, *state, side, scalars, noise, backend)
        results.append([*weights, *(tensor for group in state for tensor in group)])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def test_eager_calls_do_not_pass_the_dispatcher(monkeypatch):
    def refuse(*_):
        raise AssertionError("the operators were called")

    for name in ("_project_moments", "_channel_scale", "_back_project_update"):
        monkeypatch.setattr(library, name, refuse)
    run = Run("reference", torch.float32, (17, 29), 5, Side.LEFT, "official")
    run.step(0)  # does all three
    with pytest.raises(AssertionError, match="operators"):
        library.Operators("reference").channel_scale([torch.ones(1, 3)] * 3, [torch.zeros(())])


def test_tensor_scalars_are_refused_under_a_compiler():
    runs, _ = arguments("reference", torch.float32, Side.LEFT, "official")
    group = {**runs[0].options, "betas": (0.9, 0.999)}
    scalars = step_scalars(group, torch.full((2,), 2.0), "official", False)
    projection = load("reference").project_moments(
        *project_arguments(runs, scalars)[:2],
        Side.LEFT,
        *([run.exp_avg for run in runs],) * 2,
        scalars.adam,
        None,
    )
    with pytest.raises(TypeError, match="step_size is a tensor"):
        library.Operators("reference").back_project_update(
            [run.weight for run in runs],
            [run.grads[1] for run in runs],
            [run.basis for run in runs],
            Side.LEFT,
            projection,
            None,
            None,
            scale=1.0,
            step_size=scalars.step_size,
            decay=scalars.decay,
            noise=None,
        )
