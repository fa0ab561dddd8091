"""Pages are safe to open: names, texts and labels of anyone are shown and never run."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from launch.cli import main
from tests.secrets import SECRETS
from trainer.page import image, page, table, terms
from trainer.validation.page import Shown, answers_page, facts_of

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><svg onload=alert(1)>",
    "$title ${body} &lt;script&gt;",
    "javascript:alert(1)<!--",
]
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "dl", "dt", "dd", "div",
    "section", "table", "caption", "thead", "tbody", "tr", "th", "td", "img", "span", "p", "b",
    "br", "small", "code",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "name", "http-equiv", "content", "class", "style", "title", "alt", "src",
    "data-number",
}  # fmt: skip


class Seen(HTMLParser):
    """Everything that a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            self.texts += f"\n{value}"
            assert name != "src" or str(value).startswith("data:image/")

    def handle_data(self, data: str) -> None:
        self.texts += data

    def is_harmless(self) -> bool:
        return self.tags <= TAGS and self.attributes <= ATTRIBUTES


@pytest.mark.parametrize("text", HOSTILE)
def test_every_part_of_a_page_shows_a_hostile_text_as_it_is(text: str) -> None:
    picture = image(Image.new("RGB", (2, 2)), label=text, side=2)
    body = terms({text: text}) + table(text, [text], [[text]]) + picture
    seen = Seen(page(text, style="", body=body))
    assert seen.is_harmless(), seen.tags | seen.attributes
    assert seen.texts.count(text) == 8


@pytest.mark.parametrize("text", HOSTILE)
def test_answers_and_names_on_the_validation_page_are_texts(text: str) -> None:
    shown = Shown(source=text, question=text, pictures=(), reference=text, answer=text)
    facts = facts_of({text: 0.5}, [(text, text)])
    seen = Seen(answers_page(text, facts, [shown]))
    assert seen.is_harmless(), seen.tags | seen.attributes
    assert seen.texts.count(text) >= 7


def inspected(folder: Path, file: str, *words: str) -> Seen:
    """Return the page of the first step on a file in `folder`."""
    options = [f"data.path='{folder}/{file}'", f"data.cache={folder}", "data.eval_fraction=0"]
    assert main(["inspect", *options, *words, f"html={folder}/page.html"]) == 0
    return Seen((folder / "page.html").read_text())


def test_the_name_of_a_file_on_the_page_of_a_batch_is_a_text(tmp_path: Path) -> None:
    name = f"{HOSTILE[1]}.txt"
    (tmp_path / name).write_text("text")
    seen = inspected(
        tmp_path, name, "experiment=pretrain_text", "tokenizer=byte", "data.row_tokens=64",
        "data.global_rows=1", "data.micro_rows=1", "eval_every=null",
    )  # fmt: skip
    assert seen.is_harmless(), seen.tags | seen.attributes
    assert name in seen.texts


def test_classes_on_the_page_of_a_batch_are_texts(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "text", "label": label}) + "\n" for label in HOSTILE]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    seen = inspected(
        tmp_path, "rows.jsonl", "task=sequence_classification", "data=sequence_labels",
        "tokenizer=byte", "data.row_tokens=64", "data.global_documents=6", "data.micro_rows=1",
    )  # fmt: skip
    assert seen.is_harmless(), seen.tags | seen.attributes
    assert [label for label in HOSTILE if label not in seen.texts] == []


def test_a_run_may_not_be_named_like_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=demo", f"runs={tmp_path}", 'name="<b>x</b>"', "dry_run=true"]
    assert main(["train", *words]) == 64
    assert "is no folder name" in capsys.readouterr().err


def test_documents_are_shown_as_they_are_beside_facts_that_are_masked() -> None:
    said = SECRETS["API key"]
    shown = Shown(source="a[0:1]", question=said, pictures=(), reference=said, answer=said)
    text = answers_page("answers", {"path": SECRETS["hub token"]}, [shown])
    assert text.count(said) == 3
    assert SECRETS["hub token"] not in text


def test_a_page_masks_secrets_among_its_facts() -> None:
    text = page(SECRETS["AWS key"], style="", body=terms({"path": SECRETS["hub token"]}))
    assert SECRETS["AWS key"] not in text
    assert SECRETS["hub token"] not in text
