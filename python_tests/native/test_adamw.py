"""The pass over whole parameters, as `ops.adamw` calls it: the bits of separate operations, with
moments in every format, and torch's own AdamW.
"""

import pytest
import torch
from formats import (
    ADAM,
    Fenced,
    FencedMoments,
    assert_same,
    assert_same_moments,
    random_gradient,
    random_moments,
    stepped,
)
from guarded import DTYPES
from pairs import pairwise

from lowrank_kernels import _native
from lowrank_kernels.ops import AdamScalars, Scalars, native
from lowrank_kernels.ops.adamw import adamw
from lowrank_kernels.ops.codes import FLAT_GROUPS, Stored, flat_noise

FORMATS = [torch.float32, torch.bfloat16, torch.int8]
# Groups of 256 and chunks of 1024, with and without a rest, and more than two threads have work.
SIZES = [0, 1, 255, 256, 257, 1024, 5003, 150001]
SALT, STEP = 2**31 - 9, 12
SCALARS = Scalars(AdamScalars(**ADAM), scale=7.0, step_size=0.01, decay=0.001, step=STEP)


class Problem:
    """One parameter, each of its arrays between sentinels."""

    def __init__(self, size, dtype, param=torch.float32, grad=torch.float32, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.moments = FencedMoments(random_moments((size,), dtype, FLAT_GROUPS, rng))
        self.param = Fenced.around(torch.randn(size, generator=rng).to(param))
        self.grad = Fenced.around(random_gradient((size,), rng).to(grad))

    def expected(self):
        """New moments and W, before `run`."""
        bits = flat_noise(0, self.param.view.numel(), SALT, STEP, torch.device("cpu"))
        stored, direction, _ = stepped(
            self.grad.view.float(), self.moments.stored, FLAT_GROUPS, bits, ADAM
        )
        kept = self.param.view.float() * (1 - SCALARS.decay)
        return stored, (kept - SCALARS.step_size * direction).to(self.param.view.dtype)

    def run(self):
        adamw(self.param.view, self.grad.view, self.moments.stored, SCALARS, SALT)
        for fence in (self.param, self.grad, self.moments):
            fence.assert_nothing_else_was_written()
        return self.moments.stored, self.param.view


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """All of it is by the pass, unless a test says otherwise."""
    monkeypatch.setattr("lowrank_kernels.ops.adamw._direction", None)


@pytest.mark.parametrize(
    ("size", "dtype", "param", "grad", "threads"),
    pairwise(SIZES, FORMATS, DTYPES, DTYPES, (1, 2, 5)),
    ids=str,
)
def test_a_step_has_the_bits_of_separate_operations(size, dtype, param, grad, threads):
    torch.set_num_threads(threads)
    problem = Problem(size, dtype, param, grad)
    stored, weight = problem.expected()
    problem.run()
    assert_same_moments(problem.moments.stored, stored)
    assert_same(problem.param.view, weight)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_bits_do_not_depend_on_threads(dtype):
    alone, weight = Problem(150001, dtype).run()
    for threads in (2, 3, 64):
        # torch's powers, of which problems are made, do depend on them.
        torch.set_num_threads(1)
        problem = Problem(150001, dtype)
        torch.set_num_threads(threads)
        stored, other = problem.run()
        assert_same_moments(stored, alone)
        assert_same(other, weight)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("threads", [1, 5])
def test_a_list_of_parameters_has_the_bits_of_each(threads, dtype):
    apart = [Problem(5003, dtype, seed=seed).run() for seed in range(5)]
    together = [Problem(5003, dtype, seed=seed) for seed in range(5)]
    salts = None if dtype is torch.float32 else [SALT] * 5
    each = [one.moments.arguments(salts and SALT, STEP) for one in together]
    lists = {
        name: [place for one in each for place in one[name]]
        for name, value in each[0].items()
        if isinstance(value, list)
    }
    _native.adamw(
        param=([one.param.view.data_ptr() for one in together], 0, 5003),
        grad=([one.grad.view.data_ptr() for one in together], 0, 5003),
        elements=5003,
        step_size=SCALARS.step_size,
        decay=SCALARS.decay,
        **ADAM,
        **each[0] | lists,
        threads=threads,
    )
    for one, (stored, weight) in zip(together, apart, strict=True):
        assert_same_moments(one.moments.stored, stored)
        assert_same(one.param.view, weight)


@pytest.mark.parametrize("param", DTYPES, ids=str)
def test_ten_steps_on_wide_moments_against_torch(param, rng):
    """Twice the error of torch in float32, whose weights are rounded as often."""
    size, options = 1000, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-8}
    start = torch.randn(size, generator=rng).to(param)
    runs = {dtype: torch.nn.Parameter(start.to(dtype)) for dtype in (torch.float64, torch.float32)}
    torches = [torch.optim.AdamW([one], **options) for one in runs.values()]
    weight, stored = start.clone(), Stored(torch.zeros(size), torch.zeros(size))
    for step in range(1, 11):
        grad = torch.randn(size, generator=rng)
        for run, optimizer in zip(runs.values(), torches, strict=True):
            run.grad = grad.to(run.dtype)
            optimizer.step()
            run.data.copy_(run.data.to(param))
        adam = AdamScalars(0.9, 0.999, 1e-8, 1 - 0.9**step, 1 - 0.999**step)
        adamw(weight, grad, stored, Scalars(adam, 1.0, 0.01, 0.001, step), SALT)
    exact, plain = (run.detach().double() for run in runs.values())
    unlucky = 8 * torch.finfo(param).eps * exact.abs().max()
    assert (weight.double() - exact).norm() <= 2 * (plain - exact).norm() + unlucky


@pytest.mark.parametrize("name", ["step_size", "decay", "step"])
def test_scalars_on_the_device_are_left_to_torch(name, monkeypatch):
    monkeypatch.undo()
    ours, torchs = (Problem(5003, torch.int8) for _ in range(2))
    ours.run()
    scalar = torch.tensor(getattr(SCALARS, name))
    scalars = SCALARS._replace(**{name: scalar})
    monkeypatch.setattr(native, "adamw", None)
    adamw(torchs.param.view, torchs.grad.view, torchs.moments.stored, scalars, SALT)
    unit = torch.finfo(torch.float32).eps
    error = (ours.param.view - torchs.param.view).norm()
    assert error <= 8 * unit * torchs.param.view.norm()
    for one, other in zip(ours.moments.stored[:2], torchs.moments.stored[:2], strict=True):
        assert (one.int() - other.int()).abs().max() <= 1


def test_autograd_sees_that_the_weight_was_written():
    problem = Problem(300, torch.int8)
    version = problem.param.view._version
    problem.run()
    assert problem.param.view._version > version
    with torch.inference_mode():
        Problem(300, torch.int8).run()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"param": ([0], 0, 300)}, "param is a null pointer"),
        ({"grad": ([64], 7, 300)}, "grad has an unknown dtype code 7"),
        ({"elements": -1}, "elements must not be negative"),
        ({"step_size": float("nan")}, "step_size must be finite"),
        ({"decay": float("inf")}, "decay must be finite"),
        ({"beta1": 1.0}, "beta1"),
        ({"exp_avg_scale": None}, "go with codes"),
        ({"moment_salts": []}, "moment_salts must have 1 values, got 0"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
    ids=str,
)
def test_bad_argument_is_named_and_nothing_is_written(arguments, match):
    problem = Problem(300, torch.int8)
    before = problem.param.view.clone()
    right = {
        "param": (problem.param.addresses, 0, 300),
        "grad": (problem.grad.addresses, 0, 300),
        "elements": 300,
        "step_size": 0.1,
        "decay": 0.1,
        "threads": 1,
        **ADAM,
        **problem.moments.arguments(SALT, STEP),
    }
    with pytest.raises(ValueError, match=match):
        _native.adamw(**right | arguments)
    assert_same(problem.param.view, before)
    with pytest.raises(ValueError, match=r"param overlaps grad|grad overlaps param"):
        _native.adamw(**right | {"grad": right["param"]})
