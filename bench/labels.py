"""Lines of code with the package that they are from: what an encoder is fine-tuned to tell.

A package is a folder of torch's own files of one language, as installed: Python, stubs, C++, CUDA
and CMake. A sample is two lines of a file, one after the other, without indentation. The files of a
package are parted: lines to train on and lines to validate on come from different ones, so that
knowing a file by heart is of no use. Packages are those of the most text, all with as many samples.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.data import Document, read

# What validation has of the text of a package: at least, and at most.
LEAST, MOST = 0.15, 0.4
# Bytes of two lines that say anything.
SHORTEST = 24
SUFFIXES = (".py", ".pyi", ".h", ".hpp", ".cuh", ".cmake")
# After the bytes, which are tokens themselves.
BEGIN, MASK, PADDING = 256, 257, 258
VOCABULARY = 259


class Samples(NamedTuple):
    """Tokens, samples x length, BEGIN first and PADDING last; labels, samples; both int64."""

    tokens: torch.Tensor
    labels: torch.Tensor

    def batch(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """In the names that transformers' models take."""
        tokens = self.tokens[index]
        mask = (tokens != PADDING).long()
        return {"input_ids": tokens, "attention_mask": mask, "labels": self.labels[index]}


class Labelled(NamedTuple):
    """Samples of both parts, the packages' names by label, and all bytes outside of validation."""

    packages: list[str]
    train: Samples
    validation: Samples
    text: np.ndarray
    digest: str


def torch_documents() -> list[Document]:
    """torch's files, of which a folder, one below `include`, and a suffix make a package."""
    root, found = Path(torch.__file__).parent, []
    files = (file for file in root.rglob("*") if file.suffix in SUFFIXES)
    for document in sorted(read(files, root), key=lambda document: document.name):
        *folders, file = document.name.split("/")
        if folders:
            package = ".".join(folders[: 2 if folders[0] == "include" else 1]) + Path(file).suffix
            found.append(Document(f"{package}/{document.name}", document.text))
    return found


def labelled(
    documents: list[Document], packages: int, train: int, validation: int, length: int
) -> Labelled:
    """Of so many packages so many samples each, to train and to validate on.

    Raises:
        ValueError: there are fewer packages that have them.
    """
    folders: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        name, slash, _ = document.name.partition("/")
        if slash:
            folders[name].append(document)
    found: dict[str, tuple[list[str], list[str]]] = {}
    held: set[str] = set()
    for name in sorted(folders, key=lambda name: (-_size(folders[name]), name)):
        parts = parted(folders[name])
        first, second = drawn_pairs(parts[0], train), drawn_pairs(parts[1], validation)
        if len(found) < packages and first and second:
            found[name] = first, second
            held |= {document.name for document in parts[1]}
    if len(found) < packages:
        raise ValueError(
            f"{len(found)} packages have {train} and {validation} pairs of lines in files apart,"
            f" fewer than the {packages} that were asked for"
        )
    both = [_samples([pairs[part] for pairs in found.values()], length) for part in (0, 1)]
    rest = [document.text.encode() for document in documents if document.name not in held]
    text = np.frombuffer(b"\n".join(rest), np.uint8)
    digest = hashlib.sha256(text.tobytes())
    for samples in both:
        digest.update(samples.tokens.numpy().tobytes())
    return Labelled(list(found), both[0], both[1], text, digest.hexdigest()[:16])


def parted(files: list[Document]) -> tuple[list[Document], list[Document]]:
    """Files to train on, and others to validate on, between LEAST and MOST of the text; none of
    these where no file is of such a size.
    """
    # A hash orders the names for good but not by alphabet.
    shuffled = sorted(files, key=lambda each: hashlib.sha256(each.name.encode()).digest())
    whole, held = _size(files), list[Document]()
    for file in shuffled:
        if _size(held) < LEAST * whole and _size([*held, file]) <= MOST * whole:
            held.append(file)
    if _size(held) < LEAST * whole:
        held = []
    return [file for file in files if file not in held], held


def _size(files: list[Document]) -> int:
    return sum(len(file.text) for file in files)


def drawn_pairs(files: list[Document], count: int) -> list[str] | None:
    """So many of the files' pairs of lines, none twice; None where there are fewer."""
    found = list(dict.fromkeys(pair for file in files for pair in pairs_of(file.text)))
    return random.Random(0).sample(found, count) if len(found) >= count else None


def pairs_of(text: str) -> list[str]:
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    pairs = [f"{first}\n{second}" for first, second in zip(lines[::2], lines[1::2], strict=False)]
    return [pair for pair in pairs if len(pair.encode()) >= SHORTEST]


def _samples(packages: list[list[str]], length: int) -> Samples:
    tokens = [encoded(pair, length) for pairs in packages for pair in pairs]
    labels = [label for label, pairs in enumerate(packages) for _ in pairs]
    return Samples(torch.tensor(tokens), torch.tensor(labels))


def encoded(text: str, length: int) -> list[int]:
    """BEGIN, the first bytes, and PADDING."""
    tokens = [BEGIN, *text.encode()[: length - 1]]
    return tokens + [PADDING] * (length - len(tokens))


class Masked(NamedTuple):
    """Windows of text in which some bytes are hidden."""

    text: np.ndarray
    length: int
    share: float = 0.15

    def batch(self, step: int, size: int) -> dict[str, torch.Tensor]:
        """Depends on the step alone; labels are -100 where nothing is to be guessed."""
        draw, window = np.random.default_rng(step), self.length - 1
        starts = draw.integers(len(self.text) - window + 1, size=size)
        labels = np.stack([self.text[start : start + window] for start in starts]).astype(np.int64)
        hidden = draw.random(labels.shape) < self.share
        begin = np.full((size, 1), BEGIN)
        tokens = np.concatenate([begin, np.where(hidden, MASK, labels)], axis=1)
        wanted = np.concatenate([np.full((size, 1), -100), np.where(hidden, labels, -100)], axis=1)
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(wanted)}
