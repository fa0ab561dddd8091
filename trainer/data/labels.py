"""Label names and their indices, for sequences and for tokens."""

import math
from collections.abc import Iterable
from typing import Any

from trainer.data.examples import PREFERENCE, BadRowError, Labels
from trainer.data.tokenizers import Tokenizer
from trainer.near_names import did_you_mean

_MAX_FOUND = 1000  # more different values are no labels


def found_labels(rows: Iterable[dict[str, Any]], column: str) -> tuple[str, ...]:
    """Return the labels that occur in `column`, alone or in lists: integers by size, else sorted.

    Of vectors (lists of 0 and 1) the places are the labels: ask for those only by name. ValueError
    for a column of something else: numbers that are not whole, or very many values.
    """
    names: set[str] = set()
    for row in rows:
        value = row.get(column)
        for item in value if isinstance(value, list | tuple) else [value]:
            if is_missing(item):
                continue
            if isinstance(item, float) and not item.is_integer():
                raise ValueError(
                    f"column {column!r} holds {item}, which is no label; "
                    "set data.encoder.problem_type=regression"
                )
            names.add(_name(item))
        if len(names) > _MAX_FOUND:
            raise ValueError(
                f"column {column!r} holds more than {_MAX_FOUND} different values, such as "
                f"{min(names)!r}; set data.encoder.labels, or another column"
            )
    return tuple(sorted(names, key=int if all(map(_is_number, names)) else str))


def label_index(value: Any, labels: tuple[str, ...]) -> int:
    """Return the index of a name, or of an integer; BadRowError for none of `labels`.

    Where all names are integers, an integer is a name; otherwise it is an index already.
    """
    name = _name(value)
    if name in labels:
        return labels.index(name)
    is_index = _is_number(name) and not isinstance(value, str) and not all(map(_is_number, labels))
    if is_index and 0 <= int(name) < len(labels):
        return int(name)
    hint = did_you_mean(name, labels)
    raise BadRowError(
        f"label {value!r} is unknown; {hint}Known: {', '.join(labels)}; correct the row, or set "
        "data.encoder.labels to all of them"
    )


def is_missing(value: Any) -> bool:
    """Whether a label is null, or NaN, which tables make of it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def label_keys(labels: Labels | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what config.json says of the labels, so that transformers answers with their names.

    It finds the end of a text by the padding token: one that texts do not end with.
    """
    if labels is None or not labels.names:
        return {}
    keys: dict[str, Any] = {
        "id2label": {str(index): name for index, name in enumerate(labels.names)},
        "label2id": {name: index for index, name in enumerate(labels.names)},
    }
    if labels.problem_type is not None:
        is_number = labels.problem_type == PREFERENCE  # to transformers, a reward is one
        keys["problem_type"] = "regression" if is_number else labels.problem_type
        keys["pad_token_id"] = tokenizer.pad_token_id
    return keys


def check_labels(labels: tuple[str, ...] | None, minimum: int) -> None:
    """Raise ValueError for names that occur twice, or too few of them."""
    if labels is None:
        return
    if len(set(labels)) < len(labels):
        twice = next(name for name in labels if labels.count(name) > 1)
        raise ValueError(f"labels holds {twice!r} twice; name each label once")
    if len(labels) < minimum:
        raise ValueError(f"labels has {len(labels)} names; needed {minimum} or more")


def column_of(row: dict[str, Any], column: str, setting: str, where: str) -> Any:
    """Return the value of a first row's column; ValueError where there is none."""
    if column in row:
        return row[column]
    hint = did_you_mean(column, row)
    raise ValueError(
        f"{where} has no column {column!r}, only {', '.join(sorted(row))}; {hint}set "
        f"data.encoder.{setting} to one of them"
    )


def _name(value: Any) -> str:
    """Return a label's name; 1.0, which tables with gaps make of 1, is 1."""
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if is_whole else str(value)


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
