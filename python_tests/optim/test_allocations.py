"""The counter of allocations sees what is born and what dies, and nothing that was there before."""

import torch

from lowrank_kernels.optim.allocations import Allocations


def test_temporaries_count_while_they_live():
    given = torch.zeros(1000)
    with Allocations() as allocations:
        kept = given + 1
        (given * 2).sum()  # 4000 bytes and 4, gone again
        view = kept[10:]
        given.add_(1)
        torch.add(given, 1, out=given)
        assert allocations.live_bytes == 4000
    assert allocations.peak_bytes == 2 * 4000 + 4
    assert view.numel() == 990


def test_lists_and_memory_that_is_used_again_count_once():
    given = [torch.zeros(100), torch.zeros(200)]
    with Allocations() as allocations:
        for _ in range(5):
            torch._foreach_add(given, 1)
        assert allocations.live_bytes == 0
    assert allocations.peak_bytes == 1200
