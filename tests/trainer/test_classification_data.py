"""Rows with labels: the document, the class or the numbers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.nn.head import IGNORED
from tests.chat_templates import tokenizer_folder
from trainer.data.classification import SequenceEncoder
from trainer.data.examples import BadRowError, Labels
from trainer.data.labels import found_labels, label_keys
from trainer.data.tokenizers import ByteTokenizer, FileTokenizer

MOODS = ("bad", "good", "so-so")
BYTES = ByteTokenizer()


def classes(value: Any, **settings: Any) -> Any:
    found = SequenceEncoder(**settings).encode({"text": "x", "label": value}, BYTES).classes
    assert found is not None
    return found


def test_a_document_is_its_text_with_its_class() -> None:
    example = SequenceEncoder(labels=MOODS).encode({"text": "abc", "label": "good"}, BYTES)
    assert example.input_ids.tolist() == [*b"abc"]
    assert example.labels is None
    assert example.classes is not None
    assert (example.classes.shape, example.classes.dtype, int(example.classes)) == ((), "int64", 1)
    assert example.num_targets == 1


@pytest.mark.parametrize(
    ("labels", "value", "index"),
    [
        (MOODS, "so-so", 2), (MOODS, 0, 0), (MOODS, 2.0, 2),
        (("-1", "1"), -1, 0), (("-1", "1"), 1, 1), (("-1", "1"), "1", 1), (("1", "2"), 1.0, 0),
        (("False", "True"), True, 1),
    ],
)  # fmt: skip
def test_names_and_integers_become_indices(labels: tuple[str, ...], value: Any, index: int) -> None:
    assert int(classes(value, labels=labels)) == index


@pytest.mark.parametrize(
    ("labels", "value", "message"),
    [
        (MOODS, "godo", "label 'godo' is unknown; did you mean good"),
        (MOODS, 3, "label 3 is unknown"),
        (MOODS, -1, "label -1 is unknown"),
        (MOODS, "1", "label '1' is unknown"),
        (("1", "2", "3"), 0, "label 0 is unknown"),
        (MOODS, ["good"], "holds 1 labels, needed one"),
        (MOODS, None, "is null; give a label, or set data.encoder.allow_missing"),
    ],
)
def test_a_label_that_is_none_of_the_names_is_refused(
    labels: tuple[str, ...], value: Any, message: str
) -> None:
    with pytest.raises(BadRowError, match=message):
        classes(value, labels=labels)


def test_several_labels_are_a_vector() -> None:
    settings: dict[str, Any] = {
        "labels": MOODS,
        "problem_type": "multi_label_classification",
        "allow_missing": True,
    }
    for value in (["so-so", "bad"], [1, 0, 1], [True, False, True], [1.0, 0.0, 1.0]):
        assert classes(value, **settings).tolist() == [1, 0, 1]
    assert classes("good", **settings).tolist() == [0, 1, 0]
    assert classes([], **settings).tolist() == [0, 0, 0]
    assert classes([], **settings).dtype == np.float64
    assert np.isnan(classes(None, **settings)).all()
    np.testing.assert_array_equal(classes([1, None, 0], **settings), [1, np.nan, 0])
    for value, message in (
        ([1, 0], "2 numbers, needed 3: one for each of bad, good, so-so"),
        ([1, 2, 0], "2, needed 0, 1 or names"),
        (["meh"], "'meh' is unknown"),
        (["bad", 1, 0], "'bad', needed a number"),
    ):
        with pytest.raises(BadRowError, match=message):
            classes(value, **settings)


def test_numbers_are_kept_as_they_are() -> None:
    assert classes(2.5, problem_type="regression").tolist() == [2.5]
    two: dict[str, Any] = {"problem_type": "regression", "labels": ("x", "y")}
    assert classes([1, -2.5], **two).tolist() == [1.0, -2.5]
    with pytest.raises(BadRowError, match="1 numbers, needed 2"):
        classes(1.0, **two)
    with pytest.raises(BadRowError, match="'much', needed a number"):
        classes("much", problem_type="regression")
    with pytest.raises(BadRowError, match="is null"):
        classes(None, problem_type="regression")
    with pytest.raises(BadRowError, match="None, needed a number"):
        classes([1.0, None], **two)


def test_a_label_may_be_missing_where_that_is_said() -> None:
    example = SequenceEncoder(labels=MOODS, allow_missing=True).encode(
        {"text": "x", "label": None}, BYTES
    )
    assert example.classes is not None
    assert int(example.classes) == IGNORED
    assert example.num_targets == 0
    assert np.isnan(classes(None, problem_type="regression", allow_missing=True)).tolist() == [True]


def test_two_texts_are_joined_by_the_tokenizers_separator_or_a_new_line(tmp_path: Path) -> None:
    row = {"text": "ab", "other": "cd", "label": "bad"}
    encoder = SequenceEncoder(labels=MOODS, text_pair="other")
    assert encoder.encode(row, BYTES).input_ids.tolist() == [*b"ab\ncd"]
    tokenizer_folder(tmp_path, sep_token="<|user|>")
    tokens = FileTokenizer(tmp_path)
    special = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    (separator,) = (token["id"] for token in special if token["content"] == "<|user|>")
    ids = encoder.encode(row, tokens).input_ids.tolist()
    assert ids == [*b"ab", separator, *b"cd"]
    own = SequenceEncoder(labels=MOODS, text_pair="other", separator=" | ")
    assert own.encode(row, BYTES).input_ids.tolist() == [*b"ab | cd"]


def test_labels_are_found_in_the_data_by_name_or_by_size() -> None:
    rows = [{"y": value} for value in (10, 9, None, 10, -1)]
    assert found_labels(rows, "y") == ("-1", "9", "10")
    assert found_labels([{"y": ["b", "a"]}, {"y": ["c"]}, {"y": None}], "y") == ("a", "b", "c")
    assert found_labels([{"y": "10"}, {"y": "9"}, {"y": "x"}], "y") == ("10", "9", "x")


def test_what_is_no_label_is_not_found_as_one() -> None:
    with pytest.raises(ValueError, match=r"holds 0.5, which is no label; set .*=regression"):
        found_labels([{"y": 1}, {"y": 0.5}], "y")
    with pytest.raises(ValueError, match="more than 1000 different values, such as 'text 0'"):
        found_labels(({"y": f"text {n}"} for n in range(2000)), "y")
    vectors = SequenceEncoder(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="holds vectors of 0 and 1"):
        vectors.with_labels(lambda column: found_labels([{column: [0, 1]}], column))


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_a_text_has_the_special_tokens_that_transformers_gives_it(
    tmp_path: Path, template: str
) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    fast = word_level()
    special = [(token, fast.token_to_id(token)) for token in ("<s>", "</s>")]
    fast.post_processor = TemplateProcessing(single=template, special_tokens=special)
    fast.save(str(tmp_path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    example = SequenceEncoder(labels=MOODS).encode(
        {"text": "a b", "label": "bad"}, FileTokenizer(tmp_path)
    )
    assert example.input_ids.tolist() == theirs("a b")["input_ids"]
    assert len(example.input_ids) == len(template.split()) + 1


def word_level() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    fast = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens(["<s>", "</s>"])
    return fast


def test_config_json_names_the_labels_as_transformers_reads_them() -> None:
    from transformers import LlamaConfig

    keys = label_keys(Labels(names=MOODS, problem_type="single_label_classification"), BYTES)
    config = LlamaConfig(**json.loads(json.dumps(keys)))
    assert (config.num_labels, config.pad_token_id) == (3, BYTES.pad_token_id)
    assert config.problem_type == "single_label_classification"
    assert config.id2label == dict(enumerate(MOODS))
    assert config.label2id == {name: index for index, name in enumerate(MOODS)}


@pytest.mark.parametrize("text", ["", None, 3])
def test_a_row_without_text_is_refused(text: Any) -> None:
    with pytest.raises(BadRowError, match="column text holds"):
        SequenceEncoder(labels=MOODS).encode({"text": text, "label": "bad"}, BYTES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": ("one",)}, "labels has 1 names; needed 2"),
        ({"labels": ("a", "b", "a")}, "labels holds 'a' twice"),
        ({"separator": "|"}, "no effect without text_pair"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceEncoder(**settings)


def test_a_first_row_that_cannot_serve_is_refused() -> None:
    encoder = SequenceEncoder(labels=MOODS, text="txet")
    row = {"text": "x", "label": "bad"}
    with pytest.raises(
        ValueError, match=r"d.jsonl has no column 'txet', only label, text; did you"
    ):
        encoder.check(row, "d.jsonl")
    with pytest.raises(ValueError, match="problem_type=multi_label"):
        SequenceEncoder(labels=MOODS).check(row | {"label": ["bad"]}, "d.jsonl")
    with pytest.raises(ValueError, match=r"data\.encoder\.labels is not known yet"):
        SequenceEncoder().encode(row, BYTES)
    SequenceEncoder(labels=MOODS).check(row, "d.jsonl")
