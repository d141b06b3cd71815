"""What multiprocessors read from the L2 cache a second: the rate behind products of many tiles.

    python -m bench.contact.l2_reads      # a second, on a GPU

Every program reads all of a buffer that the cache holds, past its own L1 cache and from another
place on than its neighbours, as the tiles of a product are read again and again. Its result is the
exclusive or of all that it has read, so that a program that left anything out is found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.timing import interleaved

# Integers of 4 bytes: a program has 16 KB on their way at a time, 64 bytes a thread.
BLOCK, WARPS = 4096, 8
# Of a multiprocessor: as many as it has threads for.
PROGRAMS = 8
# Blocks between the places where neighbours begin; odd, so that programs begin everywhere.
STRIDE = 37
BYTES = 16 * 2**20


@triton.jit
def read_kernel(source, target, blocks, stride, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for index in range(blocks):
        block = (program * stride + index) % blocks
        total ^= tl.load(source + block * BLOCK + places, cache_modifier=".cg")
    tl.store(target + program * BLOCK + places, total)


def read(source: Tensor, programs: int) -> Tensor:
    """What each program found, [programs, BLOCK]; all alike, if all have read everything."""
    target = torch.empty(programs, BLOCK, dtype=torch.int32, device=source.device)
    blocks = source.numel() // BLOCK
    read_kernel[(programs,)](source, target, blocks, STRIDE, BLOCK=BLOCK, num_warps=WARPS)
    return target


def bytes_per_second(device: torch.device, size: int = BYTES, rounds: int = 20) -> float:
    """The best of some rounds.

    Raises:
        RuntimeError: a program has not read what it should have.
    """
    source = torch.randint(2**30, (size // 4,), dtype=torch.int32, device=device)
    processors = 2
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = PROGRAMS * processors
    right = source.view(-1, BLOCK)[0].clone()
    for block in source.view(-1, BLOCK)[1:]:
        right ^= block
    if not torch.equal(read(source, programs), right.expand(programs, BLOCK)):
        raise RuntimeError("l2_reads: a program has not read all of the buffer")
    times = interleaved({"read": lambda _: read(source, programs)}, device, rounds)
    return programs * size / min(times["read"].seconds)


def main() -> None:
    print(f"{bytes_per_second(torch.device('cuda')) / 1e12:.2f} TB/s from L2, {BYTES >> 20} MB")


if __name__ == "__main__":
    main()
