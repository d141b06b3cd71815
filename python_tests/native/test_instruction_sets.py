"""Every instruction set computes the same bits: valgrind's processor has AVX2 and no AVX-512."""

import ctypes.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_kernels import _native

SCRIPT = Path(__file__).with_name("every_pass.py")
VALGRIND = "valgrind", "-q", "--tool=none"


def capability_and_digest(*simulator):
    # Not the link of a virtual environment, which may be a script; none of its packages is needed.
    python = Path(sys.executable).resolve()
    command = [*simulator, str(python), str(SCRIPT), _native.__file__]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.skipif(ctypes.util.find_library("gomp") is None, reason="needs libgomp")
@pytest.mark.skipif(
    _native.build_info()["cpu_capability"] != "avx512", reason="needs a processor with AVX-512"
)
def test_avx2_and_avx512_compute_the_same_bits():
    widest, simulated = capability_and_digest(), capability_and_digest(*VALGRIND)
    assert [widest[0], simulated[0]] == ["avx512", "avx2"]
    assert widest[1] == simulated[1]
