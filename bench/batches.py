"""Batches of token windows that depend on seed and step only: resuming needs no state for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch


class Batches:
    """Windows of `seq_len + 1` tokens: random ones to train on, fixed ones to validate on."""

    def __init__(self, folder: Path, seq_len: int, seed: int):
        self._train = np.load(folder / "train.npy", mmap_mode="r")
        self._validation = np.load(folder / "validation.npy", mmap_mode="r")
        self._window = seq_len + 1
        self._seed = seed

    def train(self, step: int, batch_size: int) -> torch.Tensor:
        """Returns int64 tokens [batch_size, seq_len + 1]."""
        starts = np.random.default_rng((self._seed, step)).integers(
            len(self._train) - self._window + 1, size=batch_size
        )
        return self._gather(self._train, starts)

    def validation(self, tokens: int, batch_size: int) -> Iterator[torch.Tensor]:
        """Yields about `tokens` tokens of the validation part, or all of it where that is less."""
        last = len(self._validation) - self._window
        count = max(1, min(tokens, last) // (self._window - 1))
        starts = np.linspace(0, last, count).astype(np.int64)
        for i in range(0, count, batch_size):
            yield self._gather(self._validation, starts[i : i + batch_size])

    def _gather(self, tokens: np.ndarray, starts: np.ndarray) -> torch.Tensor:
        windows = np.stack([tokens[start : start + self._window] for start in starts])
        return torch.from_numpy(windows.astype(np.int64))
