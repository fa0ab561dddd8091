"""Questions, pictures and answers as one HTML file that needs nothing else."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import TYPE_CHECKING

from trainer.validation.scores import OF_PAIRS

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 320  # pixels of a picture's longer side on the page


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One question with what was answered."""

    source: str
    """Where the document stands."""
    question: str
    pictures: "tuple[Image, ...]"
    reference: str
    answer: str


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #1c1c1c; --quiet: #6b6b6b;
  --line: #dcdcd8; --card: #ffffff; --right: #1c7a34; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #161616; --ink: #e8e8e6; --quiet: #9a9a96; --line: #383836;
    --card: #1e1e1e; --right: #6fd088; --wrong: #ff8a80; } }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem; background: var(--page);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .8rem; }
h2 { font-size: .85rem; font-weight: 500; margin: 0 0 .6rem; color: var(--quiet); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.numbers { font-variant-numeric: tabular-nums; margin-bottom: 1.2rem; }
section { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; padding: .9rem 1.1rem;
  background: var(--card); border: 1px solid var(--line); border-left-width: 5px;
  border-radius: 6px; }
section > div { flex: 1 1 20rem; min-width: 0; }
.right { border-left-color: var(--right); }
.wrong { border-left-color: var(--wrong); }
img { max-width: 100%; image-rendering: pixelated; border: 1px solid var(--line);
  border-radius: 4px; align-self: flex-start; }
</style>
</head>
<body>
<h1>$title</h1>
<dl class="numbers">$facts</dl>
$cards
</body>
</html>
""")


def page(title: str, facts: dict[str, str], shown: Iterable[Shown]) -> str:
    """Return the whole file; texts of the data are escaped, pictures are part of it."""
    return PAGE.substitute(
        title=escape(title), facts=_terms(facts), cards="\n".join(map(_card, shown))
    )


def _card(one: Shown) -> str:
    scores = {name: score(one.answer, one.reference) for name, score in OF_PAIRS.items()}
    kind = "right" if scores["exact_match"] else "wrong"
    pictures = "".join(
        f'<img alt="image {number}" src="{_data_uri(picture)}">'
        for number, picture in enumerate(one.pictures, start=1)
    )
    terms = {
        "question": one.question,
        "reference": one.reference,
        "answer": one.answer,
        "scores": ", ".join(f"{name} {value:.2f}" for name, value in scores.items()),
    }
    return (
        f'<section class="{kind}">{pictures}<div><h2>{escape(one.source)}</h2>'
        f"<dl>{_terms(terms)}</dl></div></section>"
    )


def _terms(terms: dict[str, str]) -> str:
    return "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in terms.items()
    )


def _data_uri(picture: "Image") -> str:
    """Return a picture of SIDE pixels at most, without loss."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def facts_of(numbers: dict[str, float], settings: Sequence[tuple[str, object]]) -> dict[str, str]:
    """Return numbers and settings as the page lists them."""
    shown = {
        name: f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        for name, value in numbers.items()
    }
    return shown | {name: str(value) for name, value in settings}
