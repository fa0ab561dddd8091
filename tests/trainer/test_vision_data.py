"""The whole way from rows with images to batches: order, budgets, bad rows, and what is cached."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from models.nn.head import IGNORED
from tests.images import encoded, mixed_rows, picture, tokenizer, write_pictures, write_rows
from tests.trainer.test_images import write_tar
from trainer.batch import Batch
from trainer.data.bad_rows import FILE
from trainer.data.bpe import train_bpe
from trainer.data.document_store import DocumentStore
from trainer.data.images.processor import ImageProcessor
from trainer.data.loader import StepLoader
from trainer.data.named_sources import Source
from trainer.data.tokenizers import FileTokenizer
from trainer.data.vision_text import VisionTextEncoder
from trainer.data.vision_text_data import VisionTextData
from trainer.errors import DataError

TOKENIZER = tokenizer()
SIDE, ROW_IMAGES, DOCUMENTS, COUNT = 6, 5, 16, 60
PROCESSOR = ImageProcessor(image_size=SIDE)
Seen = tuple[bytes, bytes, tuple[bytes, ...]]


def vision_data(path: str, folder: Path, **changes: Any) -> VisionTextData:
    settings: dict[str, Any] = {
        "encoder": VisionTextEncoder(), "processor": PROCESSOR, "eval_fraction": 0.0,
        "row_tokens": 64, "row_images": ROW_IMAGES, "global_documents": DOCUMENTS, "micro_rows": 2,
        "cache": str(folder),
    }  # fmt: skip
    return VisionTextData(path=path, **settings | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> VisionTextData:
    folder = tmp_path_factory.mktemp("vision")
    names = write_pictures(folder / "rows", 11)
    path = write_rows(folder / "rows" / "rows.jsonl", mixed_rows(names, COUNT))
    return vision_data(path, folder / "cache")


def loader_of(data: VisionTextData, rank: int = 0, num_ranks: int = 1) -> StepLoader:
    return data.build(tokenizer=TOKENIZER, seed=3, rank=rank, num_ranks=num_ranks)[0]


def test_a_bpe_is_trained_on_the_text_around_images(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "rows", 2)
    rows = [
        {"image": names[0], "question": "what is this?", "answer": "a square"},
        {"texts": ["first", None, "then a square"], "images": [None, names[1], None]},
        {"image": "missing.png"},
    ]
    path = write_rows(tmp_path / "rows" / "rows.jsonl", rows)
    train_bpe(tmp_path / "expected", ["what is this? a square", "first", "then a square"], 270)
    found = vision_data(path, tmp_path / "cache").tokenizer("bpe", 270)
    assert found.fingerprint == FileTokenizer(tmp_path / "expected").fingerprint


def documents_in(batch: Batch) -> list[Seen]:
    """Return ids, labels and images of the documents of a batch.

    An image is what its token looks at; every other token of the document looks at one of them.
    """
    found = []
    for row in range(batch.num_rows):
        segments = batch.segment_ids[row]
        for segment in range(1, int(segments.max()) + 1):
            places = (segments == segment).nonzero()[:, 0]
            ids, labels = batch.input_ids[row, places], batch.labels[row, places]
            images: list[int] = []
            for place in places.tolist():
                looks = []
                if batch.image_attention_mask is not None:
                    looks = batch.image_attention_mask[row, place].nonzero()[:, 0].tolist()
                if batch.input_ids[row, place] == 259:
                    images += looks
                assert looks == images[-1:], (row, place)  # the latest; EOS is the last token
            pixels = (
                [] if batch.pixel_values is None else [batch.pixel_values[row, n] for n in images]
            )
            found.append((
                ids.numpy().tobytes(), labels.numpy().tobytes(),
                tuple(one.numpy().tobytes() for one in pixels),
            ))  # fmt: skip
        if batch.image_attention_mask is not None:
            assert not batch.image_attention_mask[row, segments == 0].any()
        assert (batch.labels[row][segments == 0] == IGNORED).all()
    return found


def expected_documents(data: VisionTextData, step: int) -> list[Seen]:
    """Make a step's documents anew from rows and pictures, one by one, without any cache."""
    assert data.path is not None
    lines = Path(data.path).read_text().splitlines()
    found = []
    for number in loader_of(data).order.locate(np.arange(step * DOCUMENTS, (step + 1) * DOCUMENTS)):
        row = json.loads(lines[number])
        example = VisionTextEncoder().encode(row, TOKENIZER)
        assert example.labels is not None
        names = [name for name in [*row.get("images", []), row.get("image")] if name]
        pictures = [Image.open(Path(data.path).parent / name) for name in names]
        pixels = tuple(PROCESSOR(image.convert("RGB")).tobytes() for image in pictures)
        found.append((example.input_ids.tobytes(), example.labels.tobytes(), pixels))
    return sorted(found)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 9), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["best_fit", "off"])
)
def test_a_step_holds_the_same_documents_and_images_on_any_ranks_packed_or_not(
    data: VisionTextData, step: int, num_ranks: int, micro_rows: int, packing: Any
) -> None:
    other = replace(data, packing=packing, micro_rows=micro_rows)
    steps = [loader_of(other, rank, num_ranks).step(step) for rank in range(num_ranks)]
    found = [seen for one in steps for batch in one.micro_batches for seen in documents_in(batch)]
    assert sorted(found) == expected_documents(data, step)
    samples = [n for one in steps for first, last in one.ranges for n in range(first, last)]
    assert sorted(samples) == list(range(DOCUMENTS * step, DOCUMENTS * (step + 1)))
    for together in zip(*(one.micro_batches for one in steps), strict=True):
        # All ranks run the vision tower, or none does.
        assert len({bool(batch.images) for batch in together}) == 1
        assert any(batch.pixel_values is not None for batch in together) == any(
            batch.images for batch in together
        )
        shapes = [b.pixel_values.shape for b in together if b.pixel_values is not None]
        assert all(shape[0] == micro_rows and shape[1] <= ROW_IMAGES for shape in shapes)


def num_images(batch: Batch) -> int:
    return int((batch.input_ids == 259).sum())


@pytest.mark.parametrize("packing", ["best_fit", "off"])
def test_micro_batches_are_one_list_that_ranks_share_out_with_similar_images(
    data: VisionTextData, packing: Any
) -> None:
    packed = replace(data, packing=packing)
    for step in range(6):
        alone = loader_of(packed).step(step).micro_batches
        images = [num_images(batch) for batch in alone]
        assert images == sorted(images, reverse=True)
        for num_ranks in (2, 3, 4):
            ranks = [
                loader_of(packed, r, num_ranks).step(step).micro_batches for r in range(num_ranks)
            ]
            dealt = [batch for together in zip(*ranks, strict=True) for batch in together]
            for mine, theirs in zip(alone, dealt, strict=False):  # what is more is padding
                assert documents_in(mine) == documents_in(theirs)
            of_ranks = [sum(map(num_images, rank)) for rank in ranks]
            assert max(of_ranks) - min(of_ranks) <= max(images)


def test_rows_of_text_alone_have_no_images_unless_another_rank_has(
    tmp_path: Path, data: VisionTextData
) -> None:
    texts = [{"text": f"text {number}"} for number in range(8)]
    path = write_rows(tmp_path / "texts.jsonl", texts)
    (batch, *_) = loader_of(replace(data, path=path, global_documents=8)).step(0).micro_batches
    assert batch.images == {}
    names = write_pictures(tmp_path, 1)
    path = write_rows(tmp_path / "one.jsonl", [{"image": names[0], "text": "t"}, *texts[:1]])
    one = replace(data, path=path, global_documents=2, packing="off", micro_rows=1)
    first, second = (loader_of(one, rank, 2).step(0).micro_batches[0] for rank in range(2))
    assert num_images(first) == 1
    assert num_images(second) == 0
    assert second.images == {"blank_image": True}


def test_a_longer_or_blank_batch_keeps_its_images_out_of_sight(data: VisionTextData) -> None:
    batch = loader_of(data).step(0).micro_batches[0]
    longer = batch.padded(5)
    assert longer.image_attention_mask is not None
    assert batch.image_attention_mask is not None
    assert longer.image_attention_mask.shape[1] == longer.input_ids.shape[1] == 69
    assert not longer.image_attention_mask[:, 64:].any()
    assert longer.image_attention_mask[:, :64].equal(batch.image_attention_mask)
    blank = batch.blank().images["image_attention_mask"]
    assert blank.shape == batch.image_attention_mask.shape
    assert not blank.any()


def test_a_loader_goes_on_where_another_number_of_ranks_stopped(data: VisionTextData) -> None:
    state = json.loads(json.dumps(loader_of(data).state(2)))
    ranks = [loader_of(data, rank, 3).resumed(2, state) for rank in range(3)]
    found = [
        seen for loader in ranks for b in loader.step(2).micro_batches for seen in documents_in(b)
    ]
    assert sorted(found) == expected_documents(data, 2)


def test_shards_keep_where_images_lie_and_no_pixels(data: VisionTextData) -> None:
    store = loader_of(data).rows.store
    assert isinstance(store, DocumentStore)
    counts = [store.num_images(document) for document in range(COUNT)]
    assert counts == [0, 1, 2, 0, 3, 4] * 10
    images = store.example(2).images
    assert images is not None
    assert [image.file for image in images] == ["images/6.png", "images/7.png"]
    assert all(re.fullmatch("[0-9a-f]{16}", str(image.xxh3)) for image in images)
    shard = store.shard(0)
    assert shard.footer.sections["images"].count < 110 * sum(counts)


def test_data_may_move_and_is_still_the_same(tmp_path: Path, data: VisionTextData) -> None:
    assert data.path is not None
    folder = Path(data.path).parent
    before = loader_of(data).rows.store.fingerprint
    shutil.copytree(folder, tmp_path / "moved")
    moved = replace(
        data, path=str(tmp_path / "moved" / "rows.jsonl"), cache=str(tmp_path / "cache")
    )
    assert loader_of(moved).rows.store.fingerprint == before
    shutil.copy(folder / "images/0.png", tmp_path / "moved/images/1.png")
    other = replace(moved, cache=str(tmp_path / "other"))
    assert loader_of(other).rows.store.fingerprint != before  # pixels count as the text does


def own(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> VisionTextData:
    path = write_rows(tmp_path / "own" / "rows.jsonl", rows)
    return vision_data(path, tmp_path / "cache", **{"global_documents": len(rows)} | changes)


def captions(tmp_path: Path, count: int) -> list[dict[str, Any]]:
    names = write_pictures(tmp_path / "own", count)
    return [{"image": name, "text": f"caption {n}"} for n, name in enumerate(names)]


def captions_in(loader: StepLoader) -> dict[str, tuple[bytes, ...]]:
    """Return the documents of the first step: words, and images."""
    found = {}
    for batch in loader.step(0).micro_batches:
        for ids, _, images in documents_in(batch):
            text = bytes(token for token in np.frombuffer(ids, np.int64).tolist() if token < 256)
            found[text.decode()] = images
    return found


def test_a_broken_image_is_replaced_by_the_next_row_and_shifts_nothing(tmp_path: Path) -> None:
    rows = captions(tmp_path, 6)
    before = captions_in(loader_of(own(tmp_path, rows)))
    assert sorted(before) == [f"caption {number}" for number in range(6)]
    broken = tmp_path / "own/images/3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    again = loader_of(own(tmp_path, rows, cache=str(tmp_path / "again")))
    assert captions_in(again) == {k: v for k, v in before.items() if k != "caption 3"}
    provenance = ",".join(again.step(0).provenance)
    assert provenance.count("[4:5]") == 2
    (log,) = (tmp_path / "again").rglob(FILE)
    line = json.loads(log.read_text())
    assert line["row"] == 3
    assert line["source"].endswith("rows.jsonl")
    assert line["reason"].startswith("image 1 of the row (images/3.png) is broken: ")


@pytest.mark.parametrize(
    ("change", "changes", "reason"),
    [
        (lambda row: row | {"image": "images/none.png"}, {},
         r"image 1 of the row \(images/none.png\) cannot be read: No such file"),
        (lambda row: {"images": [row["image"]] * 6, "text": "t"}, {},
         r"the row has 6 images, more than data.row_images=5; raise it"),
        (lambda row: row, {"max_pixels": 79}, r"has 10 x 8 pixels, needed 1 to data.max_pixels=79"),
        (lambda row: {"text": "12345678<image>", "image": row["image"]},
         {"too_long": "cut", "row_tokens": 10},
         r"data.row_tokens=10 would cut the document, of 13 tokens, inside an image"),
    ],
)  # fmt: skip
def test_too_many_bad_images_end_the_run_with_file_and_reason(
    tmp_path: Path, change: Any, changes: dict[str, Any], reason: str
) -> None:
    rows = [change(row) for row in captions(tmp_path, 5)]
    with pytest.raises(DataError, match=rf"rows.jsonl: 5 of 5 rows .* the last, row 4: .*{reason}"):
        loader_of(own(tmp_path, rows, **changes))


def test_documents_are_cut_with_their_images_when_that_was_asked_for(tmp_path: Path) -> None:
    rows = [row | {"text": "a<image>" + "b" * 30, "images": [row.pop("image")]} for row in
            captions(tmp_path, 4)]  # fmt: skip
    with pytest.raises(DataError, match=r"4 of 4 documents .* are longer than data.row_tokens=12"):
        loader_of(own(tmp_path, rows, row_tokens=12))
    loader = loader_of(own(tmp_path, rows, row_tokens=12, too_long="cut"))
    found = [s for batch in loader.step(0).micro_batches for s in documents_in(batch)]
    assert [len(ids) // 8 for ids, _, _ in found] == [12] * 4
    assert all(len(images) == 1 for _, _, images in found)


def test_an_image_that_changes_later_ends_the_run_with_its_name(tmp_path: Path) -> None:
    rows = captions(tmp_path, 4)
    data = own(tmp_path, rows)
    loader_of(data)
    shutil.copy(tmp_path / "own/images/0.png", tmp_path / "own/images/1.png")
    with pytest.raises(DataError, match=r"own/images/1.png of train\[1:2\] is another image than"):
        loader_of(data).step(0)


def test_tables_and_tar_files_give_the_same_batches_as_files(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    rows = captions(tmp_path, 6)
    files = own(tmp_path, rows)
    pictures = [(tmp_path / "own" / row["image"]).read_bytes() for row in rows]
    cells = [{"bytes": data, "path": None} for data in pictures]
    columns = {"image": cells, "text": [row["text"] for row in rows]}
    parquet.write_table(Table.from_pydict(columns), tmp_path / "rows.parquet", row_group_size=2)
    members = {}
    for number, (row, data) in enumerate(zip(rows, pictures, strict=True)):
        members |= {f"{number}.txt": row["text"].encode(), f"{number}.png": data}
    write_tar(tmp_path / "rows.tar", members)
    expected = [documents_in(b) for b in loader_of(files).step(0).micro_batches]
    for name in ("rows.parquet", "rows.tar"):
        other = replace(files, path=str(tmp_path / name))
        found = [documents_in(b) for b in loader_of(other).step(0).micro_batches]
        assert found == expected


def test_sources_and_held_out_rows_find_their_own_images(tmp_path: Path) -> None:
    paths, pictures = {}, {}
    for count, name in enumerate(("one", "two", "eval"), start=2):
        rows = [
            row | {"text": f"{name} {n}"} for n, row in enumerate(captions(tmp_path / name, count))
        ]
        folder = tmp_path / name / "own"
        for n, row in enumerate(rows):  # the same names everywhere, other pictures
            image = picture(100 * count + n)
            (folder / row["image"]).write_bytes(encoded(image))
            pictures[row["text"]] = (PROCESSOR(image).tobytes(),)
        paths[name] = write_rows(folder / "rows.jsonl", rows)
    data = replace(
        vision_data("", tmp_path / "cache", global_documents=20), path=None,
        sources={name: Source(path=paths[name]) for name in ("one", "two")},
        eval_path=paths["eval"],
    )  # fmt: skip
    loader, evaluation = data.build(tokenizer=TOKENIZER, seed=0, rank=0, num_ranks=1)
    found = captions_in(loader)
    assert sorted(found) == ["one 0", "one 1", "two 0", "two 1", "two 2"]
    assert all(pictures[text] == images for text, images in found.items())
    assert evaluation is not None
    held = [s[2] for _, batch in evaluation.batches() for s in documents_in(batch)]
    assert sorted(held) == sorted(pictures[f"eval {n}"] for n in range(4))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"row_images": 0}, "data.row_images=0 is not positive"),
        ({"max_pixels": 100_000_000}, "is more than Pillow decodes; set it to 89478485 or less"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    data: VisionTextData, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(data, **changes)


def test_data_sets_of_the_hub_are_to_be_downloaded_first(data: VisionTextData) -> None:
    with pytest.raises(ValueError, match=r"images are read again in every epoch; download its"):
        replace(data, path="hf://datasets/some/images").check()
