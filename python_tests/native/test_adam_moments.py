"""`_native.adam_moments` against float64, against torch's own bits, and at its borders."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from guarded import DEVICES, DTYPES, SIDES, Guarded, guard_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_kernels import _native

NAMES = ("projected", "exp_avg", "exp_avg_sq", "direction", "direction_sq", "projected_sq")
SCALARS: dict[str, float] = {
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-6,
    "bias_correction1": 1.0,
    "bias_correction2": 1.0,
}
CORRECTED = SCALARS | {"bias_correction1": 1 - 0.9**3, "bias_correction2": 1 - 0.999**3}
SHAPES = [(1, 1), (37, 61), (61, 37), (128, 512), (512, 1376), (1377, 127), (3, 40000), (40000, 3)]


@dataclass
class Problem:
    """One matrix and its outputs, each between two zones of NaN."""

    rows: int
    cols: int
    rows_are_channels: bool
    device: str = "cpu"
    seed: int = 0
    scale: float = 1.0
    storage: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        rng = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.cols)
        self.storage = {}
        for name in NAMES:
            size = self.channels if name in NAMES[4:] else self.rows * self.cols
            self.storage[name] = torch.full((size + 2 * self.guard,), torch.nan, device=self.device)
        for name in NAMES[:3]:
            self[name].copy_(torch.randn(shape, generator=rng) * self.scale)
        # As in training, V is not far below M^2: one huge quotient would drown all other errors.
        self["exp_avg_sq"].square_().addcmul_(self["exp_avg"], self["exp_avg"])

    @property
    def guard(self) -> int:
        return guard_of(self.cols)

    @property
    def channels(self) -> int:
        return self.rows if self.rows_are_channels else self.cols

    def __getitem__(self, name: str) -> Tensor:
        inside = self.storage[name][self.guard : -self.guard]
        return inside if name in NAMES[4:] else inside.view(self.rows, self.cols)

    def arguments(self, **overrides: Any) -> dict[str, Any]:
        on_gpu = self.device == "cuda"
        addresses = {name: [self[name].data_ptr()] for name in NAMES}
        return {
            "product": (addresses["projected"], 0, self.cols),
            **addresses,
            "rows": self.rows,
            "cols": self.cols,
            "channels_are_rows": self.rows_are_channels,
            **SCALARS,
            "threads": 1,
            "device": torch.cuda.current_device() if on_gpu else -1,
            "stream": torch.cuda.current_stream().cuda_stream if on_gpu else 0,
            **overrides,
        }

    def run(self, **overrides: Any) -> dict[str, Tensor]:
        _native.adam_moments(**self.arguments(**overrides))
        for name, storage in self.storage.items():
            assert storage[: self.guard].isnan().all(), f"wrote before {name}"
            assert storage[-self.guard :].isnan().all(), f"wrote behind {name}"
        return {name: self[name].clone() for name in NAMES}

    def expected(self, dtype: torch.dtype, scalars: dict[str, float]) -> dict[str, Tensor]:
        """The definition, at one precision, before `run`."""
        r, m, v = (self[name].to(dtype) for name in NAMES[:3])
        beta1, beta2, eps, correction1, correction2 = scalars.values()
        finite = r.isfinite()
        r = r.where(finite, 0)
        m = torch.where(finite, beta1 * m + (1 - beta1) * r, m)
        v = torch.where(finite, beta2 * v + (1 - beta2) * (r * r), v)
        n = ((m / correction1) / ((v / correction2).sqrt() + eps)).where(finite, 0)
        axis = 1 if self.rows_are_channels else 0
        values = (r, m, v, n, n.square().sum(axis), r.square().sum(axis))
        return dict(zip(NAMES, values, strict=True))


def assert_as_accurate_as_torch(problem: Problem, scalars: dict[str, float], **overrides: Any):
    """Twice torch's error, and 8 roundings in one element: torch may be lucky in a tiny matrix."""
    exact = problem.expected(torch.float64, scalars)
    torch32 = problem.expected(torch.float32, scalars)
    actual = problem.run(**scalars, **overrides)
    for name in NAMES:
        if not exact[name].numel():
            continue
        error = (actual[name] - exact[name]).norm()
        allowed = 2 * (torch32[name] - exact[name]).norm()
        unlucky = 8 * torch.finfo(torch.float32).eps * exact[name].abs().max()
        assert error <= allowed + unlucky, name


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]):
    for name, value in expected.items():
        assert torch.equal(actual[name].view(torch.int32), value.view(torch.int32)), name


@DEVICES
@SIDES
@pytest.mark.parametrize("scalars", [SCALARS, CORRECTED], ids=["folded", "corrected"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_most_twice_the_error_of_torch(shape, scalars, rows_are_channels, device):
    problem = Problem(*shape, rows_are_channels, device)
    assert_as_accurate_as_torch(problem, scalars, threads=2)


@DEVICES
@settings(max_examples=60)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(0, 70),
    rows_are_channels=st.booleans(),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0.5, 0.9999),
    eps=st.sampled_from([1e-8, 1e-6, 1e-3]),
    bias_correction1=st.floats(1e-3, 1),
    bias_correction2=st.floats(1e-3, 1),
    holes=st.floats(0, 0.5),
)
def test_any_shape_and_scalars(
    device, rows, cols, rows_are_channels, seed, scale, holes, **scalars
):
    problem = Problem(rows, cols, rows_are_channels, device, seed, scale)
    drop = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < holes
    problem["projected"][drop] = torch.nan
    scalars = {name: scalars[name] for name in SCALARS}
    assert_as_accurate_as_torch(problem, scalars)


@DEVICES
@SIDES
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_elements_have_the_bits_of_separate_ieee_operations(
    shape, betas, rows_are_channels, device
):
    """No FMA, no approximate root or quotient. By numpy: torch's own root is off by a rounding."""
    problem = Problem(*shape, rows_are_channels, device)
    r, m, v = (problem[name].cpu().numpy() for name in NAMES[:3])
    f32 = np.float32
    beta1, beta2 = betas
    m = f32(beta1) * m + f32(1 - beta1) * r
    v = f32(beta2) * v + f32(1 - beta2) * (r * r)
    n = m / (np.sqrt(v) + f32(SCALARS["eps"]))
    after = problem.run(beta1=beta1, beta2=beta2)
    actual = {name: value.cpu() for name, value in after.items()}
    expected = map(torch.from_numpy, (r, m, v, n))
    assert_same_bits(actual, dict(zip(NAMES, expected, strict=False)))


def documented_sum(terms: Tensor) -> Tensor:
    """Sums along dim 0: float32 over 16 terms, float64 over those blocks, in ascending order."""
    total = torch.zeros(terms.shape[1:], dtype=torch.float64)
    for block in terms.split(16):
        partial = torch.zeros(terms.shape[1:])
        for term in block:
            partial = partial + term
        total = total + partial
    return total


@SIDES
@pytest.mark.parametrize("shape", [(1, 1), (37, 61), (128, 512), (70, 1377)], ids=str)
def test_sums_have_the_documented_order(shape, rows_are_channels):
    problem = Problem(*shape, rows_are_channels)
    actual = problem.run()
    for matrix, total in (("direction", "direction_sq"), ("projected", "projected_sq")):
        squares = actual[matrix].square()
        if rows_are_channels:
            lanes = torch.nn.functional.pad(squares, (0, -shape[1] % 16)).view(shape[0], -1, 16)
            tree = documented_sum(lanes.transpose(0, 1))
            for width in (8, 4, 2, 1):
                tree = tree[:, :width] + tree[:, width:]
            expected = tree[:, 0].float()
        else:
            expected = documented_sum(squares).float()
        assert_same_bits(actual, {total: expected})


@SIDES
@pytest.mark.parametrize(
    "shape", [*SHAPES, (16, 5461), (5461, 16), (1, 50000), (50000, 1)], ids=str
)
def test_bits_do_not_depend_on_threads(shape, rows_are_channels):
    alone, *others = (
        Problem(*shape, rows_are_channels).run(threads=threads) for threads in (1, 2, 3, 64)
    )
    for other in others:
        assert_same_bits(other, alone)


@DEVICES
@SIDES
def test_two_runs_have_the_same_bits(rows_are_channels, device):
    first, second = (Problem(128, 1376, rows_are_channels, device).run() for _ in range(2))
    assert_same_bits(first, second)


@DEVICES
@SIDES
@pytest.mark.parametrize("hole", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_non_finite_elements_are_dropped_and_the_rest_is_computed(hole, rows_are_channels, device):
    problem = Problem(37, 61, rows_are_channels, device)
    whole = Problem(37, 61, rows_are_channels, device)
    holes = torch.zeros(37, 61, dtype=torch.bool, device=device)
    holes[5, 7] = holes[36, 60] = True
    holes[11] = True
    problem["projected"][holes] = hole
    before = {name: problem[name].clone() for name in NAMES[:3]}
    after, unharmed = problem.run(), whole.run()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[name][holes], before[name][holes])
    for name in ("projected", "direction"):
        assert (after[name][holes] == 0).all()
    for name in NAMES[:4]:
        assert torch.equal(after[name][~holes], unharmed[name][~holes])
    for name in ("direction_sq", "projected_sq"):
        assert after[name].isfinite().all()
    if rows_are_channels:
        assert after["direction_sq"][11] == after["projected_sq"][11] == 0


@DEVICES
def test_what_cannot_be_squared_is_dropped(device):
    """One such element would make its second moment infinite for ever."""
    largest = torch.tensor(torch.finfo(torch.float32).max).sqrt()
    beyond = torch.nextafter(largest, torch.tensor(float("inf")))
    for value, kept in ((largest, True), (beyond, False)):
        problem = Problem(1, 1, True, device)
        problem["projected"].fill_(value)
        before = problem["exp_avg_sq"].item()
        after = problem.run()
        assert after["projected"].item() == (value if kept else 0.0)
        assert (after["exp_avg_sq"].item() > before) == kept
        assert after["exp_avg_sq"].isfinite().all()


@DEVICES
@SIDES
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_matrices_have_zero_sums(shape, rows_are_channels, device):
    after = Problem(*shape, rows_are_channels, device).run(threads=2)
    for name in ("direction_sq", "projected_sq"):
        assert after[name].tolist() == [0.0] * (shape[0] if rows_are_channels else shape[1])


@DEVICES
@SIDES
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(37, 61), (3, 40000)], ids=str)
def test_without_sums_all_else_has_the_same_bits(shape, threads, rows_are_channels, device):
    summed, without = (Problem(*shape, rows_are_channels, device) for _ in "ab")
    expected = summed.run(threads=threads)
    got = without.run(threads=threads, direction_sq=None, projected_sq=None)
    for name in NAMES[:4]:
        assert torch.equal(got[name], expected[name]), name
    for name in NAMES[4:]:
        assert got[name].isnan().all()


@DEVICES
def test_null_pointers_are_allowed_for_nothing(device):
    nothing = Problem(0, 0, True, device)
    nothing.run(**{name: [0] for name in NAMES})


def rejected() -> list[tuple[str, Any, str]]:
    nan = float("nan")
    return [
        *((name, [0], f"{name} is a null pointer") for name in NAMES),
        *((name, [], f"{name} must have 1 addresses, got 0") for name in NAMES[1:]),
        ("product", ([8], 3, 5), "product has an unknown dtype code 3"),
        ("product", ([8], -1, 5), "product has an unknown dtype code -1"),
        ("product", ([8], 0, 4), "product has rows of 5 elements but a stride of 4"),
        ("product", ([8], 0, 2**62), "product has a stride that overflows"),
        ("product", ([8, 8], 0, 5), "product must have 1 addresses, got 2"),
        ("product", ([0], 0, 5), "product is a null pointer"),
        ("product", ([9], 1, 5), "product is not aligned to 2 bytes"),
        ("product", ([2**64 - 16], 0, 5), "product runs past the end"),
        ("rows", -1, "rows must not be negative"),
        ("cols", -1, "cols must not be negative"),
        ("rows", 2**62, r"rows \* cols overflows"),
        *((name, value, name) for name in ("beta1", "beta2") for value in (-0.1, 1.0, nan)),
        *(("eps", value, "eps") for value in (-1e-8, nan, float("inf"))),
        *(
            (name, value, name)
            for name in ("bias_correction1", "bias_correction2")
            for value in (0.0, -0.5, 1.5, nan)
        ),
        ("threads", 0, "threads"),
        ("device", -2, "device"),
        ("direction_sq", None, "direction_sq and projected_sq go together"),
        ("projected_sq", None, "direction_sq and projected_sq go together"),
    ]


def assert_rejected(problem: Problem, match: str, **overrides: Any):
    before = {name: storage.clone() for name, storage in problem.storage.items()}
    with pytest.raises(ValueError, match=match):
        _native.adam_moments(**problem.arguments(**overrides))
    assert_same_bits(problem.storage, before)


@DEVICES
@pytest.mark.parametrize(("name", "value", "match"), rejected())
def test_bad_argument_is_named_and_nothing_is_written(name, value, match, device):
    assert_rejected(Problem(4, 5, True, device), match, **{name: value})


@DEVICES
@pytest.mark.parametrize("name", NAMES)
def test_misaligned_array_is_named(name, device):
    problem = Problem(4, 5, True, device)
    address = problem[name].data_ptr() + 2
    assert_rejected(problem, f"{name} is not aligned", **{name: [address]})


@DEVICES
@pytest.mark.parametrize(("first", "second"), [(a, b) for a in NAMES for b in NAMES if a < b])
def test_overlapping_arrays_are_named(first, second, device):
    problem = Problem(4, 5, True, device)
    last = problem[first].data_ptr() + 4 * (problem[first].numel() - 1)
    assert_rejected(problem, f"{first}.*{second}|{second}.*{first}", **{second: [last]})


def test_adjacent_arrays_do_not_overlap():
    block = torch.zeros(6 * 4)
    addresses = {name: [block.data_ptr() + 16 * i] for i, name in enumerate(NAMES)}
    product = (addresses["projected"], 0, 2)
    _native.adam_moments(**Problem(2, 2, True).arguments(product=product, **addresses))


def test_product_may_lie_beside_but_not_over_what_is_written():
    problem, product = Problem(4, 5, True), torch.zeros(4, 5)
    assert_rejected(problem, "overlaps", product=([problem["exp_avg"].data_ptr()], 0, 5))
    assert_rejected(problem, "overlaps", product=([problem["projected"].data_ptr()], 1, 5))
    problem.run(product=([product.data_ptr()], 0, 5))


@DEVICES
@SIDES
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_any_dtype_and_stride(dtype, gap, rows_are_channels, device, rng):
    """As if the product had been copied into `projected`."""
    product = Guarded(1, 37, 61, dtype, gap, device).fill(rng)
    apart, copied = (Problem(37, 61, rows_are_channels, device) for _ in range(2))
    before = product.storage.clone()
    copied["projected"].copy_(product.views[0])
    expected = copied.run(threads=2)
    assert_same_bits(apart.run(product=product.matrices, threads=2), expected)
    assert torch.equal(product.storage.isnan(), before.isnan())
    assert torch.equal(product.storage.nan_to_num(), before.nan_to_num())


@DEVICES
@SIDES
@pytest.mark.parametrize("shape", [(37, 61), (128, 512), (3, 4000)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_group_has_the_bits_of_its_matrices(shape, threads, rows_are_channels, device):
    """More of them than one CUDA launch takes."""
    alone = [Problem(*shape, rows_are_channels, device, seed) for seed in range(50)]
    together = [Problem(*shape, rows_are_channels, device, seed) for seed in range(50)]
    lists = {name: [problem[name].data_ptr() for problem in together] for name in NAMES}
    product = (lists["projected"], 0, shape[1])
    arguments = together[0].arguments(product=product, **lists, threads=threads)
    _native.adam_moments(**arguments)
    for one, other in zip(alone, together, strict=True):
        assert_same_bits({name: other[name] for name in NAMES}, one.run())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_an_error_that_says_so():
    problem = Problem(4, 5, True)
    before = {name: storage.clone() for name, storage in problem.storage.items()}
    with pytest.raises(RuntimeError, match="CUDA"):
        _native.adam_moments(**problem.arguments(device=0))
    assert_same_bits(problem.storage, before)


@SIDES
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(_native.build_info()["cuda"] is None, reason="built without the CUDA half")
def test_a_captured_graph_replays_the_bits_of_a_launch(rows_are_channels):
    """Capture fails on a sync and on a launch on any other stream."""
    captured = Problem(128, 1376, rows_are_channels, "cuda")
    launched = Problem(128, 1376, rows_are_channels, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _native.adam_moments(**captured.arguments())
    graph.replay()
    assert_same_bits({name: captured[name] for name in NAMES}, launched.run())
