"""Where the matrices of a backend are in a test, and the mark of what only a GPU can show."""

import pytest
import torch

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def device_of(backend: str) -> torch.device:
    """Triton's kernels are interpreted, and take tensors of a CPU, only where there is no GPU."""
    on_gpu = backend == "triton" and torch.cuda.is_available()
    return torch.device("cuda:0" if on_gpu else "cpu")
