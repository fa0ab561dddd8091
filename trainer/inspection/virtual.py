"""How virtual tokens are shown to people: they stand for no text."""

from collections.abc import Sequence

from trainer.data.spelling import Speller


class WithVirtualTokens:
    """Spells virtual tokens by number, as special ones, and all else as the tokenizer does."""

    def __init__(self, tokenizer: Speller, virtual_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._virtual = {n: f"<|virtual_{k}|>" for k, n in enumerate(virtual_ids, start=1)}
        self.special_ids = tokenizer.special_ids | self._virtual

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, in which virtual tokens have no part."""
        return self._tokenizer.decode([n for n in ids if n not in self._virtual])
