"""Runs that stop, die and go on with other numbers of ranks train on every sample once, in order.

Against a slow reference: a list of all samples, and of what each of them holds.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache as memo
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from models.nn.head import IGNORED
from tests.conftest import Figure
from tests.ledgers import Line, committed, ledgers, samples_of
from tests.ranks import run_ranks
from tests.runs import DieAt, tiny_run, train
from tests.trainer.test_documents import ROWS, written
from trainer.batch import Batch
from trainer.data.chat import ChatEncoder
from trainer.data.document_data import DocumentData
from trainer.data.document_store import DocumentStore, no_targets, sections
from trainer.data.documents import PackedDocuments
from trainer.data.examples import Example, Labels
from trainer.data.folder_writer import FolderWriter
from trainer.data.loader import StepLoader
from trainer.data.mixing import Mix
from trainer.data.order import permute, round_keys
from trainer.data.row_filling import Rows
from trainer.data.rows import PackedRows
from trainer.data.shards import Shard
from trainer.data.tokenise import vocabulary_of
from trainer.data.tokenizers import ByteTokenizer
from trainer.data.tokens import Part, TokenStore
from trainer.mesh import MeshSpec
from trainer.verify.forked import RankFailedError

CASES = {"commit": 100, "all": 1000}
ROW_TOKENS = 8
MOST_SAMPLES = (4 * 5 + 2) * 12  # of one case
READS = 6  # of a shard, for one sample of a step: its length, that of bad rows before it, itself
CLASSES = Labels(names=("a", "b", "c"), problem_type="single_label_classification")
Content = tuple[bytes, ...]
"""What is to be learnt of a sample: ids, labels, positions, and segments or class."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What a run reads, and the same by hand."""

    rows: Rows
    contents: list[Content]
    """Of every row or document."""
    found: Callable[[Batch], Iterator[Content]]
    """Yields what a batch holds."""
    reads: "Reads"
    weights: tuple[Fraction, ...] = (Fraction(1),)
    """Shares of the sources."""


class Reads:
    """Counts how often a store is asked for a shard."""

    def __init__(self, store: TokenStore) -> None:
        self.count, self._shard = 0, store.shard
        store.shard = self  # type: ignore[method-assign]

    def __call__(self, number: int) -> Shard:
        self.count += 1
        return self._shard(number)


def drawn_ids(random: Random, lengths: list[int]) -> list[list[int]]:
    return [[random.randrange(258) for _ in range(length)] for length in lengths]


def writer_of(folder: Path, shard_tokens: int) -> FolderWriter:
    folder.mkdir()
    return FolderWriter(folder, vocabulary_of(ByteTokenizer()), shard_tokens)


def content(*columns: list[int]) -> Content:
    return tuple(np.array(column, np.int64).tobytes() for column in columns)


def corpus_of_rows(folder: Path, random: Random, shard_tokens: int, *weights: int) -> Corpus:
    """Rows of one source, or of one for each of the `weights`."""
    folders = [folder.with_name(f"tokens_{number}") for number in range(max(1, len(weights)))]
    contents = [one for own in folders for one in written_rows(own, random, shard_tokens)]
    store = TokenStore(*(Part(own, "train", own.name) for own in folders))
    return Corpus(
        rows=PackedRows(store, ROW_TOKENS), contents=contents, found=rows_in, reads=Reads(store),
        weights=tuple(map(Fraction, weights)) or Corpus.weights,
    )  # fmt: skip


def written_rows(folder: Path, random: Random, shard_tokens: int) -> list[Content]:
    """Write documents of 0 to 20 tokens, concatenated; return their rows.

    A shard ends with the document that fills it.
    """
    documents = drawn_ids(random, [random.randrange(21) for _ in range(25)])
    writer, shards = writer_of(folder, shard_tokens), [[]]
    for number, ids in enumerate(documents):
        writer.add("train", np.array(ids, np.int64), 0)
        if len(shards[-1]) >= shard_tokens:
            shards.append([])
        shards[-1] += [(token, number, place) for place, token in enumerate(ids)]
    assert len(writer.finish().stores["train"]) == len(shards)
    return [
        content_of_row(shard, first)
        for shard in shards
        for first in range(0, len(shard), ROW_TOKENS)
    ]


def content_of_row(shard: list[tuple[int, int, int]], first: int) -> Content:
    """Return a row of (token, document, place in the document), one token after the other."""
    row = shard[first : first + ROW_TOKENS]
    ids, labels, positions, segments = [], [], [], []
    for place, (token, document, in_document) in enumerate(row):
        here = [at for _, other, at in row if other == document]
        after = shard[first + place + 1 : first + place + 2]
        ids.append(token)
        labels.append(after[0][0] if after and after[0][1] == document else IGNORED)
        positions.append(in_document - here[0])
        segments.append(len({other for _, other, _ in row[: place + 1]}))
    missing = ROW_TOKENS - len(row)
    for column, padding in ((ids, 0), (labels, IGNORED), (positions, 0), (segments, 0)):
        column.extend([padding] * missing)
    return content(ids, labels, positions, segments)


def rows_in(batch: Batch) -> Iterator[Content]:
    columns = (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids)
    for row in zip(*(column.numpy() for column in columns), strict=True):
        if row[3].any():
            yield tuple(column.tobytes() for column in row)
        else:
            assert (row[1] == IGNORED).all()


def corpus_of_documents(
    folder: Path, random: Random, *, is_packed: bool, labels: Labels | None = None
) -> Corpus:
    """Documents of 1 to 10 tokens, of which a row takes 8, with bad rows (0) between them."""
    lengths = [random.randrange(1, 11) for _ in range(23)]
    for bad in (4, 11, 12, 22):
        lengths[bad] = 0
    writer, contents = writer_of(folder, 60), []
    for ids in drawn_ids(random, lengths):
        targets = [random.choice((IGNORED, token)) for token in ids]
        target = random.randrange(3)
        example = Example(input_ids=np.array(ids), labels=np.array(targets, np.int64))
        if labels is not None:
            example = Example(input_ids=np.array(ids), classes=np.array(target))
        writer.add("train", example.input_ids, 0, sections(example) if ids else no_targets(labels))
        cut, places = ids[:ROW_TOKENS], list(range(min(len(ids), ROW_TOKENS)))
        learnt = targets[:ROW_TOKENS] if labels is None else [IGNORED] * len(cut)
        contents.append(content(cut, learnt, places, [] if labels is None else [target]))
    writer.finish()
    for bad in (22, 12, 11, 4):  # the next good one stands for it
        contents[bad] = contents[(bad + 1) % len(contents)]
    store = DocumentStore(Part(folder, "train"))
    assert len(store.entries) > 1
    rows = PackedDocuments(store, ROW_TOKENS, is_packed=is_packed)
    return Corpus(rows=rows, contents=contents, found=documents_in, reads=Reads(store))


def documents_in(batch: Batch) -> Iterator[Content]:
    columns = (batch.input_ids, batch.labels, batch.position_ids)
    for place, segments in enumerate(batch.segment_ids.numpy()):
        row = [column[place].numpy() for column in columns]
        classes = np.zeros((0, 0)) if batch.class_labels is None else batch.class_labels.numpy()
        own = classes[place : place + 1].reshape(-1)
        for number in range(1, int(segments.max()) + 1):
            run = segments == number
            yield (*(column[run].tobytes() for column in row), own[number - 1 : number].tobytes())
        assert (row[1][segments == 0] == IGNORED).all()
        assert (own[int(segments.max()) :] == IGNORED).all()


MAKERS: dict[str, Callable[[Path, Random], Corpus]] = {
    "rows": lambda folder, random: corpus_of_rows(folder, random, 1 << 20),
    "rows of several shards": lambda folder, random: corpus_of_rows(folder, random, 60),
    "rows of two sources": lambda folder, random: corpus_of_rows(folder, random, 60, 1, 3),
    "documents": lambda folder, random: corpus_of_documents(folder, random, is_packed=False),
    "packed documents": lambda folder, random: corpus_of_documents(folder, random, is_packed=True),
    "packed documents with classes": lambda folder, random: corpus_of_documents(
        folder, random, is_packed=True, labels=CLASSES
    ),
}


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run, and how it ends."""

    ranks: int
    global_samples: int
    micro_rows: int
    steps: int
    save_every: int
    lost: int | None
    """How many of the newest checkpoints are lost by its crash; None: it saves and ends."""

    def saves(self, step: int, executed: int) -> bool:
        is_last = self.lost is None and executed == self.steps
        return is_last or step % self.save_every == 0

    def loaders(self, corpus: Corpus, seed: int) -> list[StepLoader]:
        return [
            StepLoader(
                rows=corpus.rows, seed=seed, weights=corpus.weights,
                global_samples=self.global_samples, micro_rows=self.micro_rows, rank=rank,
                num_ranks=self.ranks,
            )
            for rank in range(self.ranks)
        ]  # fmt: skip


def drawn_attempts(random: Random) -> list[Attempt]:
    size, attempts = random.randint(1, 12), []
    for _ in range(random.randint(1, 4)):
        if random.random() < 0.2:
            size = random.randint(1, 12)
        attempts.append(
            Attempt(
                ranks=random.randint(1, 5), global_samples=size, micro_rows=random.randint(1, 3),
                steps=random.randint(0, 5), save_every=random.randint(1, 3),
                lost=random.choice((None, 0, 0, 1)),
            )
        )  # fmt: skip
    return attempts


@memo
def order(counts: tuple[int, ...], weights: tuple[Fraction, ...], seed: int) -> list[int]:
    """Return which row or document each sample is: of each source, epoch after epoch."""
    found = []
    for sample in range(MOST_SAMPLES):
        source, number = Mix(weights, seed).locate(sample)
        epoch, index = divmod(number, counts[source])
        keys = round_keys("rows", seed, *([source] if source else []), epoch)
        found.append(sum(counts[:source]) + permute(index, counts[source], keys))
    return found


class Replay:
    """Plays attempts one after the other; remembers what a real run leaves on disk."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.corpus, self.seed = corpus, seed
        rows = order(tuple(corpus.rows.counts), corpus.weights, seed)
        self.expected = [corpus.contents[row] for row in rows]
        self.ledger: list[Line] = []
        self.saved: dict[int, str] = {}
        self.begins = [0]
        """The sample that each step begins with, and the next one will."""

    def play(self, number: int, attempt: Attempt) -> None:
        step, loaders = len(self.begins) - 1, attempt.loaders(self.corpus, self.seed)
        if step:
            state = json.loads(self.saved[step])
            before = self.corpus.reads.count
            loaders = [loader.resumed(step, state) for loader in loaders]
            assert self.corpus.reads.count == before
        for executed in range(1, attempt.steps + 1):
            self.execute(number, step, loaders)
            step += 1
            if attempt.saves(step, executed):
                self.saved[step] = state_of(loaders, step)
        if attempt.lost is not None:
            self.fall_back(attempt.lost)

    def execute(self, attempt: int, step: int, loaders: list[StepLoader]) -> None:
        """Build the step on every rank, and compare it with the list."""
        first = self.begins[-1]
        samples = range(first, first + loaders[0].global_samples)
        assert loaders[0].samples(step) == samples
        lines, lengths = [], set()
        for loader in loaders:
            before = self.corpus.reads.count
            built = loader.step(step)
            assert self.corpus.reads.count - before <= READS * len(samples) + 1
            own = [n for start, stop in built.ranges for n in range(start, stop)]
            found = [one for batch in built.micro_batches for one in self.corpus.found(batch)]
            assert sorted(found) == sorted(self.expected[n] for n in own)
            lengths.add(len(built.micro_batches))
            lines.append({"attempt": attempt, "step": step + 1, "samples": built.ranges})
            assert loader.ranges(step) in (built.ranges, [(first, samples.stop)])
        assert len(lengths) == 1
        assert samples_of(lines) == list(samples)  # none lost, none twice
        self.ledger += lines
        self.begins.append(samples.stop)

    def fall_back(self, lost: int) -> None:
        """Die: what is left is the newest checkpoint, or the one before, or nothing."""
        kept = sorted(self.saved)[: len(self.saved) - lost]
        self.saved = {step: self.saved[step] for step in kept}
        del self.begins[max(kept, default=0) + 1 :]

    def prove(self) -> None:
        """Show from the ledger alone what the run trained on."""
        steps = committed(self.ledger)
        assert list(steps) == list(range(1, len(self.begins)))
        samples = [samples_of(lines) for lines in steps.values()]
        assert [n for step in samples for n in step] == list(range(self.begins[-1]))
        assert [0, *accumulate(map(len, samples))] == self.begins


def state_of(loaders: list[StepLoader], step: int) -> str:
    """Return what a checkpoint holds of the data: the same from any rank of any number."""
    alone = replace(loaders[0], rank=0, num_ranks=1, micro_rows=1)
    (text,) = {json.dumps(loader.state(step)) for loader in (*loaders, alone)}
    assert len(text) < 1024
    return text


@pytest.mark.parametrize("amount", ["commit", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MAKERS)
def test_every_sample_is_trained_once_and_in_order_whatever_stops_and_goes_on(
    tmp_path: Path, figure: Figure, name: str, amount: str
) -> None:
    corpus = MAKERS[name](tmp_path / "tokens", Random(0))
    assert sum(corpus.rows.counts) == len(corpus.contents)
    cases = -(-CASES[amount] // len(MAKERS))
    for number in range(cases):
        random = Random(number)
        replay, attempts = Replay(corpus, seed=random.randrange(4)), drawn_attempts(random)
        attempts.append(replace(attempts[-1], steps=2, lost=None))
        try:
            for start, attempt in enumerate(attempts, 1):
                replay.play(start, attempt)
            replay.prove()
        except AssertionError as error:
            error.add_note(f"case {number}: {attempts}")
            raise
    figure(f"A23 runs that stop, die and change, each sample once: {name}", cases, "")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> DocumentData:
    """Documents that are tokenised: once, not by the ranks."""
    folder = tmp_path_factory.mktemp("documents")
    data = DocumentData(
        path=written(folder / "rows.jsonl", ROWS), encoder=ChatEncoder(), row_tokens=64,
        global_documents=8, cache=str(folder / "cache"),
    )  # fmt: skip
    data.build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1)
    return data


@pytest.mark.parametrize(
    ("kind", "chain"),
    [
        ("rows", [(2, 8), (2, 8)]),
        ("rows", [(2, 8), (1, 8), (4, 8)]),
        ("rows", [(2, 8), (4, 4)]),
        ("documents", [(2, 8), (1, 8), (4, 10)]),
    ],
)
def test_ledgers_of_a_run_killed_and_continued_hold_every_sample_once(
    tmp_path: Path, cache: Path, documents: DocumentData, kind: str, chain: list[tuple[int, int]]
) -> None:
    """All but the last of the (ranks, samples of a step) save the third step, die at the fifth."""
    run = tiny_run(cache, save_every=3, data_micro_rows=1, mesh=MeshSpec(dp_shard=-1))
    run = replace(run, max_steps=3 * len(chain))
    for number, (ranks, size) in enumerate(chain):
        data: Any = replace(run.data, global_rows=size)
        if kind == "documents":
            data = replace(documents, global_documents=size)
        now = replace(run, data=data, callbacks={"die": DieAt(3 * number + 5)})
        if number == len(chain) - 1:
            run_ranks(ranks, train, tmp_path, now)
        else:
            with pytest.raises(RankFailedError, match="died without a result"):
                run_ranks(ranks, train, tmp_path, now)
    steps = committed(ledgers(tmp_path))
    assert list(steps) == list(range(1, run.max_steps + 1))
    samples = [samples_of(lines) for lines in steps.values()]
    sizes = [size for _, size in chain for _ in range(3)]
    assert [n for step in samples for n in step] == list(range(sum(sizes)))
    assert list(map(len, samples)) == sizes
    for step, lines in steps.items():
        assert len(lines) == chain[(step - 1) // 3][0]  # one of each rank
        assert len({line["loss_sum"] for line in lines}) == 1  # the sum over all of them
