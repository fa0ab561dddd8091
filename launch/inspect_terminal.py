"""A step in the terminal: by colours where there are some, by brackets where there are none."""

from itertools import groupby

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from launch.inspect_report import Report, Table, seen_images
from launch.visible_text import LINE_BREAK, SPACE, TAB, visible, visible_ends
from trainer.data.images.tokens import FAKE
from trainer.inspection.pieces import Piece
from trainer.inspection.words import SeenRow, SeenToken, is_around, stands_for_image

OPEN, CLOSE = "\u27e6", "\u27e7"  # white square brackets: no text has them
AROUND = "\u25ab"  # in place of the long name of the token around images
TRAINED, READ, LABEL = "bold green", "dim", "bold cyan"


def show(report: Report, console: Console) -> None:
    """Print facts, rows and tables."""
    console.print(Text(report.title, "bold"))
    _show_facts(console, report)
    for row in report.rows:
        _show_row(console, row, report)
    for table in report.tables():
        _show_table(console, table)


def _has_marks(console: Console) -> bool:
    """Whether brackets stand in for colours: in a pipe, a file, under NO_COLOR."""
    return console.no_color or console.color_system is None


def _show_facts(console: Console, report: Report) -> None:
    grid = Grid.grid(padding=(0, 2))
    for name, text in report.facts().items():
        grid.add_row(Text(name, "bold"), Text(text))
    console.print(grid)
    mark = f"{OPEN} {CLOSE}" if _has_marks(console) else "green"
    console.print(Text(report.legend(mark), READ))
    console.print(Text(f"{LINE_BREAK} line break, {TAB} tab, {SPACE} space at an end", READ))
    if report.row_images is not None:
        console.print(
            Text(f"<image 3> the third image of the row, {AROUND} {FAKE} beside it", READ)
        )


def _show_row(console: Console, row: SeenRow, report: Report) -> None:
    has_marks = _has_marks(console)
    console.print()
    place = f"row {row.number} of {report.counts.num_rows}, micro-batch {row.micro_batch}"
    console.print(Text(place, "bold") + Text(f"  {report.filling(row)}", READ))
    for piece, tokens in row.pieces:
        if piece.is_padding:
            console.print(Text(f"... {piece.num_tokens:,} padding", READ))
            continue
        _show_head(console, _heading(piece, report), seen_images(tokens, row))
        console.print(_text(tokens, "" if report.is_of_texts else READ, has_marks))
    if row.next_text is not None:
        console.print(Text("behind the row: ", READ) + _trained(row.next_text, has_marks))


def _show_head(console: Console, heading: Text, looks: str) -> None:
    """Print a line with the heading and who looks at which image; two where it is too long."""
    joined = f", {looks}" if looks else ""
    has_room = len(heading) + len(joined) < console.width - 2
    heading.append(joined if has_room else "")
    console.rule(heading, align="left", style=READ, characters="\u2500")
    if joined and not has_room:
        console.print(Text(f"   {looks}", READ))


def _heading(piece: Piece, report: Report) -> Text:
    text = Text(f"{piece.segment}  {piece.provenance}  {piece.num_tokens:,} tokens")
    if not report.is_of_texts:
        text.append(f", {piece.num_targets:,} targets")
    for answer in piece.answers:
        text.append(f"  {OPEN}{answer}{CLOSE}", LABEL)
    return text


def _text(tokens: list[SeenToken], read: str, has_marks: bool) -> Text:
    """Return the words of a document; what is learnt stands out."""
    text = Text()
    # Between words with classes, a dot for each space would hide where a line may break.
    shown = visible if any(token.label is not None for token in tokens) else visible_ends
    # A token with a label is a run of its own.
    for (is_trained, _), group in groupby(
        tokens, key=lambda token: (token.is_trained, token.label and token.position)
    ):
        run = list(group)
        is_marked = has_marks and is_trained and run[0].label is None
        text.append(OPEN if is_marked else "", TRAINED)
        for is_special, part in groupby(run, key=lambda token: token.is_special):
            words = shown("".join(map(_spelled, part)))
            style = TRAINED if is_trained else read
            text.append(words, f"{style} underline" if is_special else style)
        text.append(CLOSE if is_marked else "", TRAINED)
        if run[0].label is not None:
            text.append(f"{OPEN}{run[0].label}{CLOSE}", LABEL)
    if text.plain.endswith("\n"):
        text.right_crop(1)  # printing ends the line
    return text


def _spelled(token: SeenToken) -> str:
    """Return what a token says; those of an image say which one of the row it is, in short."""
    if stands_for_image(token):
        return f"<image {token.looks[-1]}>"
    return AROUND if is_around(token) else token.text


def _trained(text: str, has_marks: bool) -> Text:
    marks = (OPEN, CLOSE) if has_marks else ("", "")
    return Text(visible_ends(text).join(marks), TRAINED)


def _show_table(console: Console, table: Table) -> None:
    grid = Grid(box=None, padding=(0, 2, 0, 0))
    for head in table.heads[:-1]:
        grid.add_column(head, justify="right", header_style=READ)
    grid.add_column(table.heads[-1], header_style=READ)
    for row in table.rows:
        grid.add_row(*map(Text, row))
    console.print()
    console.print(Text(table.title, "bold"))
    console.print(grid)
