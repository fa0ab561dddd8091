"""A step as one HTML file that needs nothing else; hover over a token for all that is known."""

from html import escape
from itertools import chain

from launch.inspect_page import PAGE
from launch.inspect_report import Report, Table
from launch.visible_text import visible, visible_ends
from trainer.inspection.pieces import Piece
from trainer.inspection.words import SeenRow, SeenToken


def page(report: Report) -> str:
    """Return the whole file."""
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report.facts().items()
    )
    return PAGE.substitute(
        title=escape(report.title),
        legend=escape(report.legend("green")),
        facts=facts,
        tables="".join(map(_table, report.tables())),
        rows="".join(_row(row, report) for row in report.rows),
    )


def _table(table: Table) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    return (
        f"<table><caption>{escape(table.title)}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>"
    )


def _row(row: SeenRow, report: Report) -> str:
    pieces = "".join(_piece(piece, tokens, report) for piece, tokens in row.pieces)
    behind = ""
    if row.next_text is not None:
        token = f'<span class="t y">{escape(visible_ends(row.next_text))}</span>'
        behind = f'<p class="note">behind the row, predicted by its last token: {token}</p>'
    return (
        f"<section><h2>row {row.number} of {report.counts.num_rows} "
        f"<small>micro-batch {row.micro_batch}</small></h2>{pieces}{behind}</section>"
    )


def _piece(piece: Piece, tokens: list[SeenToken], report: Report) -> str:
    if piece.is_padding:
        return f'<p class="note">... {piece.num_tokens:,} padding</p>'
    targets = "" if report.is_of_texts else f", {piece.num_targets:,} targets"
    answers = "".join(f' <b class="l">{escape(answer)}</b>' for answer in piece.answers)
    words = "".join(chain.from_iterable(_token(token, piece.segment) for token in tokens))
    kind = "text" if report.is_of_texts else "text parts"
    return (
        f"<h3>{piece.segment} <code>{escape(piece.provenance)}</code> "
        f"{piece.num_tokens:,} tokens{targets}{answers}</h3>"
        f'<div class="{kind}">{words}</div>'
    )


def _token(token: SeenToken, segment: int) -> list[str]:
    classes = "t" + " y" * token.is_trained + " s" * token.is_special
    target = "none" if token.target is None else str(token.target)
    known = f"id {token.token_id}, position {token.position}, segment {segment}, target {target}"
    words, label = escape(visible(token.text)), ""
    if token.label is not None:
        known += f" ({token.label})"
        label = f'<b class="l">{escape(token.label)}</b>'
    return [f'<span class="{classes}" title="{escape(known)}">{words}</span>', label]
