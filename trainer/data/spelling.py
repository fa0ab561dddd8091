"""The text of each token of a row: what a person reads where the model sees ids."""

from typing import Protocol

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character
_MAX_BYTES = 4  # of a character in UTF-8, so the most tokens that share one


class Speller(Protocol):
    """What spelling needs of a tokenizer."""

    @property
    def special_ids(self) -> dict[int, str]: ...
    def decode(self, ids: list[int]) -> str: ...


def spell(ids: list[int], tokenizer: Speller) -> list[str]:
    """Return what each token adds to the text; special tokens as they are written.

    Of tokens that share a character the first has all of it, and the others are empty.
    """
    texts: list[str] = []
    before: list[int] = []  # decoded with: alone, a token of SentencePiece loses its first space
    while len(texts) < len(ids):
        start = len(texts)
        if ids[start] in tokenizer.special_ids:
            texts.append(tokenizer.special_ids[ids[start]])
            before = []
            continue
        text, count = _character(ids[start : start + _MAX_BYTES], before, tokenizer)
        texts += [text, *[""] * (count - 1)]
        before = ids[start : start + count]
    return texts


def _character(ids: list[int], before: list[int], tokenizer: Speller) -> tuple[str, int]:
    """Return the text of the first token, and how many tokens there are to its last character."""
    known = len(tokenizer.decode(before))
    texts = (tokenizer.decode([*before, *ids[:n]])[known:] for n in range(1, len(ids) + 1))
    first = next(texts)
    if not first.endswith(_REPLACEMENT):
        return first, 1
    for count, text in enumerate(texts, start=2):
        if ids[count - 1] in tokenizer.special_ids:
            break
        if _REPLACEMENT not in text:
            return text, count
    return first, 1
