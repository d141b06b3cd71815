"""A tiny text, and the arguments of a comparison that takes a second an optimizer."""

import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# `bench` is run from the repository and is not installed with the package.
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = ("the rank ", "of a ", "gradient ", "is låg", "\n", "\r\n", "and so ")
    draw = random.Random(0)
    for i in range(6):
        text = "".join(draw.choices(words, k=200))
        (folder / f"part{i}.txt").write_bytes(text.encode())
    (folder / "picture.bin").write_bytes(b"\xff\xfe\x00")
    return folder


@pytest.fixture(scope="session")
def tiny(text_folder) -> list[str]:
    arguments = (
        "--device cpu --steps 12 --seq-len 16 --batch-size 4 --micro-batch 4 --rank 8"
        " --update-proj-gap 4 --eval-every 6 --eval-tokens 64 --checkpoint-every 5"
    )
    return [*arguments.split(), "--data", str(text_folder)]
