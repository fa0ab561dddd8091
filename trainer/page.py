"""One HTML file that needs nothing else: the frame, the looks and the safe parts of every page.

No font, no file beside it, no script but the page's own, and a policy that lets a browser run or
load nothing else, whatever stands in the data. All functions but `page` escape what they are given;
`terms` and `table` mask secrets, and `texts` shows documents as they are.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any

from trainer.redaction import redact

if TYPE_CHECKING:
    from PIL.Image import Image

_IS_PICTURE = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=]+\Z")
_FRAME = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark;
  --page: light-dark(#fbfbfa, #161616); --ink: light-dark(#1c1c1c, #e8e8e6);
  --quiet: light-dark(#5f5f5f, #a2a29e); --line: light-dark(#dcdcd8, #383836);
  --card: light-dark(#ffffff, #1e1e1e); --good: light-dark(#1c7a34, #6fd088);
  --bad: light-dark(#b3261e, #ff8a80); --mark: light-dark(#0b5cad, #7fbaf5); }
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
$script</body>
</html>
""")


def page(title: str, *, style: str, body: str, script: str = "") -> str:
    """Return the whole file.

    `style` is CSS beside the frame's, `body` HTML and `script` JavaScript, all written as they are.
    The policy names the script by its hash: no other one runs.
    """
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _FRAME.substitute(
        title=escape(redact(title)), style=style, body=body,
        policy=f"; script-src 'sha256-{known}'" if script else "",
        script=f"<script>{script}</script>\n" if script else "",
    )  # fmt: skip


def data_block(name: str, value: Any) -> str:
    """Return plain values for the page's script to read: text that no browser runs."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def texts(of: Mapping[str, str]) -> str:
    """Return named texts of the data, which is the user's: nothing in them is masked."""
    items = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in of.items())
    return f"<dl>{''.join(items)}</dl>"


def terms(of: Mapping[str, str]) -> str:
    """Return names with texts of the config or the machine, their secrets masked."""
    return texts({name: redact(text) for name, text in of.items()})


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; all columns but the last are numbers."""
    head = "".join(f'<th scope="col">{escape(redact(one))}</th>' for one in heads)
    lines = (
        f"<tr>{''.join(f'<td>{escape(redact(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f"<table><caption>{escape(title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def image(picture: "Image", *, label: str, side: int) -> str:
    """Return a picture as part of the file, of `side` pixels at most."""
    return shown_image(data_url(picture, side=side), label=label)


def shown_image(url: str, *, label: str) -> str:
    """Return what shows a picture that `data_url` made; nothing for any other text."""
    if not _IS_PICTURE.match(url):
        return ""
    return f'<img alt="{escape(label)}" src="{url}">'


def data_url(picture: "Image", *, side: int) -> str:
    """Return a picture as text, of `side` pixels at most: PNG, JPEG where smaller."""
    small = picture.copy()
    small.thumbnail((side, side))
    files = {"png": _encoded(small, "png"), "jpeg": _encoded(small, "jpeg", quality=90)}
    kind = min(files, key=lambda kind: len(files[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"


def _encoded(picture: "Image", kind: str, **options: int) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()
