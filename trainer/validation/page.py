"""Questions, pictures and answers as one HTML file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from trainer.page import image, page, terms, texts
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


STYLE = """section { display: flex; flex-wrap: wrap; gap: 1rem; border-left-width: 5px; }
section > div { flex: 1 1 20rem; min-width: 0; }
section h2 { font-size: .85rem; font-weight: 500; color: var(--quiet); }
section img { align-self: flex-start; border: 1px solid var(--line); }
.right { border-left-color: var(--good); }
.wrong { border-left-color: var(--bad); }
"""


def answers_page(title: str, facts: dict[str, str], shown: Iterable[Shown]) -> str:
    """Return the whole file; texts of the data are escaped, pictures are part of it."""
    return page(title, style=STYLE, body="\n".join([terms(facts), *map(_card, shown)]))


def _card(one: Shown) -> str:
    scores = {name: score(one.answer, one.reference) for name, score in OF_PAIRS.items()}
    kind = "right" if scores["exact_match"] else "wrong"
    pictures = "".join(
        image(picture, label=f"image {number}", side=SIDE)
        for number, picture in enumerate(one.pictures, start=1)
    )
    said = {
        "question": one.question,
        "reference": one.reference,
        "answer": one.answer,
        "scores": ", ".join(f"{name} {value:.2f}" for name, value in scores.items()),
    }
    return (
        f'<section class="{kind}">{pictures}<div><h2>{escape(one.source)}</h2>'
        f"{texts(said)}</div></section>"
    )


def facts_of(numbers: dict[str, float], settings: Sequence[tuple[str, object]]) -> dict[str, str]:
    """Return numbers and settings as the page lists them."""
    shown = {
        name: f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        for name, value in numbers.items()
    }
    return shown | {name: str(value) for name, value in settings}
