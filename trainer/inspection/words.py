"""Rows with their words: what each token says, and whether the model learns to write it."""

from collections.abc import Sequence
from dataclasses import dataclass

from models.nn.head import IGNORED
from trainer.batch import Batch
from trainer.data.examples import Labels
from trainer.data.images.tokens import FAKE, IMAGE
from trainer.data.spelling import Speller, spell
from trainer.data.tokens import TokenStore
from trainer.inspection.images import SeenImage, images_of, looks_of
from trainer.inspection.pieces import Piece, pieces_of


@dataclass(frozen=True, kw_only=True)
class SeenToken:
    """One token, as a person asks about it."""

    token_id: int
    text: str
    """What it adds to the text; empty where it shares a character with the one before."""
    position: int
    """In its segment."""
    target: int | None
    """What its position is to answer: the next token, or a class; None: nothing."""
    label: str | None
    """The name of that class."""
    looks: tuple[int, ...]
    """Numbers, from 1, of the row's images that it looks at."""
    is_special: bool
    is_trained: bool
    """Whether the model learns to write it; where tokens have labels, whether this one has."""


def stands_for_image(token: SeenToken) -> bool:
    """Whether it is the place of an image."""
    return token.is_special and token.text == IMAGE and bool(token.looks)


def is_around(token: SeenToken) -> bool:
    """Whether it is one of the two tokens around an image."""
    return token.is_special and token.text == FAKE


@dataclass(frozen=True, kw_only=True)
class SeenRow:
    """A row with its words."""

    number: int
    """From 1, through the step."""
    micro_batch: int
    """From 1."""
    pieces: Sequence[tuple[Piece, list[SeenToken]]]
    """Padding has no tokens."""
    next_text: str | None
    """The token behind the row, where the row's last position is to predict it."""
    images: Sequence[SeenImage]

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece, _ in self.pieces if not piece.is_padding)


def read_rows(
    batches: list[Batch],
    labels: Labels | None,
    tokenizer: Speller,
    num_rows: int,
    store: TokenStore | None = None,
) -> list[SeenRow]:
    """Return the first rows of a step with their words.

    `labels` are those of the data; `store`, where its documents come from, knows files of images.
    """
    places = [
        (number, row)
        for number, batch in enumerate(batches, start=1)
        for row in range(batch.num_rows)
    ]
    rows = []
    for number, (micro_batch, row) in enumerate(places[:num_rows], start=1):
        batch = batches[micro_batch - 1]
        pieces = pieces_of(batch, row, labels)
        last = int(batch.labels[row, -1])
        seen = SeenRow(
            number=number, micro_batch=micro_batch,
            pieces=[(piece, _tokens(batch, row, piece, labels, tokenizer)) for piece in pieces],
            next_text=spell([last], tokenizer)[0] if labels is None and last != IGNORED else None,
            images=images_of(batch, row, pieces, store),
        )  # fmt: skip
        rows.append(seen)
    return rows


def _tokens(
    batch: Batch, row: int, piece: Piece, labels: Labels | None, tokenizer: Speller
) -> list[SeenToken]:
    if piece.is_padding:
        return []
    run = slice(piece.start, piece.stop)
    ids, targets = batch.input_ids[row, run].tolist(), batch.labels[row, run].tolist()
    looks = looks_of(batch, row, run)
    positions, texts = batch.position_ids[row, run].tolist(), spell(ids, tokenizer)
    has_target = [target != IGNORED for target in targets]
    # The target of a text stands one place before the token that is learnt.
    is_trained = has_target if labels else [False, *has_target[:-1]]
    return [
        SeenToken(
            token_id=token,
            text=texts[n],
            position=positions[n],
            target=targets[n] if has_target[n] else None,
            label=labels.names[targets[n]] if labels and has_target[n] else None,
            looks=looks[n],
            is_special=token in tokenizer.special_ids,
            is_trained=is_trained[n],
        )
        for n, token in enumerate(ids)
    ]
