"""`tessera inspect` of rows with images: pictures, who looks at which, budgets, defects."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from launch.cli import main
from launch.inspect_terminal import AROUND, CLOSE, OPEN
from tests.images import mixed_data, tokenizer, write_rows
from tests.launch.test_inspect import Page
from trainer.batch import Batch
from trainer.data.images.tokens import FAKE
from trainer.data.loader import StepLoader
from trainer.inspection.counts import count
from trainer.inspection.special import WithSpecialTokens
from trainer.inspection.words import SeenRow, SeenToken, is_around, read_rows, stands_for_image

EVIL = "</b><script>alert('x')</script>"
COLOURS = {"red": (200, 10, 20), "green": (10, 180, 30), "blue": (0, 20, 250)}
TOKENIZER = tokenizer()
SPELLER = WithSpecialTokens(TOKENIZER, (), has_images=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words of a command on rows with two, one and no images."""
    folder = tmp_path_factory.mktemp("images")
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 10), colour).save(folder / f"{name}.png")
    rows = [
        {"texts": ["one", None, "two", None, EVIL],
         "images": [None, "red.png", None, "green.png", None]},
        {"question": "which?", "answer": "blue", "image": "blue.png"},
        {"question": "none?", "answer": "none"},
    ]  # fmt: skip
    path = write_rows(folder / "rows.jsonl", rows)
    return [
        "data=vision_text", f"data.path={path}", f"data.cache={folder}/cache", "data.row_images=4",
        "data.row_tokens=160", "data.global_documents=3", "data.micro_rows=1",
        "data.eval_fraction=0", "model=idefics_tiny", "tokenizer=byte", "rows=1",
    ]  # fmt: skip


def test_the_terminal_says_which_image_stands_where_and_who_looks_at_it(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *words]) == 0
    text = capsys.readouterr().out
    joined = text.replace("\n", "")
    assert f"{OPEN}one{CLOSE}{AROUND}<image 1>{AROUND}{OPEN}two{CLOSE}{AROUND}<image 2>" in joined
    # The token in front of an image does not look at it yet; the one behind it, and the text, do.
    assert "6 look at image 1 red.png" in joined
    assert f"{1 + 1 + len(EVIL) + 1} look at image 2 green.png" in joined
    assert "3 of 4 images" in text
    assert "3 of 4 places (75.0%), 64 pixels" in joined
    assert "1.000 tokens per byte" in text  # tokens of images are no text
    assert max(map(len, text.splitlines())) <= 80


def test_the_page_shows_images_as_the_model_gets_them(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.html"
    assert main(["inspect", *words, f"html={path}"]) == 0
    capsys.readouterr()
    html = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert "script" not in page.tags
    assert EVIL in page.text
    sources = re.findall(r'src="([^"]*)"', html)
    files = re.findall(r'class="image p(\d) c\d" title="[^"]* (\w+).png" data-number="(\d)"', html)
    assert [number for number, _, _ in files] == [shown for _, _, shown in files]
    assert sorted(name for _, name, _ in files) == sorted(COLOURS)
    for (_, name, _), source in zip(files, sources, strict=True):
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        shown = Image.open(io.BytesIO(data))
        assert (shown.size, shown.getpixel((0, 0))) == ((64, 64), COLOURS[name])
    for number in (1, 2, 3):
        assert f"section:has(.p{number}:hover) .v{number} " in html
        assert re.search(rf'class="t y? ?s? ?v c{number - 1} v{number}"', html)


def test_json_has_the_budget_of_images(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *words, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["image_places"], found["looks_astray"]) == (3, 4, 0)
    assert found["tokens_that_look"] == found["tokens"] - len("one") - len("none? none") - 3 - 3


def loader(tmp_path: Path) -> StepLoader:
    data = mixed_data(tmp_path, 6, eval_fraction=0.0)
    return data.build(tokenizer=TOKENIZER, seed=3, rank=0, num_ranks=1)[0]


def looks_one_by_one(row: SeenRow) -> list[tuple[int, ...]]:
    """Return who looks at which image of a row, by going through its words."""
    found, number = [], 0
    for piece, tokens in row.pieces:
        looks: tuple[int, ...] = ()
        for token in tokens:
            if token.text == "<image>":
                number += 1
                looks = (number,)
            found.append(looks)
            if token.token_id == TOKENIZER.eos_token_id:
                looks = ()
        assert tokens or piece.is_padding
    return found


def test_every_token_of_every_row_says_at_which_image_it_looks(tmp_path: Path) -> None:
    steps = loader(tmp_path)
    store, batches = steps.rows.store, steps.step(0).micro_batches
    rows = read_rows(batches, None, SPELLER, 100, store)
    assert sum(len(row.images) for row in rows) > 10
    for row in rows:
        tokens = [token for _, tokens in row.pieces for token in tokens]
        assert [token.looks for token in tokens] == looks_one_by_one(row)
        places = [token for token in tokens if stands_for_image(token)]
        assert [token.looks for token in places] == [(seen.number,) for seen in row.images]
        assert all(re.fullmatch(r"images/\d+.png", seen.file) for seen in row.images)
        assert {token.text for token in tokens if is_around(token)} <= {FAKE}
    without = read_rows(batches, None, SPELLER, 100)
    assert {seen.file for row in without for seen in row.images} == {""}
    found = count(batches, None, SPELLER)
    assert [row.num_images for row in found.rows] == [len(row.images) for row in rows]
    assert [row.num_tokens for row in found.rows] == [row.num_tokens for row in rows]
    looking: list[SeenToken] = [
        t for row in rows for _, tokens in row.pieces for t in tokens if t.looks
    ]
    assert (found.num_lookers, found.num_looks_astray) == (len(looking), 0)


def changed(batch: Batch, place: int, image: int) -> Batch:
    assert batch.image_attention_mask is not None
    mask = batch.image_attention_mask.clone()
    mask[0, place, image] = 1
    return replace(batch, image_attention_mask=mask)


def test_a_look_at_a_later_image_or_at_one_of_another_document_is_counted() -> None:
    image, fake = 259, 258
    ids = torch.tensor([[5, fake, image, fake, 6, 5, fake, image, fake, 7, 0, 0]])
    segments = torch.tensor([[1] * 5 + [2] * 5 + [0] * 2])
    mask = torch.zeros(1, 12, 3, dtype=torch.int64)
    mask[0, 2:5, 0] = mask[0, 7:10, 1] = 1
    batch = Batch(
        input_ids=ids, labels=torch.full_like(ids, -100), position_ids=torch.zeros_like(ids),
        segment_ids=segments, image_attention_mask=mask, provenance=("train[0:2]",),
    )  # fmt: skip
    assert count([batch], None, SPELLER).num_looks_astray == 0
    for place, wrong in [(9, 0), (4, 1), (1, 0), (10, 1), (9, 2)]:
        assert count([changed(batch, place, wrong)], None, SPELLER).num_looks_astray == 1, place
