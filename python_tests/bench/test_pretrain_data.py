from itertools import pairwise

import numpy as np
import pytest

from bench.batches import Batches
from bench.data import BpeTokenizer, ByteTokenizer, Document, load_documents, prepare, split

TEXT = 'def f(x):\r\n\treturn "ångström ∑" + x\n\n'


def names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


def test_split_by_file_is_fixed_and_disjoint(text_folder):
    documents = load_documents(str(text_folder))
    train, validation = split(documents)
    assert names(train) + names(validation) != names(documents)
    assert sorted(names(train) + names(validation)) == names(documents)
    # The same in every process and on every machine: a hash salted per process would move it.
    assert names(validation) == ["part1.txt"]
    assert split(documents[::-1])[1] == validation


def test_split_of_a_single_file_is_its_tail(tmp_path):
    (tmp_path / "one.txt").write_text("line of text\n" * 100)
    documents = load_documents(str(tmp_path / "one.txt"))
    (train,), (validation,) = split(documents)
    assert train.text + validation.text == documents[0].text
    assert train.text.endswith("\n")
    assert 0.04 < len(validation.text) / len(documents[0].text) < 0.07


def test_default_text_is_the_standard_library():
    documents = load_documents(None)
    assert {"argparse.py", "json/decoder.py"} <= set(names(documents))
    assert not any(name.startswith(("test/", "site-packages/")) for name in names(documents))


def test_binary_and_hidden_files_are_no_text(text_folder, tmp_path):
    assert "picture.bin" not in names(load_documents(str(text_folder)))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    with pytest.raises(ValueError, match=r"no text in .*--data"):
        load_documents(str(tmp_path))


def test_too_little_text_says_what_to_do(tmp_path):
    (tmp_path / "one.txt").write_text("short\ntext")
    with pytest.raises(ValueError, match=r"fewer than one window of 17: .*--seq-len"):
        prepare(str(tmp_path), "bytes", 0, 17, tmp_path / "out")


def test_bytes_roundtrip():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT


def test_bpe_roundtrip_and_cache(tmp_path, text_folder):
    documents, cache = load_documents(str(text_folder)), tmp_path / "bpe.json"
    tokenizer = BpeTokenizer(documents, 300, cache)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert 257 < tokenizer.vocab_size <= 300
    assert len(tokenizer.encode(documents[0].text)) < len(documents[0].text)
    cached = BpeTokenizer([], 300, cache)
    assert np.array_equal(cached.encode(TEXT), ids)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_prepare_counts_what_it_writes(tokenizer, text_folder, tmp_path):
    data = prepare(str(text_folder), tokenizer, 300, 17, tmp_path)
    again = prepare(str(text_folder), tokenizer, 300, 17, tmp_path)
    assert data == again
    train, validation = np.load(tmp_path / "train.npy"), np.load(tmp_path / "validation.npy")
    assert (len(train), len(validation)) == (data.train_tokens, data.validation_tokens)
    assert max(train.max(), validation.max()) < data.vocab_size
    sizes = [file.stat().st_size for file in text_folder.glob("*.txt")]
    assert data.train_bytes + data.validation_bytes == sum(sizes)
    if tokenizer == "bytes":
        # One separator a file.
        assert data.train_tokens == data.train_bytes + data.train_files


def test_batches_depend_on_seed_and_step_only(text_folder, tmp_path):
    prepare(str(text_folder), "bytes", 0, 17, tmp_path)
    one, same, other = Batches(tmp_path, 16, 0), Batches(tmp_path, 16, 0), Batches(tmp_path, 16, 1)
    same.train(0, 4)
    assert one.train(3, 4).equal(same.train(3, 4))
    assert not one.train(3, 4).equal(one.train(4, 4))
    assert not one.train(3, 4).equal(other.train(3, 4))
    assert one.train(3, 4).shape == (4, 17)


def test_validation_windows_are_fixed_and_do_not_overlap(text_folder, tmp_path):
    prepare(str(text_folder), "bytes", 0, 17, tmp_path)
    np.save(tmp_path / "validation.npy", np.arange(100, dtype=np.uint16))
    windows = [row for batch in Batches(tmp_path, 16, 0).validation(64, 3) for row in batch]
    assert len(windows) == 4
    starts = [int(row[0]) for row in windows]
    assert starts[0] == 0
    assert all(b - a >= 16 for a, b in pairwise(starts))
    everything = next(Batches(tmp_path, 16, 1).validation(10**9, 100))
    assert len(everything) == 5
