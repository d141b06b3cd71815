"""Shared fixtures; `oracles` is importable from every test."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Read when triton is first imported, so it has to be here: without a GPU its kernels are
# interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Of the processes that tests start; of this one, see `few_threads`.
os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).parent))
# `bench`, behind whatever package is tested.
sys.path.append(str(Path(__file__).parents[1]))

# The same examples in every run: no draw of one run decides.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def few_threads():
    """Most matrices here are tiny: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
