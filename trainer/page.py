"""One HTML file that needs nothing else: the frame, the looks and the safe parts of every page.

No script, no font, no file beside it, and a policy that lets a browser run or load none, whatever
stands in the data. All functions but `page` escape what they are given; `terms` masks secrets, and
`texts` shows documents as they are.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING

from trainer.redaction import redact

if TYPE_CHECKING:
    from PIL.Image import Image

_FRAME = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #1c1c1c; --quiet: #6b6b6b;
  --line: #dcdcd8; --card: #ffffff; --good: #1c7a34; --bad: #b3261e; --mark: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --page: #161616; --ink: #e8e8e6; --quiet: #9a9a96; --line: #383836;
    --card: #1e1e1e; --good: #6fd088; --bad: #ff8a80; --mark: #7fbaf5; } }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--page);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .8rem; }
h2 { font-size: 1.05rem; margin: 0 0 .4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
small, .note, caption, th { color: var(--quiet); font-weight: 400; }
.note { margin: .5rem 0 0; font-size: .85rem; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .85rem; align-self: flex-start; }
table, dl { font-variant-numeric: tabular-nums; }
caption { text-align: left; white-space: nowrap; padding-bottom: .2rem; }
th, td { padding: .1rem 1rem .1rem 0; text-align: right; border-top: 1px solid var(--line); }
th:last-child, td:last-child { text-align: left; overflow-wrap: anywhere; }
section { margin: 1rem 0; padding: .9rem 1.1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; }
img { max-width: 100%; image-rendering: pixelated; border-radius: 4px; }
$style</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def page(title: str, *, style: str, body: str) -> str:
    """Return the whole file; `style` is CSS beside the frame's, `body` is HTML, written as is."""
    return _FRAME.substitute(title=escape(redact(title)), style=style, body=body)


def texts(of: Mapping[str, str]) -> str:
    """Return named texts of the data, which is the user's: nothing in them is masked."""
    items = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in of.items())
    return f"<dl>{''.join(items)}</dl>"


def terms(of: Mapping[str, str]) -> str:
    """Return names with texts of the config or the machine, their secrets masked."""
    return texts({name: redact(text) for name, text in of.items()})


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; all columns but the last are numbers."""
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    lines = (f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<table><caption>{escape(title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def image(picture: "Image", *, label: str, side: int) -> str:
    """Return a picture as part of the file, of `side` pixels at most: PNG, JPEG where smaller."""
    small = picture.copy()
    small.thumbnail((side, side))
    files = {"png": _encoded(small, "png"), "jpeg": _encoded(small, "jpeg", quality=90)}
    kind = min(files, key=lambda kind: len(files[kind]))
    data = base64.b64encode(files[kind]).decode()
    return f'<img alt="{escape(label)}" src="data:image/{kind};base64,{data}">'


def _encoded(picture: "Image", kind: str, **options: int) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()
