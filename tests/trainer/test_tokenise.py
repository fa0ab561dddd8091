"""Tokenising: the same bytes with any number of workers, after any kill, built once per machine."""

import json
import multiprocessing as mp
import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data import tokenise
from trainer.data.bpe import train_bpe
from trainer.data.encoders import Encoders
from trainer.data.folder_writer import FolderWriter
from trainer.data.named_sources import Source
from trainer.data.places import hold_out
from trainer.data.pretraining import PretrainingData
from trainer.data.shards import Shard
from trainer.data.sources import open_texts
from trainer.data.tokenise import build_folder, tokens_of
from trainer.data.tokenise_job import Texts, TokeniseJob
from trainer.data.tokenise_progress import TokeniseProgress
from trainer.data.tokenizers import ByteTokenizer
from trainer.data.tokens import EVAL, INDEX, TRAIN, Index
from trainer.errors import DataError

LIMIT_SECONDS = 150.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of 0 to 300 words, some of more than one byte per letter."""
    path = tmp_path_factory.mktemp("corpus") / "all.jsonl"
    generator = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "gr\u00fcn", "\u4e16\u754c", "x" * 30]
    lengths = generator.integers(0, 300, 300).tolist()
    texts = [" ".join(generator.choice(words, length)) for length in lengths]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def build(corpus: Path, folder: Path, progress: TokeniseProgress | None = None) -> Index:
    """Tokenise the corpus by bytes into several shards, in this process."""
    source = open_texts(Source(path=str(corpus)), "text")
    return build_folder(
        folder,
        {"of": "a test"},
        lambda writer: tokens_of(source, ByteTokenizer(), hold_out(0.1), writer),
        ByteTokenizer(),
        progress or TokeniseProgress("a test", None),
        shard_tokens=40_000,
    )


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    index = build(corpus, folder)
    assert len(index.stores[TRAIN]) > 3
    assert len(index.stores[EVAL]) == 1
    return folder


def test_shards_hold_every_document_in_order(corpus: Path, uninterrupted: Path) -> None:
    expected: dict[str, list[list[int]]] = {TRAIN: [], EVAL: []}
    for document in open_texts(Source(path=str(corpus)), "text").documents():
        name = hold_out(0.1)(document.id)
        expected[name].append([256, *document.text.encode(), 257])
    index = Index.read(uninterrupted)
    for name, entries in index.stores.items():
        found = []
        for entry in entries:
            shard = Shard(uninterrupted / entry.file)
            starts = shard.read("starts", 0, entry.num_documents + 1).tolist()
            tokens = shard.tokens(0, entry.num_tokens).tolist()
            found += [tokens[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]  # noqa: RUF007
            assert entry.num_bytes == entry.num_tokens - 2 * entry.num_documents
        assert found == expected[name]
        assert all(40_000 <= e.num_tokens < 50_000 for e in entries[:-1])


def test_any_number_of_workers_writes_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a trained tokenizer, in messages so small that every worker gets many."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(tokenise, "_CHUNK_BYTES", 5000)
    texts = [document.text for document in open_texts(Source(path=str(corpus)), "text").documents()]
    train_bpe(tmp_path / "bpe", texts, 300)
    found = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        job = TokeniseJob(
            output=str(folder), tokenizer=str(tmp_path / "bpe"), workers=workers,
            data=Texts(path=str(corpus), eval_fraction=0.1), shard_tokens=20_000,
        )  # fmt: skip
        job.run()
        found.append(contents(folder))
    assert found[0] == found[1]
    assert sum(name.endswith(".shard") for name in found[0]) > 3


class KilledAt(TokeniseProgress):
    """Ends the process as `kill -9` does, after a number of documents."""

    def __init__(self, document: int) -> None:
        super().__init__("a test", None)
        self.document = document

    def advance(self, num_tokens: int, num_bytes: int) -> None:
        super().advance(num_tokens, num_bytes)
        if self.num_documents == self.document:
            os.kill(os.getpid(), signal.SIGKILL)


def process_of(work: Callable[[], Any]) -> BaseProcess:
    """Return a process for `work` that forks from a server without threads.

    This one has some: those with which pyarrow reads, and what other tests left. A lock that one
    of them holds at a fork would stay locked in the child.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context.Process(target=work)


def exit_code(work: Callable[[], Any]) -> int | None:
    """Return that of `work` in a process of its own."""
    process = process_of(work)
    process.start()
    process.join(LIMIT_SECONDS)
    return process.exitcode


def test_killed_at_any_place_it_goes_on_to_the_same_bytes(
    corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    for document in (1, 20, 140, 299):
        folder = tmp_path / str(document)
        killed = partial(build, corpus, folder, KilledAt(document))
        assert exit_code(killed) == -signal.SIGKILL
        kept = [path.stat().st_ino for path in sorted(folder.glob("train-*.shard"))]
        assert not (folder / INDEX).exists()
        assert bool(kept) == (document > 20)
        build(corpus, folder)
        assert contents(folder) == contents(uninterrupted)
        after = [path.stat().st_ino for path in sorted(folder.glob("train-*.shard"))]
        assert after[: len(kept)] == kept  # not made twice


def test_killed_before_the_index_it_writes_the_index_only(
    corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    build(corpus, tmp_path / "out")
    (tmp_path / "out" / INDEX).unlink()
    progress = TokeniseProgress("a test", None)
    build(corpus, tmp_path / "out", progress)
    assert progress.num_documents == 0
    assert contents(tmp_path / "out") == contents(uninterrupted)


def test_an_error_leaves_finished_shards_only(corpus: Path, tmp_path: Path) -> None:
    class Interrupted(TokeniseProgress):
        def advance(self, num_tokens: int, num_bytes: int) -> None:
            super().advance(num_tokens, num_bytes)
            if self.num_documents == 140:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(corpus, tmp_path / "out", Interrupted("a test", None))
    names = set(contents(tmp_path / "out"))
    assert "train-00000.shard" in names
    assert not {name for name in names if name.endswith(".tmp")}
    assert INDEX not in names


class KillsItself(ByteTokenizer):
    """Ends the process that meets the letter Q."""

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        if any("Q" in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_documents(texts)


def test_a_worker_that_dies_is_an_error_that_says_so(tmp_path: Path) -> None:
    chunks = [(["train"], [text]) for text in ("a", "b", "Q", "c", "d", "e")]
    found = []

    def read() -> None:
        with Encoders(KillsItself(), np.dtype("<u2"), 2) as encoders:
            found.extend(names for names, _ in encoders.encode(iter(chunks)))

    with pytest.raises(DataError, match="died with exit code -9; start the same command again"):
        read()
    assert len(found) <= 2


def open_and_note(corpus: Path, cache: Path, log: Path) -> None:
    """Open the corpus as a rank does, and write down what it writes."""
    begin, add = FolderWriter.__init__, FolderWriter.add

    def note(what: str) -> None:
        with open(log, "a") as file:
            file.write(f"{what} {os.getpid()}\n")

    def noted_begin(self: FolderWriter, *arguments: Any) -> None:
        note("begins")
        begin(self, *arguments)

    def noted_add(self: FolderWriter, *arguments: Any) -> None:
        note("adds")
        add(self, *arguments)

    FolderWriter.__init__, FolderWriter.add = noted_begin, noted_add  # type: ignore[method-assign]
    data = PretrainingData(path=str(corpus), row_tokens=16, global_rows=4, cache=str(cache))
    train, _ = data.stores(ByteTokenizer())
    assert train.num_documents > 250


def test_ranks_build_a_cache_once_and_the_others_wait(corpus: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    rank = partial(open_and_note, corpus, tmp_path / "cache", log)
    processes = [process_of(rank) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_SECONDS)
    assert [process.exitcode for process in processes] == [0] * 4
    lines = log.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["begins", *["adds"] * 300]
    assert len({line.split()[1] for line in lines}) == 1


def test_a_folder_begun_from_something_else_is_refused(corpus: Path, tmp_path: Path) -> None:
    def job(**changes: Any) -> TokeniseJob:
        data = Texts(path=str(corpus), eval_fraction=changes.pop("fraction", 0.1))
        settings = {"tokenizer": "byte", "workers": 1, **changes}
        return TokeniseJob(output=str(tmp_path / "out"), data=data, **settings)

    job().run()
    before = contents(tmp_path / "out")
    _, progress = job(workers=2).run()
    assert progress.num_documents == 0
    for changes, name in [
        ({"fraction": 0.2}, r"data\.eval_fraction=0\.1, not 0\.2"),
        ({"shard_tokens": 7}, "shard_tokens=268435456, not 7"),
        ({"tokenizer": "bpe", "vocab_size": 300}, "tokenizer=.*, not bpe/300"),
    ]:
        with pytest.raises(ValueError, match=f"was begun with {name}"):
            job(**changes).check()
    corpus.touch()
    with pytest.raises(ValueError, match="was begun with hash of all files"):
        job().run()
    assert contents(tmp_path / "out") == before
