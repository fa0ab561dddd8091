"""Shards: the layout byte by byte, pieces read back, damage found and named."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.token_folders import store_of
from trainer.data import shards, tokens
from trainer.data.rows import PackedRows
from trainer.data.shard_writer import ShardWriter
from trainer.data.shards import BLOCK_BYTES, HEADER, STARTS, TOKENS, Shard, Vocabulary
from trainer.data.tokens import Part, TokenStore
from trainer.errors import DataError

SMALL = Vocabulary(tokenizer="t", vocab_size=1000, bos_token_id=1, eos_token_id=None)
LARGE = Vocabulary(tokenizer="t", vocab_size=1 << 20, bos_token_id=None, eos_token_id=2)


def write(path: Path, documents: list[np.ndarray], vocabulary: Vocabulary = SMALL) -> Shard:
    writer = ShardWriter(path, vocabulary)
    for document in documents:
        labels = {"labels": -document.astype("<i4"), "classes": np.array([len(document)], "<i4")}
        writer.add(document, 3 * len(document), labels)
    writer.close()
    return Shard(path)


def drawn(lengths: list[int], vocab_size: int = 1000) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab_size, length) for length in lengths]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    vocabulary=st.sampled_from([SMALL, LARGE]),
)
def test_a_plain_reader_finds_every_section_where_the_footer_says(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], vocabulary: Vocabulary
) -> None:
    """Read the file with struct, json and numpy alone, as another program would."""
    path = tmp_path_factory.mktemp("shard") / "a.shard"
    documents = drawn(lengths, vocabulary.vocab_size)
    write(path, documents, vocabulary)
    data = path.read_bytes()
    magic, version, offset, size = HEADER.unpack(data[:64])[:4]
    assert (HEADER.size, magic, version, offset + size) == (64, b"TESSERA\0", 1, len(data))
    footer = json.loads(data[offset:])
    found = {
        s["name"]: np.frombuffer(data, s["dtype"], s["count"], s["offset"])
        for s in footer["sections"]
    }
    assert list(found) == ["tokens", "starts", "labels", "classes", "hashes"]
    assert all(section["offset"] % 8 == 0 for section in footer["sections"])
    joined = np.concatenate(documents)
    assert found["tokens"].tolist() == joined.tolist()
    assert found["tokens"].dtype.itemsize == (2 if vocabulary is SMALL else 4)
    assert found["starts"].tolist() == [0, *np.cumsum(lengths)]
    assert found["labels"].tolist() == (-joined).tolist()
    assert found["classes"].tolist() == lengths
    counts = [footer[name] for name in ("num_documents", "num_tokens", "num_bytes")]
    assert counts == [len(lengths), len(joined), 3 * len(joined)]


@pytest.mark.parametrize("kind", ["log-normal", "one long", "long first", "many empty"])
def test_the_document_at_a_place_is_found_in_few_reads(tmp_path: Path, kind: str) -> None:
    """As one search over all starts finds it; places that no rule of lengths foresees too."""
    random, count = np.random.default_rng(0), 20_000
    lengths = {
        "log-normal": random.lognormal(2, 1.5, count).astype(int),
        "one long": np.r_[np.ones(count - 1, int), 300_000],
        "long first": np.r_[300_000, np.ones(count - 1, int)],
        "many empty": random.integers(0, 3, count) * random.integers(0, 2, count),
    }[kind]
    path = tmp_path / "a.shard"
    writer, ids = ShardWriter(path, SMALL), np.ones(lengths.max(), int)
    for length in lengths.tolist():
        writer.add(ids[:length], 0, {})
    writer.close()
    shard, starts, reads = Shard(path), np.r_[0, np.cumsum(lengths)], []
    plain = shard.read
    shard.read = lambda *place: reads.append(place) or plain(*place)  # type: ignore[method-assign,func-returns-value]
    places = [0, starts[-1] - 1, *random.integers(0, starts[-1], 500)]
    for place in map(int, places):
        assert shard._document_at(place) == np.searchsorted(starts, place, side="right") - 1
    assert len(reads) <= len(places) * (3 if kind in ("log-normal", "many empty") else 10)


def test_pieces_of_any_section_are_read_back(tmp_path: Path) -> None:
    documents = drawn([5, 0, 7, 3])
    shard, joined = write(tmp_path / "a.shard", documents), np.concatenate(documents)
    for start in range(16):
        for stop in range(start, 18):
            assert shard.tokens(start, stop).tolist() == joined[start:stop].tolist()
            assert shard.read("labels", start, stop).tolist() == (-joined[start:stop]).tolist()
    assert shard.read("classes", 1, 3).tolist() == [0, 7]


def test_documents_are_found_on_disk_as_in_memory(tmp_path: Path) -> None:
    """More documents than are read at once, many of them empty, in rows of all lengths."""
    generator = np.random.default_rng(1)
    lengths = generator.choice([0, 0, 1, 3, 40], 5000).tolist()
    lengths += [0] * 2000 + [9]  # one row that has to read on
    shard = write(tmp_path / "a.shard", drawn(lengths))
    starts = np.array([0, *np.cumsum(lengths)])
    total = int(starts[-1])
    for start in [0, 1, total - 10, total - 1, *generator.integers(0, total, 300).tolist()]:
        stop = min(start + int(generator.integers(1, 200)), total)
        first, found = shard.documents(start, stop)
        assert first == np.searchsorted(starts, start, side="right") - 1
        last = np.searchsorted(starts, stop)
        assert found.tolist() == starts[first : last + 1].tolist()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of three blocks."""
    path = tmp_path_factory.mktemp("whole") / "a.shard"
    write(path, [np.full(5 * BLOCK_BYTES // 4, 7), *drawn([100] * 10)])
    return path


def changed(whole: Path, folder: Path, place: int) -> Path:
    """Return a copy with one bit of another value."""
    data = bytearray(whole.read_bytes())
    data[place] ^= 1
    path = folder / "a.shard"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (0, "begins with"),
        (8, "version 0 of the format"),
        (16, "bytes, its header says"),
        (24, "bytes, its header says"),
        (32, "a footer at byte .* that does not match its hash"),
        (-1, "a footer at byte .* that does not match its hash"),
        (-300, "a footer at byte .* that does not match its hash"),
    ],
)
def test_a_changed_header_or_footer_is_refused(
    whole: Path, tmp_path: Path, place: int, message: str
) -> None:
    path = changed(whole, tmp_path, place)
    with pytest.raises(DataError, match=rf"{path} .*{message}"):
        Shard(path)


@pytest.mark.parametrize("place", [64, BLOCK_BYTES + 63, BLOCK_BYTES + 64, 2 * BLOCK_BYTES + 70])
def test_a_changed_block_is_named(whole: Path, tmp_path: Path, place: int) -> None:
    assert list(Shard(whole).damaged()) == []
    ((first, last),) = Shard(changed(whole, tmp_path, place)).damaged()
    assert first <= place < last <= first + BLOCK_BYTES


def test_changed_hashes_are_named(whole: Path, tmp_path: Path) -> None:
    section = Shard(whole).footer.sections[shards.HASHES]
    found = list(Shard(changed(whole, tmp_path, section.offset)).damaged())
    assert found == [(section.offset, section.stop)]


@pytest.mark.parametrize("size", [0, 63, 64, 1000, -1])
def test_a_cut_shard_is_refused_with_its_path(whole: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.shard"
    path.write_bytes(whole.read_bytes()[:size])
    with pytest.raises(DataError, match=rf"{path} (ends at|has \d+ bytes, its header says)"):
        Shard(path)


def test_a_shard_that_shrinks_or_vanishes_is_named_with_the_place(tmp_path: Path) -> None:
    """A mapping would kill the process here."""
    shard = write(tmp_path / "a.shard", drawn([100]))
    shard.tokens(0, 10)
    os.truncate(shard.path, 100)
    with pytest.raises(DataError, match=rf"{shard.path} ends at byte 100, needed 264"):
        shard.tokens(0, 100)
    shard.close()
    shard.path.unlink()
    with pytest.raises(DataError, match=rf"{shard.path} cannot be read at byte 64: No such file"):
        shard.tokens(0, 1)


def test_a_token_outside_the_vocabulary_is_named_in_the_batch(tmp_path: Path) -> None:
    store = store_of(tmp_path, [30, 30, 30])
    path = tmp_path / store.entries[0].file
    data = bytearray(path.read_bytes())
    place = 64 + 2 * 50
    data[place : place + 2] = (258).to_bytes(2, "little")
    path.write_bytes(data)
    rows = PackedRows(TokenStore(Part(tmp_path, "train")), 16)
    rows.batch([0, 1, 2], 3)
    with pytest.raises(DataError, match=rf"{path} holds token 258 at byte {place}, .* has 258;"):
        rows.batch([3], 1)


def test_a_file_has_its_name_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.shard", SMALL)
    writer.add(np.arange(10), 10)
    assert [path.name for path in tmp_path.iterdir()] == [".a.shard.tmp"]
    writer.abort()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "a.shard", drawn([3]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.shard"]


def test_equal_content_has_equal_fingerprints_and_any_change_another(tmp_path: Path) -> None:
    found = {
        name: write(tmp_path / name, drawn([4, lengths]), vocabulary).footer.fingerprint
        for name, lengths, vocabulary in (
            ("a", 5, SMALL), ("b", 5, SMALL), ("c", 6, SMALL), ("d", 5, LARGE),
        )
    }  # fmt: skip
    assert found["a"] == found["b"]
    assert len(set(found.values())) == 3


def test_a_store_of_many_shards_keeps_few_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_MAX_OPEN", 3)
    store = store_of(tmp_path, [20] * 9, shard_tokens=1)
    assert len(store.entries) == 9
    rows = PackedRows(store, 22)
    before = len(os.listdir("/proc/self/fd"))
    expected = [rows.batch([row], 1).input_ids.tolist() for row in range(9)]
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    again = [rows.batch([row], 1).input_ids.tolist() for row in reversed(range(9))]
    assert again == expected[::-1]


def test_another_shard_under_the_name_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", [20] * 2, shard_tokens=1)
    store_of(tmp_path / "b", [21] * 2, shard_tokens=1)
    os.replace(tmp_path / "b" / "train-00001.shard", tmp_path / "a" / "train-00001.shard")
    with pytest.raises(DataError, match=r"train-00001.shard is not the shard that .*index.json"):
        store.check()


def test_sections_of_tokens_and_starts_are_always_there(whole: Path) -> None:
    assert list(Shard(whole).footer.sections)[:2] == [TOKENS, STARTS]
