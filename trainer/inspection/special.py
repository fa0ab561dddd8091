"""How tokens are shown to people that stand for no text: virtual ones, and those of images."""

from collections.abc import Sequence

from trainer.data.images.tokens import FAKE, IMAGE, image_tokens
from trainer.data.tokenizers import Tokenizer


class WithSpecialTokens:
    """Spells more tokens as special ones, and all else as the tokenizer does."""

    def __init__(
        self, tokenizer: Tokenizer, virtual_ids: Sequence[int], *, has_images: bool
    ) -> None:
        """`has_images`: whether the data has images, so that tokens stand for them."""
        self._tokenizer = tokenizer
        self._more = {n: f"<|virtual_{k}|>" for k, n in enumerate(virtual_ids, start=1)}
        if has_images:
            tokens = image_tokens(tokenizer)
            self._more |= {tokens.image: IMAGE, tokens.fake: FAKE}
        self.special_ids = tokenizer.special_ids | self._more

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, in which such tokens have no part."""
        return self._tokenizer.decode([n for n in ids if n not in self._more])
