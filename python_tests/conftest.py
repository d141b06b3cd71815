"""Shared fixtures; `oracles` is importable from every test."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

from lowrank_kernels.ops import dispatch, notices, selfcheck

# Read when triton is first imported, so it has to be here: without a GPU its kernels are
# interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Most matrices here are tiny: a second thread only waits for the first. Of the processes that tests
# start, and of this one, in which fixtures of modules come before those of tests.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent))
# `bench`, behind whatever package is tested.
sys.path.append(str(Path(__file__).parents[1]))

# The same examples in every run: no draw of one run decides.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def few_threads():
    """Whatever a test has set."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def fresh_choices():
    """Nothing was chosen before, nor checked, nor told."""
    remembered = dispatch._chosen, selfcheck.fault_in, notices.notice_once
    for each in remembered:
        each.cache_clear()
    yield
    for each in remembered:
        each.cache_clear()


@pytest.fixture
def gpu(monkeypatch, fresh_choices):
    """Two GPUs for `auto` that are not there: the CPU's `native` is checked in the place of theirs.

    Triton serves them too, and is right, or what `faults` says. `checks` lists what was asked.
    """
    right, asked = selfcheck.fault_of, SimpleNamespace(checks=[], faults={"triton": None})

    def fault_of(backend, device, kind):
        asked.checks.append((backend, str(device), kind.param, kind.grad))
        known = asked.faults
        return known[backend] if backend in known else right(backend, torch.device("cpu"), kind)

    def gpu_of(device):
        return torch.device("cuda", torch.device(device).index or 0), "NVIDIA H200"

    def native(kind):
        return dispatch._native_obstacle(kind._replace(device="cpu"))

    monkeypatch.setattr(selfcheck, "fault_of", fault_of)
    monkeypatch.setitem(dispatch._OBSTACLES, "native", native)
    monkeypatch.setitem(dispatch._OBSTACLES, "triton", lambda kind: kind.strides)
    monkeypatch.setattr(dispatch, "_gpu_of", gpu_of)
    return asked
