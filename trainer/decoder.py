"""A batch of prompts that grows: what is read at each step, and what a cache keeps of the rest."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.nn.cache import Cache, GrowingCache, StaticCache
from models.nn.head import IGNORED
from trainer.batch import Batch

CACHES = ("growing", "static", "none")
NextLogits = Callable[[Batch, Cache | None], Tensor]
"""Returns the (B, V) logits of what follows each row, of which the cache holds the beginning."""


class PromptImages(NamedTuple):
    """Images of prompts, which are padded on the left."""

    pixel_values: Tensor
    """(B, I, C, height, width)."""
    image_attention_mask: Tensor
    """(B, T, I) int64, 1 where a position may look at an image."""

    def repeated(self, row: int, length: int, times: int) -> "PromptImages":
        """Return those of one prompt, of so many tokens, for a batch of it alone."""
        pixels, mask = self.pixel_values[row], self.image_attention_mask[row, -length:]
        return PromptImages(*(each.expand(times, *each.shape) for each in (pixels, mask)))


class Decoder:
    """A batch of sequences that grows by one token per row and call, padded on the left."""

    def __init__(
        self,
        next_logits: NextLogits,
        prompts: list[list[int]],
        cache: Cache | None,
        device: torch.device,
    ) -> None:
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(p)) + p for p in prompts]
        real = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        self.next_logits, self.cache = next_logits, cache
        self.ids = torch.tensor(padded, device=device)
        self.segment_ids = torch.tensor(real, device=device)
        self.pixels: Tensor | None = None
        self.image_mask: Tensor | None = None

    def show(self, pixel_values: Tensor, image_attention_mask: Tensor) -> None:
        """Give the prompts (B, I, ..) images, and say which of them each token may look at.

        New tokens look where the last one of the prompt does, as in transformers.
        """
        self.pixels, self.image_mask = pixel_values, image_attention_mask

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Return the (B, V) logits of what follows."""
        return self.next_logits(self.unread(), self.cache)

    def unread(self) -> Batch:
        """Return what no pass has seen yet, or all of it where nothing is kept."""
        is_first = self.cache is None or self.cache.length == 0
        start = 0 if is_first else self.ids.shape[1] - 1
        positions = (self.segment_ids.cumsum(1) - 1).clamp(min=0)
        ids, mask = self.ids[:, start:], self.image_mask
        return Batch(
            input_ids=ids,
            labels=torch.full_like(ids, IGNORED),
            position_ids=positions[:, start:],
            segment_ids=self.segment_ids[:, start:],
            pixel_values=self.pixels if is_first else None,
            image_attention_mask=None if mask is None else mask[:, start:],
            provenance=(),
        )

    def append(self, tokens: list[int]) -> None:
        """Add one id to every row."""
        next_ids = torch.tensor(tokens, device=self.ids.device)[:, None]
        self.ids = torch.cat((self.ids, next_ids), dim=1)
        ones = torch.ones_like(next_ids)
        self.segment_ids = torch.cat((self.segment_ids, ones), dim=1)
        if self.image_mask is not None:
            self.image_mask = torch.cat((self.image_mask, self.image_mask[:, -1:]), dim=1)

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        self.ids, self.segment_ids = self.ids[rows], self.segment_ids[rows]
        if self.image_mask is not None and self.pixels is not None:
            self.image_mask, self.pixels = self.image_mask[rows], self.pixels[rows]
        if self.cache is not None:
            self.cache.reorder(rows)


def decoder_of(
    model: Any,
    prompts: list[list[int]],
    cache: str,
    max_length: int,
    images: PromptImages | None = None,
) -> Decoder:
    """Return a Decoder over a whole model on one device; `max_length` tokens with the new ones."""

    def next_logits(batch: Batch, cache: Cache | None) -> Tensor:
        extra = {} if cache is None else {"cache": cache}
        logits_B1V: Tensor = model(*batch.text, logits_to_keep=1, **extra, **batch.images)
        return logits_B1V[:, 0]

    device = next(model.parameters()).device
    decoder = Decoder(next_logits, prompts, _cache(cache, model, max_length), device)
    if images is not None:
        decoder.show(*(each.to(device) for each in images))
    return decoder


def _cache(kind: str, model: Any, max_length: int) -> Cache | None:
    if kind == "none":
        return None
    num_layers = model.trunk.num_cached_layers
    return GrowingCache(num_layers) if kind == "growing" else StaticCache(num_layers, max_length)
