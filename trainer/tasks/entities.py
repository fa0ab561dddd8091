"""Entities out of tags B-X, I-X, O, and how many of them were found.

An entity begins at B-X, and at an I-X whose predecessor is of no or another type, so that tags that
break the scheme still count. Source: conlleval (CoNLL-2000), as in seqeval's default mode.
"""

from collections.abc import Iterator

import numpy as np


def is_tagging(names: tuple[str, ...]) -> bool:
    """Whether labels are tags of entities: O and B-X or I-X, nothing else."""
    return "O" in names and len(names) > 1 and all(n == "O" or n[:2] in ("B-", "I-") for n in names)


def entities(tags: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield type, first word and the word behind the last of every entity of a document."""
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        own = "" if tag == "O" else tag[2:]
        if kind and (own != kind or tag.startswith("B-")):
            yield kind, start, place
            kind = ""
        if own and not kind:
            start, kind = place, own


def entity_scores(
    documents: np.ndarray, truth: np.ndarray, guess: np.ndarray, names: tuple[str, ...]
) -> dict[str, float]:
    """Return precision, recall and F1 over all entities; one is right when type and words are.

    (n,) each, a document's words in a row.
    """
    borders = np.flatnonzero(np.diff(documents)) + 1
    num_true = num_guessed = num_right = 0
    for own_truth, own_guess in zip(
        np.split(truth, borders), np.split(guess, borders), strict=True
    ):
        true = set(entities([names[k] for k in own_truth]))
        guessed = set(entities([names[k] for k in own_guess]))
        num_true, num_guessed = num_true + len(true), num_guessed + len(guessed)
        num_right += len(true & guessed)
    precision = num_right / num_guessed if num_guessed else 0.0
    recall = num_right / num_true if num_true else 0.0
    both = precision + recall
    f1 = 2 * precision * recall / both if both else 0.0
    return {"entity_precision": precision, "entity_recall": recall, "entity_f1": f1}
