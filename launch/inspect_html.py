"""A step as one HTML file; point at a token for all that is known of it."""

from html import escape
from itertools import chain
from typing import Any

from launch.inspect_page import NUM_COLOURS, style_of
from launch.inspect_report import Report, seen_images
from launch.visible_text import visible, visible_ends
from trainer.data.images.tokens import FAKE
from trainer.inspection.images import SeenImage
from trainer.inspection.pieces import Piece
from trainer.inspection.words import SeenRow, SeenToken, is_around, stands_for_image
from trainer.page import image, page, table, terms

SIDE = 192  # pixels of an image on the page: as large as it becomes when it is pointed at


def batch_page(report: Report) -> str:
    """Return the whole file."""
    body = [
        terms(report.facts()),
        _legend(report),
        f'<div class="tables">{"".join(table(*one) for one in report.tables())}</div>',
        *(_row(row, report) for row in report.rows),
    ]
    most = max((len(row.images) for row in report.rows), default=0)
    return page(report.title, style=style_of(most), body="\n".join(body))


def _legend(report: Report) -> str:
    about_images = ""
    if report.row_images is not None:
        about_images = (
            "<br>the line below a token has the colour of the image that it looks at; point at "
            "either to see the other; "
            f'<span class="t s around">{escape(FAKE)}</span> stands around each'
        )
    return (
        f'<p class="legend">{escape(report.legend("green"))}<br>'
        '<span class="t s">special token</span>, &#8629; line break, &#8677; tab; '
        f"hover over a token for its id, position, segment and target{about_images}</p>"
    )


def _row(row: SeenRow, report: Report) -> str:
    pieces = "".join(_piece(piece, tokens, row, report) for piece, tokens in row.pieces)
    behind = ""
    if row.next_text is not None:
        token = f'<span class="t y">{escape(visible_ends(row.next_text))}</span>'
        behind = f'<p class="note">behind the row, predicted by its last token: {token}</p>'
    return (
        f"<section><h2>row {row.number} of {report.counts.num_rows} "
        f"<small>micro-batch {row.micro_batch}</small> <small>{escape(report.filling(row))}</small>"
        f"</h2>{_strip(row)}{pieces}{behind}</section>"
    )


def _strip(row: SeenRow) -> str:
    """Return the row as it lies in memory: its documents side by side, and what stays empty."""
    parts = []
    for piece, _ in row.pieces:
        kind, name = "full", f"{piece.segment} {piece.provenance}"
        if piece.is_padding:
            kind, name = "pad", "padding"
        parts.append(
            f'<span class="{kind}" style="flex: {piece.num_tokens}" '
            f'title="{escape(name)}: {piece.num_tokens:,} tokens">{piece.segment or ""}</span>'
        )
    return f'<div class="strip">{"".join(parts)}</div>'


def _piece(piece: Piece, tokens: list[SeenToken], row: SeenRow, report: Report) -> str:
    if piece.is_padding:
        return f'<p class="note">... {piece.num_tokens:,} padding</p>'
    targets = "" if report.is_of_texts else f", {piece.num_targets:,} targets"
    looks = f", {seen}" if (seen := seen_images(tokens, row)) else ""
    answers = "".join(f' <b class="l">{escape(answer)}</b>' for answer in piece.answers)
    words = "".join(
        chain.from_iterable(_token(token, piece.segment, row, report) for token in tokens)
    )
    kind = "text" if report.is_of_texts else "text parts"
    return (
        f"<h3>{piece.segment} <code>{escape(piece.provenance)}</code> "
        f"{piece.num_tokens:,} tokens{targets}{escape(looks)}{answers}</h3>"
        f'<div class="{kind}">{words}</div>'
    )


def _token(token: SeenToken, segment: int, row: SeenRow, report: Report) -> list[str]:
    target = "none" if token.target is None else str(token.target)
    known = f"id {token.token_id}, position {token.position}, segment {segment}, target {target}"
    words, label = escape(visible(token.text)), ""
    if token.label is not None:
        known += f" ({token.label})"
        label = f'<b class="l">{escape(token.label)}</b>'
    if token.looks:
        known += f", looks at image {', '.join(map(str, token.looks))}"
    number = ""
    if stands_for_image(token):
        seen = row.images[token.looks[-1] - 1]
        known, number = f"{known} {seen.file}".rstrip(), f' data-number="{seen.number}"'
        words = _picture(seen, report)
    opened = f'<span class="{_classes(token)}" title="{escape(known)}"{number}>'
    return [f"{opened}{words}</span>", label]


def _classes(token: SeenToken) -> str:
    """Return how a token looks: trained, special, and by the images that it looks at."""
    colour = [f"c{(token.looks[-1] - 1) % NUM_COLOURS}"] if token.looks else []
    if stands_for_image(token):
        return " ".join(["image", f"p{token.looks[-1]}", *colour])
    kinds = {"t": True, "y": token.is_trained, "s": token.is_special, "around": is_around(token)}
    found = [name for name, has in kinds.items() if has]
    if token.looks:
        found += ["v", *colour, *(f"v{number}" for number in token.looks)]
    return " ".join(found)


def _picture(seen: SeenImage, report: Report) -> str:
    # Any: of data with images alone, which the protocol does not tell apart.
    data: Any = report.run.data
    picture = data.processor.picture(seen.pixels.numpy())
    return image(picture, label=f"image {seen.number}", side=SIDE)
