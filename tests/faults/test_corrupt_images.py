"""A18: some broken images are skipped without moving any other sample; too many end the run."""

import json
from pathlib import Path

import pytest

from launch.exit_codes import DATA, code_of
from tests.conftest import Figure
from tests.images import picture
from tests.trainer.test_vision_data import DOCUMENTS, loader_of, vision_data
from trainer.data.bad_rows import FILE
from trainer.data.document_store import DocumentStore
from trainer.data.vision_text_data import VisionTextData
from trainer.errors import DataError

SIZES = [pytest.param(100, [7], id="100"),
         pytest.param(2000, [7, 1999], id="2000", marks=pytest.mark.slow)]  # fmt: skip


def write(folder: Path, count: int, broken: list[int]) -> VisionTextData:
    """Write `count` rows with a JPEG each, some of which are cut."""
    rows = folder / "rows"
    rows.mkdir(parents=True)
    lines = []
    for number in range(count):
        path = rows / f"{number}.jpg"
        picture(number % 50, (16, 16)).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        lines.append(json.dumps({"image": path.name, "text": f"picture {number}"}))
    (rows / "rows.jsonl").write_text("\n".join(lines))
    return vision_data(str(rows / "rows.jsonl"), folder / "cache")


@pytest.mark.parametrize(("count", "broken"), SIZES)
def test_all_other_samples_stay_where_they_are(
    tmp_path: Path, count: int, broken: list[int], figure: Figure
) -> None:
    clean = loader_of(write(tmp_path / "clean", count, []))
    data = write(tmp_path / "spoilt", count, broken)
    spoilt = loader_of(data)
    stores = [loader.rows.store for loader in (clean, spoilt)]
    for store in stores:
        assert isinstance(store, DocumentStore)
        assert store.num_documents == count
    for number in range(count):
        whole, other = (store.example(number) for store in stores)  # type: ignore[union-attr]
        same = whole.input_ids.tolist() == other.input_ids.tolist() and whole.images == other.images
        assert same is (number not in broken)
    for step in range(count // DOCUMENTS):
        assert clean.ranges(step) == spoilt.ranges(step)
    (record,) = (tmp_path / "spoilt").rglob(FILE)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["row"] for line in lines] == broken
    for line in lines:
        assert f"({line['row']}.jpg) is broken: " in line["reason"]
    figure(f"A18 broken images of {count} skipped", len(broken), "and all others in their places")


def test_five_percent_of_broken_images_end_the_run(tmp_path: Path) -> None:
    data = write(tmp_path, 100, list(range(0, 100, 20)))
    with pytest.raises(DataError, match=r"are bad \(allowed: 0\.1%, 100 in a row\)") as found:
        loader_of(data)
    assert code_of(found.value) == DATA
