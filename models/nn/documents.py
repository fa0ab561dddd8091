"""Which documents a batch holds, and how they are laid out apart: those of like length together."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.nn.runs import are_contiguous, is_read, side_of
from models.nn.segments import Segments, has_values_here

TILE = 32  # queries that torch's attention on a CPU takes at once: a part of it costs as much


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of a batch as tensors whose shapes depend on B and T alone.

    So compiled blocks see no other graph for other documents. The documents are laid out one behind
    the other, the shortest first, each padded to one of `padded_lengths`: what is computed for a
    document depends on its own length and the row's, never on its neighbours'.
    """

    tokens: Tensor
    """(2 * B * T,) which token stands at each place, for padding the document's last (int64)."""
    places: Tensor
    """(B * T,) where each token is laid out; -1: padding of the batch, which nothing computes."""
    sizes: Tensor
    """How many tokens are no padding, then how many documents have each padded length (int64)."""
    causal: bool


def documents_of(segments: Segments) -> Documents | None:
    """Return the documents of a batch of (B, T) tokens on a CPU.

    None where documents do not say who may look at whom: across attention, behind a cache, and
    where a segment is not contiguous in its row; and on other devices.
    """
    if not segments.is_self or segments.query.device.type != "cpu":
        return None
    if not has_values_here(segments.query):
        return _shapes_alone(segments)
    side, length = side_of(segments.query), segments.query.shape[1]
    if not are_contiguous(side):
        return None
    starts, is_document = side.counts.cumsum(0) - side.counts, is_read(side.codes)
    lengths = torch.tensor(padded_lengths(length, causal=segments.causal))
    kinds = torch.searchsorted(lengths, side.counts[is_document])
    order = kinds.argsort(stable=True)
    starts, counts = starts[is_document][order], side.counts[is_document][order]
    padded = lengths[kinds[order]]
    firsts = (padded.cumsum(0) - padded).repeat_interleave(padded)
    offsets = torch.arange(len(firsts)) - firsts
    lasts = (counts - 1).repeat_interleave(padded)
    found = starts.repeat_interleave(padded) + offsets.minimum(lasts)
    tokens = torch.zeros(2 * segments.query.numel(), dtype=torch.int64)
    tokens[: len(found)] = found
    places = torch.full((segments.query.numel(),), -1)
    is_token = offsets <= lasts
    places[found[is_token]] = is_token.nonzero().flatten()
    sizes = torch.cat((counts.sum()[None], kinds.bincount(minlength=len(lengths))))
    return Documents(tokens=tokens, places=places, sizes=sizes, causal=segments.causal)


def _shapes_alone(segments: Segments) -> Documents:
    """Return what documents that have no values look like, for plans."""
    count, length = segments.query.numel(), segments.query.shape[1]
    lengths = padded_lengths(length, causal=segments.causal)
    tokens, places, sizes = (
        segments.query.new_empty(size, dtype=torch.int64)
        for size in (2 * count, count, 1 + len(lengths))
    )
    return Documents(tokens=tokens, places=places, sizes=sizes, causal=segments.causal)


def padded_lengths(length: int, *, causal: bool) -> list[int]:
    """Return what documents of at most `length` tokens are padded to, less than twice their length.

    Under a causal mask padding behind a document changes nothing in it; else there is none.
    """
    if not causal:
        return list(range(1, length + 1))
    short = [1 << n for n in range(TILE.bit_length() - 1)]
    return [each for each in (*short, *range(TILE, length, TILE)) if each < length] + [length]


@dataclass(frozen=True)
class Layout:
    """Moves tensors of a batch between its rows and groups of documents of one length."""

    tokens: Tensor
    places: Tensor
    rows: int
    num_tokens: int
    groups: list[tuple[int, int]] = field(default_factory=list)
    """Documents and their padded length, the shortest first."""

    @staticmethod
    def of(tokens: Tensor, places: Tensor, sizes: Tensor, *, rows: int, causal: bool) -> "Layout":
        """Read the fields of Documents, for a batch of so many rows."""
        num_tokens, *counts = sizes.tolist()
        lengths = padded_lengths(len(places) // rows, causal=causal)
        groups = [pair for pair in zip(counts, lengths, strict=True) if pair[0]]
        num_places = sum(count * length for count, length in groups)
        return Layout(tokens[:num_places], places, rows, num_tokens, groups)

    @property
    def is_in_order(self) -> bool:
        """Whether the rows are documents of one length, end to end: nothing has to be moved."""
        return len(self.groups) == 1 and len(self.tokens) == self.num_tokens == len(self.places)

    def apart(self, x_BNTH: Tensor, *, is_gradient: bool = False) -> list[Tensor]:
        """Return (documents, N, length, H) of each group. A gradient is 0 where padding stands."""
        x_BTNH = x_BNTH.transpose(1, 2)
        heads = x_BTNH.shape[2:]
        if self.is_in_order:
            return [x_BTNH.reshape(*self.groups[0], *heads).transpose(1, 2)]
        laid_out = x_BTNH.flatten(0, 1).flatten(1).index_select(0, self.tokens)
        if is_gradient:
            is_padding = self.places[self.tokens] != torch.arange(len(self.tokens))
            laid_out.index_fill_(0, is_padding.nonzero()[:, 0], 0.0)
        parts = laid_out.split([count * length for count, length in self.groups])
        return [
            part.view(*group, *heads).transpose(1, 2)
            for part, group in zip(parts, self.groups, strict=True)
        ]

    def together(self, groups: list[Tensor], like_BNTH: Tensor) -> Tensor:
        """Undo `apart`: (B, N, T, ..) with heads side by side in memory, 0 for padding."""
        batch, heads, length, *sizes = like_BNTH.shape
        if not groups:
            return like_BNTH.new_zeros(batch, length, heads, *sizes).transpose(1, 2)
        flat = torch.cat([x.transpose(1, 2).flatten(0, 1).flatten(1) for x in groups])
        if not self.is_in_order:
            flat = flat.index_select(0, self.places.clamp(min=0))
            if self.num_tokens < len(self.places):
                flat.index_fill_(0, (self.places < 0).nonzero()[:, 0], 0.0)
        return flat.view(batch, length, heads, *sizes).transpose(1, 2)
