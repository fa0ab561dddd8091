"""`tessera inspect` as people run it: pipes, colours, HTML, JSON; and what it refuses."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from launch import inspect
from launch.cli import main
from launch.inspect_terminal import CLOSE, OPEN, show
from launch.visible_text import visible, visible_ends
from tests.chat_templates import CHATML, tokenizer_folder

DEMO = ["experiment=demo", "data.row_tokens=64", "data.global_rows=4", "data.micro_rows=2"]
# <s> is one token of the tokenizer below; the rest is single bytes.
EVIL = "<s><script>alert('x')</script> & \x1b[31mred"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words of a command on conversations."""
    folder = tmp_path_factory.mktemp("chats")
    row = {
        "messages": [
            {"role": "user", "content": EVIL},
            {"role": "assistant", "content": "No. "},
        ]
    }
    (folder / "rows.jsonl").write_text("".join(json.dumps(row | {"n": n}) + "\n" for n in range(4)))
    (folder / "tokenizer").mkdir()
    tokenizer_folder(folder / "tokenizer", chat_template=CHATML)
    return [
        "data=chat", f"data.path={folder}/rows.jsonl", f"data.cache={folder}/cache",
        f"tokenizer={folder}/tokenizer", "model.vocab_size=300", "data.row_tokens=200",
        "data.global_documents=2", "data.micro_rows=2", "data.eval_fraction=0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words of a command on texts with classes."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = [{"text": f"text {n}", "label": ("bad", "good")[n % 2]} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "task=sequence_classification", "data=sequence_labels", f"data.path={folder}/rows.jsonl",
        f"data.cache={folder}/cache", "tokenizer=byte", "data.row_tokens=32",
        "data.global_documents=6", "data.micro_rows=2", "data.eval_fraction=0",
    ]  # fmt: skip


@pytest.fixture
def demo(cache: Path) -> list[str]:
    return [*DEMO, "data.max_documents=10", f"data.cache={cache}"]


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["inspect", *words]) == 0
    return capsys.readouterr().out


def test_virtual_tokens_are_spelled_and_said(
    chats: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = output(capsys, *chats)
    text = output(capsys, *chats, "adapter=prompt", "adapter.num_virtual_tokens=2")
    assert "<|virtual_1|><|virtual_2|><|im_start|>system" in text
    assert "2 tokens before every document" in text
    assert "virtual" not in plain
    texts = [line for line in plain.splitlines() if "bytes per token" in line]
    assert texts
    assert all(line in text for line in texts)


def test_a_pipe_tells_trained_from_read_by_brackets(
    chats: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, *chats)
    assert "\x1b" not in text
    assert f"<|im_start|>assistant\u21b5\n{OPEN}No.\u00b7<|im_end|>{CLOSE}\u21b5\n" in text
    assert text.count(OPEN) == 2 + 1  # two documents, and the legend
    assert "\u241b[31mred<|im_end|>\u21b5" in text  # an escape in data is shown, not done
    assert re.search(r"\.\.\. \d+ padding", text)
    assert "1  train[" in text


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(
    demo: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr("rich._console", Console(width=width))
    lines = output(capsys, *demo).splitlines()
    assert max(map(len, lines)) <= width
    assert "row 4 of 4, micro-batch 2  64 of 64 tokens" in lines


def test_a_terminal_shows_it_by_colour(chats: list[str]) -> None:
    options, words = inspect.split(chats)
    report = inspect.report_of(inspect.bound(words), options)
    for no_color in (False, True):
        console = Console(
            file=io.StringIO(), force_terminal=True, color_system="standard", no_color=no_color,
            width=80,
        )  # fmt: skip
        show(report, console)
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        assert ("\x1b[1;32mNo.\u00b7" in text) is not no_color
        assert (f"{OPEN}" in text) is no_color
        assert "\x1b[31m" not in text


def test_the_class_of_a_document_stands_in_its_heading(
    labelled: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, *labelled, "rows=2")
    headings = re.findall(rf"(train\[\d+:\d+\])  6 tokens  {OPEN}(bad|good){CLOSE}", text)
    assert len(headings) == 6  # five documents of 6 bytes fit one row
    assert all(
        (int(place[6:-1].split(":")[0]) % 2 == 1) == (name == "good") for place, name in headings
    )
    assert re.search(r"3 +50.0% +bad", text)
    assert "6 of 6 documents have a label" in text


def test_json_has_the_numbers_of_the_step(
    demo: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(output(capsys, *demo, "json=true", "step=3"))
    assert (found["step"], found["rows"], found["micro_batches"]) == (3, 4, 2)
    assert found["tokens"] == found["rows"] * found["row_tokens"] == 256
    assert (found["padding"], found["padding_share"], found["targets_astray"]) == (0, 0.0, 0)
    assert sum(one["tokens"] for one in found["sources"].values()) == found["tokens"]
    assert sum(one["targets"] for one in found["sources"].values()) == found["targets"]
    assert sum(one["documents"] for one in found["lengths"]) == found["documents"]
    assert found["tokenizer"] == {"setting": "byte", "vocab_size": 258}
    assert found["data"]["documents"] == 9  # of ten, one is held out
    assert json.loads(output(capsys, *demo, "json=true"))["longest"] != found["longest"]


class Page(HTMLParser):
    """Reads a page, and fails where a tag is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.tags: set[str] = set()
        self.trained = self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        known = dict(attrs)
        assert not {"href", "onclick"} & set(known)
        assert str(known.get("src", "data:image/")).startswith("data:image/")
        if tag not in ("meta", "br", "img"):
            self.open.append(f"{tag} {known.get('class', '')}".strip())
        self.titles += [str(known["title"])] if "title" in known else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().split()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1].startswith("span t y"):
            self.trained += data


def test_html_is_one_whole_page_that_runs_nothing_of_the_data(
    chats: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.html"
    assert f"written to {path}" in output(capsys, *chats, f"html={path}").replace("\n", "")
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert not page.tags & {"script", "s"}
    assert "<script>" not in text
    assert page.text.count("<s><script>alert('x')</script> & \u241b[31mred") == 2
    assert page.trained == "No. <|im_end|>" * 2
    assert any(re.fullmatch(r"id 78, position \d+, segment 1, target 111", t) for t in page.titles)
    assert "://" not in text
    assert "default-src 'none'; img-src data:;" in text
    assert "color-scheme: light dark" in text


def test_html_has_the_classes_of_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"tokens": ["Ann", "<b>"], "tags": ["<i>", "O"]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    output(
        capsys, "task=token_classification", "data=token_labels", "tokenizer=byte",
        f"data.path={tmp_path}/rows.jsonl", f"data.cache={tmp_path}", "data.eval_fraction=0",
        "data.row_tokens=16", "data.global_documents=1", f"html={tmp_path}/page.html",
    )  # fmt: skip
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    assert "Ann<i> <b>O" in page.text
    assert not page.tags & {"i", "s"}
    assert page.trained == "n>"
    assert any(title.endswith("(<i>)") for title in page.titles)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step=0"], "step=0 is no step; the first is step=1"),
        (["rows=-1"], "rows=-1 is negative"),
        (["rows=many"], "rows='many' is text; needed a whole number"),
        (["step=["], "step='[' is text; needed a whole number"),
        (["json=maybe"], "json='maybe' is text; needed true or false"),
        (["html=nowhere/page.html"], "html=nowhere/page.html lies in no folder; make nowhere"),
        (["html=."], "html=. is a folder; name a file"),
        (["max_stepz=3"], "unknown key max_stepz; did you mean max_steps?"),
        (["jsno=true"], "unknown key jsno; did you mean json?"),
        (["xyzzy=3"], "unknown key xyzzy; see tessera inspect --help"),
        (["data.row_token=3"], "unknown key data.row_token; did you mean data.row_tokens?"),
        (["launch.process=2"], "unknown key launch.process"),
        (["data.row_tokens=9999"], "data.row_tokens=9999 is longer than"),
        (["data=text", "data.path=nowhere"], "data.path=nowhere"),
        (["task=token_classification"], "needs a label for every word"),
        (["model.vocab_size=100"], "model.vocab_size=100 has fewer rows"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(
    demo: list[str], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["inspect", *demo, *words]) == 64
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_documents_that_do_not_fit_are_refused_as_in_training(
    chats: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *chats, "data.row_tokens=50", "json=true"]) == 65
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4 of 4 documents (train) are longer than data.row_tokens=50" in captured.err
    assert captured.err.count("\n") == 1


def test_what_cannot_be_seen_gets_a_mark() -> None:
    assert (
        visible("a\tb\r\n\x7f\u202e\u2028\u4e16")
        == "a\u21e5   b\u240d\u21b5\n\\u007f\\u202e\\u2028\u4e16"
    )
    assert visible_ends(" a  b \n  c ") == "\u00b7a  b\u00b7\u21b5\n  c\u00b7"
