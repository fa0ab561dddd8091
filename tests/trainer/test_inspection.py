"""Counts and words of batches that are written by hand, and of rows that encoders made."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.nn.head import IGNORED
from tests.chat_templates import CHATML, TURNS, tokenizer
from tests.token_folders import store_of
from trainer.batch import Batch
from trainer.data.chat import ChatEncoder
from trainer.data.examples import Labels
from trainer.data.rows import PackedRows
from trainer.data.spelling import spell
from trainer.data.tokenizers import BOS, EOS, ByteTokenizer, FileTokenizer
from trainer.inspection.counts import SourceCounts, count
from trainer.inspection.words import SeenRow, read_rows

BYTES = ByteTokenizer()
WORDS = Labels(names=("O", "PER"), problem_type=None)
MOODS = Labels(names=("bad", "good"), problem_type="single_label_classification")


def batch(rows: list[list[str]], *provenance: str, width: int = 8, **changes: Any) -> Batch:
    """Return rows of documents of bytes, every token behind a document's first a target."""
    columns = np.zeros((4, len(rows), width), np.int64)
    ids, labels, positions, segments = columns
    labels.fill(IGNORED)
    for row, documents in enumerate(rows):
        start = 0
        for number, text in enumerate(documents, start=1):
            run = slice(start, start + len(text))
            ids[row, run] = list(text.encode())
            labels[row, start : run.stop - 1] = ids[row, start + 1 : run.stop]
            positions[row, run], segments[row, run] = np.arange(len(text)), number
            start = run.stop
    names = ("input_ids", "labels", "position_ids", "segment_ids")
    tensors = dict(zip(names, map(torch.from_numpy, columns), strict=True))
    return Batch(**tensors | changes, provenance=provenance)


def trained(row: SeenRow) -> list[str]:
    """Return the trained text of every document."""
    return ["".join(t.text for t in tokens if t.is_trained) for _, tokens in row.pieces]


def test_documents_targets_padding_and_sources_are_counted() -> None:
    step = [
        batch([["abc", "de"], ["fghijklm"]], "wiki/train[5:6],code/train[0:1]", "wiki/train[7:8]"),
        batch([["nop"], []], "train[2:3]"),  # its second row is padding alone
    ]
    found = count(step, None, BYTES)
    assert (found.num_micro_batches, found.num_rows, found.row_tokens) == (2, 4, 8)
    assert [piece.num_tokens for piece in found.documents] == [3, 2, 8, 3]
    assert (found.num_tokens, found.num_padding) == (16, 16)
    assert found.num_targets == 2 + 1 + 7 + 2
    assert found.num_behind == found.num_astray == 0
    assert found.sources == {
        "code/train": SourceCounts(num_documents=1, num_tokens=2, num_targets=1),
        "train": SourceCounts(num_documents=1, num_tokens=3, num_targets=2),
        "wiki/train": SourceCounts(num_documents=2, num_tokens=11, num_targets=9),
    }
    assert found.longest[0].provenance == "wiki/train[7:8]"
    assert found.lengths == [(2, 3, 3), (4, 7, 0), (8, 8, 1)]
    assert found.tokens_per_byte == 1.0


def test_a_target_that_is_not_the_next_token_is_counted() -> None:
    good = batch([["abc", "de"]], "train[0:2]")
    across, wrong = good.labels.clone(), good.labels.clone()
    across[0, 2] = ord("d")  # from the end of abc to the start of de
    wrong[0, 0] = ord("a")
    for labels in (across, wrong):
        bad = Batch(**vars(good) | {"labels": labels})
        assert count([bad], None, BYTES).num_astray == 1


def test_trained_is_the_token_that_is_predicted_not_the_position() -> None:
    (row,) = read_rows([batch([["abc", "de"]], "train[4:6]")], None, BYTES, 4)
    assert trained(row) == ["bc", "e", ""]
    assert [piece.provenance for piece, _ in row.pieces] == ["train[4:5]", "train[5:6]", ""]
    assert [piece.num_tokens for piece, _ in row.pieces] == [3, 2, 3]
    first = row.pieces[0][1][0]
    assert (first.token_id, first.target, first.position) == (ord("a"), ord("b"), 0)
    assert row.next_text is None


def test_the_target_behind_a_row_of_split_text_is_counted_and_shown(tmp_path: Path) -> None:
    rows = PackedRows(store_of(tmp_path, [20, 20]), row_tokens=16)  # "\0" * 20, then "\1" * 20
    made = rows.batch([0, 1, 2], 3)
    found = count([made], None, BYTES)
    assert found.num_targets == found.num_tokens - 2 == 42  # all but the two BOS
    assert (found.num_behind, found.num_astray) == (2, 0)
    first, second, third = read_rows([made], None, BYTES, 3)
    assert [row.next_text for row in (first, second, third)] == ["\0", "\1", None]
    assert trained(second) == [
        "\0" * 4 + EOS,
        "\1" * 9,
    ]  # a row's first is learnt in the one before
    assert second.pieces[1][1][0].text == BOS
    assert sum(len(tokens) for _, tokens in third.pieces) == 12


def test_of_a_conversation_the_words_and_end_marks_of_the_assistant_are_trained(
    tmp_path: Path,
) -> None:
    tokens = tokenizer(tmp_path, CHATML)
    example = ChatEncoder().encode({"messages": TURNS}, tokens)
    assert example.labels is not None
    shape = (1, len(example.input_ids))
    made = Batch(
        input_ids=torch.from_numpy(example.input_ids).view(shape),
        labels=torch.from_numpy(example.labels).view(shape),
        position_ids=torch.arange(shape[1]).view(shape),
        segment_ids=torch.ones(shape, dtype=torch.int64), provenance=("train[0:1]",),
    )  # fmt: skip
    (row,) = read_rows([made], None, tokens, 1)
    assert trained(row) == ["Hello!<|im_end|>Fine, \u4e16\u754c\n<|im_end|>"]
    whole = "".join(token.text for token in row.pieces[0][1])
    assert whole.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert count([made], None, tokens).num_targets == example.num_targets


def test_the_class_of_a_word_stands_on_its_own_token() -> None:
    labels = torch.full((1, 8), IGNORED)
    labels[0, 1], labels[0, 3] = 1, 0
    step = [batch([["abcd"]], "train[0:1]", labels=labels)]
    (row,) = read_rows(step, WORDS, BYTES, 1)
    named = {token.text: token.label for token in row.pieces[0][1]}
    assert named == {"a": None, "b": "PER", "c": None, "d": "O"}
    assert trained(row) == ["bd", ""]
    found = count(step, WORDS, BYTES)
    assert found.classes == Counter(PER=1, O=1)
    assert (found.num_targets, found.num_astray) == (2, 0)


@pytest.mark.parametrize(
    ("problem_type", "targets", "answers", "classes"),
    [
        ("single_label_classification", [1, IGNORED], [("good",), ()], {"good": 1}),
        (
            "multi_label_classification",
            [[1.0, 1.0], [0.0, math.nan]],
            [("bad", "good"), ()],
            {"bad": 1, "good": 1},
        ),
        ("regression", [[0.5, math.nan], [2.0, 3.0]], [("bad=0.5",), ("bad=2", "good=3")], {}),
    ],
)
def test_the_answers_of_documents_are_named(
    problem_type: str, targets: list[Any], answers: list[tuple[str, ...]], classes: dict[str, int]
) -> None:
    labels = Labels(names=("bad", "good"), problem_type=problem_type)
    none = torch.full((1, 8), IGNORED)
    made = batch([["abc", "de"]], "train[0:2]", labels=none, class_labels=torch.tensor([targets]))
    found = count([made], labels, BYTES)
    assert [piece.answers for piece in found.documents] == answers
    assert found.classes == Counter(classes)
    assert found.num_targets == sum(piece.num_targets for piece in found.documents)
    (row,) = read_rows([made], labels, BYTES, 1)
    assert trained(row) == ["", "", ""]


def test_where_an_empty_document_hides_which_is_which_the_whole_row_is_named() -> None:
    found = count([batch([["abc", "de"]], "train[0:3]")], None, BYTES)
    assert [piece.provenance for piece in found.documents] == ["train[0:3]"] * 2


def test_tokens_that_share_a_character_say_it_once() -> None:
    ids = [BYTES.bos_token_id, *"a\u00e9\U0001f600z".encode(), 0xFF, *b"b"]
    assert spell(ids, BYTES) == [
        BOS, "a", "\u00e9", "", "\U0001f600", "", "", "", "z", "\ufffd", "b",
    ]  # fmt: skip
    assert spell([0xC3, BYTES.eos_token_id], BYTES) == ["\ufffd", EOS]


def test_spelt_tokens_are_the_text_where_a_decoder_strips_the_first_space(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"\u2581a": 0, "\u2581b": 1, "c": 2, "<unk>": 3}
    fast = Tokenizer(models.Unigram([(word, -1.0) for word in vocab], unk_id=3))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast.save(str(tmp_path / "tokenizer.json"))
    tokens = FileTokenizer(tmp_path)
    assert spell(tokens.encode("a bc a"), tokens) == ["a", " b", "c", " a"]
