"""What the configured Triton kernels compile to, which no interpreter shows: spills, wide loads.

No GPU is needed. The compiler runs in a process of its own, because TRITON_INTERPRET, which the
other tests set, replaces it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
# `bench` is run from the repository and is not installed with the package.
sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.triton_compile import DTYPES, OPTIONS, TARGETS, Record

# Compiling takes as long as the machine's other work makes it.
pytestmark = pytest.mark.timeout(0)

ROOT = Path(__file__).parents[2]
PRODUCTS = {80: "mma", 90: "wgmma", 100: "tcgen05"}
PRODUCT_KERNELS = ("project_kernel", "update_kernel")
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
    kernels = {"project_kernel", "channel_scale_kernel", "update_kernel"}
    assert {record.kernel for record in records} == kernels
    assert {record.target for record in records} == {target.capability for target in TARGETS}
    assert {record.dtypes for record in records} == set(DTYPES)
    assert {record.split for record in records} == {False, True}
    uses = {use for record in records for use in record.uses}
    for options in filter(None, OPTIONS):
        assert any(use.endswith(f"Fira, {options}") for use in uses), options


def test_nothing_spills(records):
    spilling = [record for record in records if record.spills or record.stack]
    assert not spilling, report(spilling)


def test_shared_memory_fits(records):
    limits = {target.capability: target.gpu.shared_bytes for target in TARGETS}
    large = [record for record in records if record.shared > limits[record.target]]
    assert not large, report(large)


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
