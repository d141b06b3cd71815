"""Text for pre-training: found, split, tokenized, and kept on disk as arrays of tokens."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VALIDATION_SHARE = 0.05
# Tests, bundled third-party code, tables of character codes: not the library's own code and prose.
STDLIB_SKIPPED = {
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"),
    *("site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"),
}


@dataclass(frozen=True)
class Document:
    """One file of text; the name is its path below the folder that was given."""

    name: str
    text: str


def load_documents(path: str | None) -> list[Document]:
    """Reads a file, every UTF-8 file of a folder, or without a path the Python standard library.

    Raises:
        ValueError: Nothing readable is there.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = (f for f in _visible(root) if f.suffix == ".py" and not _is_skipped(f, root))
    else:
        root = Path(path)
        files = iter([root]) if root.is_file() else _visible(root)
    documents = sorted(read(files, root), key=lambda document: document.name)
    if not documents:
        place = path or "the standard library"
        raise ValueError(f"no text in {place}: give --data a file or folder of UTF-8 text")
    return documents


def _visible(root: Path) -> Iterator[Path]:
    # A checkout's .git holds readable files that nobody means by "the text in this folder".
    for file in root.rglob("*"):
        if not any(part.startswith(".") for part in file.relative_to(root).parts):
            yield file


def _is_skipped(file: Path, root: Path) -> bool:
    return not STDLIB_SKIPPED.isdisjoint(file.relative_to(root).parts)


def read(files: Iterable[Path], root: Path) -> Iterator[Document]:
    """Files of UTF-8 text, named by their paths below a folder."""
    for file in files:
        if not file.is_file():
            continue
        try:
            # Reading as text would turn "\r\n" into "\n", and bits per byte would be wrong.
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text and "\0" not in text:
            yield Document(file.relative_to(root).as_posix() if file != root else file.name, text)


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Splits by file, or by the tail of a single file, into training and validation documents."""
    if len(documents) == 1:
        return _split_tail(documents[0])
    # A hash orders the names for good but not by alphabet, so that validation is not one topic.
    shuffled = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    count = max(1, round(len(documents) * VALIDATION_SHARE))
    validation = {document.name for document in shuffled[:count]}
    return (
        [document for document in documents if document.name not in validation],
        [document for document in documents if document.name in validation],
    )


def _split_tail(document: Document) -> tuple[list[Document], list[Document]]:
    wanted = int(len(document.text) * (1 - VALIDATION_SHARE))
    newline = document.text.rfind("\n", 0, wanted)
    cut = newline + 1 if newline >= 0 else wanted
    head, tail = document.text[:cut], document.text[cut:]
    return [Document(document.name, head)], [Document(document.name, tail)]


class ByteTokenizer:
    """A token a byte, and one more between documents."""

    vocab_size = 257
    separator = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids: np.ndarray) -> str:
        return bytes(int(i) for i in ids if i != self.separator).decode("utf-8")


class BpeTokenizer:
    """Byte-level byte-pair encoding, trained on the documents unless `cache` holds the result."""

    def __init__(self, documents: list[Document], vocab_size: int, cache: Path):
        from tokenizers import Tokenizer

        if not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            _train_bpe(documents, vocab_size).save(str(cache))
        self._tokenizer = Tokenizer.from_file(str(cache))
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.separator = self._tokenizer.token_to_id("<|end|>")

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text).ids, dtype=np.uint32)

    def decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids])


def _train_bpe(documents: list[Document], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


@dataclass(frozen=True)
class DataSummary:
    """What is trained and validated on. The digest covers names, text and the tokens made of it."""

    source: str
    vocab_size: int
    train_files: int
    train_bytes: int
    train_tokens: int
    validation_files: int
    validation_bytes: int
    validation_tokens: int
    digest: str

    def describe(self) -> str:
        return (
            f"{self.source}, vocabulary {self.vocab_size}\n"
            f"training: {self.train_files} files, {self.train_bytes:,} bytes,"
            f" {self.train_tokens:,} tokens\n"
            f"validation: {self.validation_files} files, {self.validation_bytes:,} bytes,"
            f" {self.validation_tokens:,} tokens"
        )


def prepare(
    path: str | None, tokenizer_name: str, vocab_size: int, window: int, folder: Path
) -> DataSummary:
    """Writes train.npy and validation.npy below `folder` and says what is in them.

    Raises:
        ValueError: There is no text, or one part is shorter than a `window` of tokens.
    """
    documents = load_documents(path)
    train, validation = split(documents)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.text}\0".encode())
    if tokenizer_name == "bytes":
        tokenizer = ByteTokenizer()
    else:
        cache = folder / f"bpe-{vocab_size}-{digest.hexdigest()[:12]}.json"
        tokenizer = BpeTokenizer(train, vocab_size, cache)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for part, members in (("train", train), ("validation", validation)):
        tokens = _join(tokenizer, members)
        if len(tokens) < window:
            raise ValueError(
                f"the {part} part has {len(tokens)} tokens, fewer than one window of {window}:"
                " give more --data or a smaller --seq-len"
            )
        np.save(folder / f"{part}.npy", tokens)
        digest.update(tokens.tobytes())
        counts[f"{part}_files"] = len(members)
        counts[f"{part}_bytes"] = sum(len(document.text.encode()) for document in members)
        counts[f"{part}_tokens"] = len(tokens)
    source = path or "the Python standard library"
    return DataSummary(source, tokenizer.vocab_size, **counts, digest=digest.hexdigest()[:16])


def _join(tokenizer: ByteTokenizer | BpeTokenizer, documents: list[Document]) -> np.ndarray:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    separator = np.array([tokenizer.separator])
    pieces = [piece for d in documents for piece in (tokenizer.encode(d.text), separator)]
    return np.concatenate(pieces).astype(dtype)
