"""What the configured Triton kernels compile to, which no interpreter shows: spills, races.

No GPU is needed. The compiler runs in a process of its own, because TRITON_INTERPRET, which the
other tests set, replaces it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
# `bench` is run from the repository and is not installed with the package.
sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.triton_compile import (
    DTYPES,
    FIRA,
    OPTIONS,
    TARGETS,
    Case,
    Record,
    _configurations,
    _course,
)

# Compiling takes as long as the machine's other work makes it.
pytestmark = pytest.mark.timeout(0)

ROOT = Path(__file__).parents[2]
PRODUCTS = {80: "mma", 90: "wgmma", 100: "tcgen05"}
PRODUCT_KERNELS = ("project_kernel", "update_kernel", "resident_update_kernel")
KERNELS = (
    *PRODUCT_KERNELS,
    "pad_rows_kernel",
    "channel_scale_kernel",
    "combine_kernel",
    "moments_kernel",
    "adamw_kernel",
    "scaled_rows_kernel",
)
NARROW = {"bf16": ("ld 2", "st 2", "cp.async 4", "cp.async 8"), "fp32": ("cp.async 4",)}
HALF = ("bf16", "fp16")


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    path = tmp_path_factory.mktemp("compiled") / "triton-compile.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "bench.triton_compile", "--quick", "--out", path],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [Record(**variant) for variant in json.loads(path.read_text())["variants"]]


def report(records: list[Record]) -> str:
    return "\n".join(map(str, records))


def test_every_kernel_is_compiled_for_every_target(records):
    assert {record.kernel for record in records} == set(KERNELS)
    assert {record.target for record in records} == {target.capability for target in TARGETS}
    assert {record.dtypes for record in records} == set(DTYPES)
    assert {record.split for record in records} == {False, True}
    uses = {use for record in records for use in record.uses}
    for options in filter(None, OPTIONS):
        method = "GaLore" if OPTIONS[options].projected else "Fira"
        assert any(use.endswith(f"{method}, {options}") for use in uses), options


def test_nothing_spills(records):
    spilling = [record for record in records if record.spills or record.stack]
    assert not spilling, report(spilling)


def test_shared_memory_fits(records):
    limits = {target.capability: target.gpu.shared_bytes for target in TARGETS}
    large = [record for record in records if record.shared > limits[record.target]]
    assert not large, report(large)


def test_nothing_is_overwritten_while_a_product_or_a_copy_is_pending(records):
    dangerous = [record for record in records if record.hazards]
    assert not dangerous, report(dangerous)


def test_copies_of_aligned_rows_overlap_products(records):
    """On sm_80 a product ends before the next instruction."""
    pipelined = [
        record
        for record in records
        if record.kernel == "project_kernel" and record.target > 80 and record.aligned
    ]
    pipelined = [record for record in pipelined if record.dtypes in HALF]
    alone = [record for record in pipelined if not record.overlapping]
    assert pipelined
    assert not alone, report(alone)


def test_half_precision_products_use_the_matrix_unit(records):
    products = [r for r in records if r.kernel in PRODUCT_KERNELS and r.dtypes in HALF]
    slow = [record for record in products if record.product != PRODUCTS[record.target]]
    assert products
    assert not slow, report(slow)


def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(records):
    """Rows of 5461 elements cannot be: no two of them start at the same distance from 16 bytes."""
    products = [record for record in records if record.kernel in PRODUCT_KERNELS]
    aligned = [record for record in products if record.aligned and record.dtypes in NARROW]
    narrow = [
        record
        for record in aligned
        if any(access in record.accesses for access in NARROW[record.dtypes])
        or "st 16" not in record.accesses
    ]
    assert aligned
    assert not narrow, report(narrow)


def test_candidates_are_of_the_problem_that_the_launcher_has():
    """Tiles that spill where accesses are narrow are none of matrices that lie anywhere."""

    def registers(target, shape, options):
        case = Case("1b", shape, 512, 24, "bf16", options, FIRA)
        pairs = _configurations(case, target)
        return {config.registers for pair in pairs for config in pair if config is not None}

    for target in TARGETS:
        assert registers(target, (2048, 5461), "scattered") == {255}
        assert (128 in registers(target, (5461, 2048), "")) == (target.capability >= 90)


def test_a_loop_that_no_run_enters_is_dangerous():
    """As one that the first program of a grid does not enter."""
    text = """module {
tt.func public @kernel(%depth: i32) {
  %one = arith.constant 1 : i32
  %first = tt.get_program_id x : i32
  %end = arith.minsi %depth, %first : i32
  scf.for %i = %first to %end step %one : i32 {
    %group = ttng.warp_group_dot %a, %b, %sum {isAsync = true} : !ttg.memdesc<>
  }
}
}"""
    _, (hazard,) = _course(text, {"BD": 64})
    assert hazard == "ttng.warp_group_dot in line 7 was not followed"
    assert _course(text.replace("%depth: i32", ""), {"BD": 64}) == (0, [])


BARRIER = """
from bench.triton_compile import FIRA, TARGETS, Case, compiled, launches

for target in TARGETS:
    for kernel, *launch in launches(target, Case("", (512, 512), 128, 2, "fp32", "", FIRA)):
        if kernel.__name__ == "channel_scale_kernel":
            print(compiled(target, kernel, *launch).asm["ptx"])
"""


def test_no_warp_takes_the_new_norm_of_the_limiter_for_the_previous_one():
    """Each of them loads it for itself, and one of them stores the new one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BARRIER]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = run.stdout.split(".entry ")[1:]
    assert len(kernels) == len(TARGETS)
    for ptx in kernels:
        _, last = ptx.split("atom.global")
        steps = re.findall(r"bar\.sync|(?:ld|st)\.global\S*(?= +\[| +\{)", last)
        accesses = [step for step in steps if ".cg" not in step]
        assert "ld.global.b32 bar.sync st.global.b32" in " ".join(accesses), steps


BOUND = """
import sys, torch
from bench.no_launch import no_launch
from lowrank_kernels.ops import AdamScalars, Matrices, Residual, Scalars, Side, prepare
from lowrank_kernels.ops.codes import FLAT_GROUPS, FORMATS, channel_groups, new_stored
from lowrank_kernels.ops.triton.launch import _numbers
from lowrank_kernels.ops.triton.plain import adamw

def tensors(*size):
    return [torch.zeros(size) for _ in "ab"]

moments = FORMATS[sys.argv[1]], torch.device("cpu")
stored = [new_stored((48, 16), *moments, channel_groups(Side.RIGHT)) for _ in "ab"]
(*columns,) = (list(each) for each in zip(*stored) if each[0] is not None)
matrices = Matrices(Side.RIGHT, Residual(0.25, 1.0), *(tensors(48, 32) for _ in "WG"),
                    tensors(32, 16), *columns[:2], tensors(), None,
                    *(columns[2:] or ((), ())), (3, 4))
given = sys.argv[2] == "projected"
if given:
    matrices = matrices._replace(residual=None, grads=tensors(48, 16), projected=True)
whole = tensors(48, 16) + [new_stored((48, 16), *moments, FLAT_GROUPS)]
scalars = Scalars(AdamScalars(0.9, 0.999, 1e-8), 0.25, step_size=0.01, decay=0.0, step=17)
with no_launch() as launches:
    steps = []
    type(launches).__call__ = lambda self, *arguments: steps[-1].append(arguments)
    operations = prepare(matrices, backend="triton")
    for _ in range(2):
        steps.append([])
        projection = operations.project_moments(matrices, scalars.adam, scalars.step)
        factor = None if given else operations.channel_scale(matrices, projection.sums)
        operations.back_project_update(matrices, projection, factor, scalars)
        adamw(*whole, scalars, 5)
assert list(map(len, steps)) == ([3, 3] if given else [4, 4])
for by_jit, bound in zip(*steps):
    assert by_jit[:6] == bound[:6]  # the grid, the stream, the function
    asked, got = (each[-1] if isinstance(each[-1], tuple) else each for each in (by_jit, bound))
    assert any(isinstance(x, torch.Tensor) for x in asked)
    assert list(map(type, _numbers(asked))) == list(map(type, got))
    # Behind the pointers to what a step allocates, everything is the same.
    assert _numbers(asked)[8:] == got[8:]
"""


@pytest.mark.parametrize("method", ["fira", "projected"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
def test_bound_launches_hand_over_what_tritons_jit_does(moments, method):
    """Up to the C function that launches."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BOUND, moments, method]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


CODEC = """
import sys, torch
sys.path.insert(0, "python_tests")
from bench.triton_compile import TARGETS, _activate
from ops.test_triton_codes import SIZE, decode_kernel, encode_kernel

def compiled(kernel, *dtypes, of_avg):
    tensors = (torch.empty(SIZE, dtype=dtype, device="meta") for dtype in dtypes)
    return kernel.run(*tensors, OF_AVG=of_avg, SIZE=SIZE, grid=(1,), warmup=True).asm["ptx"]

for target in TARGETS:
    _activate(target)
    for of_avg, code in ((True, torch.int8), (False, torch.uint8)):
        wide = torch.float32
        print(compiled(decode_kernel, code, wide, wide, of_avg=of_avg))
        print(compiled(encode_kernel, wide, torch.int32, code, wide, of_avg=of_avg))
"""


def test_codes_are_of_correctly_rounded_operations_and_nothing_is_contracted():
    """The interpreter knows no others."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CODEC]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = set(re.findall(r"\b((?:sqrt|div|fma|mad|rcp|ex2)\.[\w.]*f32)", run.stdout))
    assert found == {"sqrt.rn.f32", "div.rn.f32"}
    assert "cvt.rzi.s32.f32" in run.stdout
