"""The terminal that somebody looks at: whether there is one, and how text is laid out on it.

Where output goes into a file, nothing here changes a line.
"""

import os
import sys
import textwrap

LABEL = 8  # columns of the name in front of a line of the banner
SEPARATOR = " | "


def width() -> int | None:
    """Return the columns of the terminal; None: no terminal, or one that cannot redraw a line."""
    if not sys.stdout.isatty():
        return None
    import rich

    console = rich.get_console()
    return console.width if console.is_terminal and not console.is_dumb_terminal else None


def labelled(label: str, text: str) -> str:
    """Return a line with a name in front; on a terminal its rest stands below its beginning."""
    line = f"{label:<{LABEL}}{text}"
    columns = width()
    if columns is None or len(line) <= columns:
        return line
    return textwrap.fill(
        line, max(columns, 3 * LABEL), subsequent_indent=" " * LABEL, break_on_hyphens=False
    )


def columns_of(cells: list[str], *notes: str) -> str:
    """Return one line of cells; on a terminal that is too narrow without the last of them.

    The first cell and the notes behind them are always there.
    """
    limit = width()
    count = len(cells)
    while limit and count > 1 and len(SEPARATOR.join([*cells[:count], *notes])) > limit:
        count -= 1
    return SEPARATOR.join([*cells[:count], *notes])


def rows_of(first: str, cells: list[str]) -> str:
    """Return cells behind a first one; on a terminal what does not fit goes on below them."""
    limit, indent = width(), " " * len(first)
    lines = [first]
    for number, cell in enumerate(cells):
        if limit and number and len(lines[-1]) + len(SEPARATOR + cell) > limit:
            lines.append(indent)
        lines[-1] += SEPARATOR + cell
    return "\n".join(lines)


def clean(file_number: int) -> None:
    """Empty the line of the cursor, where another process may have left a status line."""
    try:
        if os.isatty(file_number):
            blanks = " " * (os.get_terminal_size(file_number).columns - 1)
            os.write(file_number, f"\r{blanks}\r".encode())  # no codes: any terminal knows these
    except OSError:
        return  # it has gone
