"""Reading images: every mode becomes RGB, and nothing that is wrong with one is more than a row."""

import io
import os
import struct
import tarfile
import zlib
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.images import encoded, picture, write_pictures, write_rows
from trainer.data.examples import BadRowError
from trainer.data.images.decode import decode, silence_pillow
from trainer.data.images.files import MAX_BYTES, ImageFiles
from trainer.data.images.references import ImageReference, RowPlace, read, written
from trainer.data.images.sources import open_image_rows
from trainer.data.named_sources import Source
from trainer.errors import DataError

FORMS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    assert image.mode == "RGB"
    return [tuple(map(int, value)) for value in np.asarray(image).reshape(-1, 3)]


def see_through(mode: str, value: Any) -> Image.Image:
    return Image.new(mode, (1, 1), value)


@pytest.mark.parametrize(
    ("image", "form", "expected"),
    [
        (Image.new("L", (1, 1), 100), "PNG", (100, 100, 100)),
        (Image.new("1", (1, 1), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (1, 1), (1, 2, 3)), "BMP", (1, 2, 3)),
        (Image.new("RGB", (1, 1), (1, 2, 3)).quantize(), "PNG", (1, 2, 3)),
        (see_through("RGBA", (0, 100, 200, 0)), "PNG", (255, 255, 255)),
        (see_through("RGBA", (0, 100, 200, 255)), "WEBP", (0, 100, 200)),
        (see_through("RGBA", (0, 100, 200, 51)), "PNG", (204, 224, 244)),  # a fifth of it on white
        (see_through("LA", (0, 51)), "PNG", (204, 204, 204)),
        (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF", (0, 255, 255)),
        (Image.fromarray(np.full((1, 1), 257 * 77, np.uint16)), "PNG", (77, 77, 77)),
        (Image.fromarray(np.full((1, 1), 65535, np.uint16)), "TIFF", (255, 255, 255)),
        (Image.fromarray(np.full((1, 1), 257 * 9, np.int32)), "TIFF", (9, 9, 9)),
    ],
)
def test_every_mode_becomes_rgb_on_white(
    image: Image.Image, form: str, expected: tuple[int, ...]
) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    assert pixels(decode(encoded(image, form, **options))) == [expected]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_colours_are_those_that_transformers_would_see(mode: str) -> None:
    from transformers.image_transforms import convert_to_rgb

    image = picture(0, mode="RGBA" if mode == "LA" else mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(picture(1).convert("L"))
        image = image.convert(mode)
    data = encoded(image, "TIFF")
    expected = convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
    np.testing.assert_array_equal(np.asarray(decode(data)), expected)


def test_a_colour_that_a_palette_calls_transparent_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.putpixel((1, 0), 1)
    assert pixels(decode(encoded(image, "PNG", transparency=0))) == [(255,) * 3, (200, 0, 0)]


def test_a_photo_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    image = decode(encoded(picture(0, (12, 4)), "JPEG", exif=exif))
    assert image.size == (4, 12)


def bomb(side: int, body: bytes) -> bytes:
    """Return a PNG of one bit per pixel, whose data is `body`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_a_small_file_of_a_huge_image_is_refused_by_its_header(
    recwarn: pytest.WarningsRecorder,
) -> None:
    silence_pillow.cache_clear()  # each test has filters of its own
    whole = bomb(11_600, zlib.compress(bytes(11_600 * (1 + 11_600 // 8)), 9))
    assert len(whole) < 20_000
    for data in (whole, bomb(11_600, b"no data at all")):  # nothing of it is decoded
        with pytest.raises(BadRowError, match=r"has .* pixels, .*max_pixels=50000000"):
            decode(data)
    with pytest.raises(BadRowError, match=r"more than 178956970 pixels"):
        decode(bomb(40_000, b""))
    with pytest.raises(BadRowError, match=r"has 10 x 8 pixels, needed 1 to .*=79; make"):
        decode(encoded(picture(0)), max_pixels=79)
    assert decode(encoded(picture(0)), max_pixels=80).size == (10, 8)
    assert not recwarn.list  # Pillow's own words about a bomb would be a second line


def test_a_large_transparent_image_takes_four_times_its_pixels_at_most() -> None:
    """Each of its copies, of four bytes for a pixel, lives no longer than it has to."""
    side = 3000
    data = encoded(Image.new("RGBA", (side, side), (255, 0, 0, 7)))
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_of, args=(data, sender))
    process.start()
    sender.close()
    assert receiver.recv() < 4.3 * 4 * side**2
    process.join()


def _peak_of(data: bytes, sender: Any) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak of this process from here on
    before = _status("VmRSS")
    decode(data)
    sender.send(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


@pytest.mark.parametrize("form", FORMS)
def test_an_image_that_was_cut_is_a_bad_row(form: str) -> None:
    data = encoded(picture(0, (40, 40)), form)
    for length in (0, 1, len(data) // 4, len(data) // 2):
        with pytest.raises(BadRowError, match=r"^is (broken: .*; replace it|no image; needed one)"):
            decode(data[:length])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(FORMS),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1),
)
def test_whatever_bytes_are_changed_there_is_an_image_or_a_bad_row(
    form: str, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(encoded(picture(0), form))
    for place, value in changes:
        data[place % len(data)] = value
    with suppress(BadRowError):
        assert decode(bytes(data), max_pixels=10_000).mode == "RGB"


@pytest.mark.parametrize(
    ("image", "form", "reason"),
    [
        (Image.fromarray(np.zeros((1, 1), np.float32)), "TIFF", "holds floating-point numbers"),
        (Image.fromarray(np.full((1, 1), 70_000, np.int32)), "TIFF", "values from 70000 to 70000"),
        (Image.fromarray(np.full((1, 1), -1, np.int32)), "TIFF", "values from -1 to -1"),
        (picture(0), "PPM", "is no image; needed one of PNG"),
    ],
)
def test_what_has_no_white_or_is_in_no_known_form_is_a_bad_row(
    image: Image.Image, form: str, reason: str
) -> None:
    with pytest.raises(BadRowError, match=reason):
        decode(encoded(image, form))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("../secret.png", "leads out of the folder of its file"),
        ("images/../../secret.png", "leads out of the folder of its file"),
        ("/etc/passwd", "leads out of the folder of its file"),
        ("https://example.org/a.png", "is an address; download it"),
        (7, "an image is int, needed a path or bytes"),
    ],
)
def test_a_row_names_images_below_its_own_file_only(value: Any, reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        RowPlace(folder="sub").reference(value)
    assert RowPlace(folder="sub").reference("a/0.png").file == "sub/a/0.png"


def test_a_path_leads_to_a_plain_file_below_the_folder_or_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_pictures(folder, 1)
    (tmp_path / "secret.png").write_bytes(encoded(picture(1)))
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "in.png").symlink_to(folder / "images" / "0.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "empty.png").touch()
    with open(folder / "large.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    files = ImageFiles(folder)
    reasons = {
        "out.png": "leads out of .* by a link",
        "loop.png": "has no legal path|cannot be read",
        "a\0.png": "has no legal path",
        "pipe.png": "is no file",
        "images": "is no file",
        "none.png": "cannot be read: No such file",
        "n" * 300: "cannot be read: File name too long|has no legal path",
        "empty.png": "has 0 bytes, needed 1 to",
        "large.png": f"has {MAX_BYTES + 1} bytes, needed 1 to {MAX_BYTES}",
    }
    for name, reason in reasons.items():
        with pytest.raises(BadRowError, match=reason):
            files.read(ImageReference(file=name))
    for name in ("in.png", "images/0.png"):
        assert pixels(files.read(ImageReference(file=name))) == pixels(picture(0))


def test_a_sealed_image_is_recognised_when_it_changes(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    reference = ImageFiles(tmp_path).sealed(ImageReference(file="images/0.png"))
    assert ImageFiles(tmp_path).read(reference).size == (10, 8)
    (tmp_path / "images/1.png").replace(tmp_path / "images/0.png")
    with pytest.raises(BadRowError, match="is another image than when documents were made"):
        ImageFiles(tmp_path).read(reference)


def test_references_are_read_as_they_were_written() -> None:
    references = (
        ImageReference(file="a.png", xxh3="0f"),
        ImageReference(file="a.tar", offset=0, size=9),
        ImageReference(file="a.parquet", row=0, cell=("messages", 0, "image")),
    )
    assert read(written(references)) == references
    assert read(written(())) == ()


def rows_of(path: Path) -> list[Any]:
    return list(open_image_rows(Source(path=str(path)), "data.path", None).rows())


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_texts_beside_values_of_other_types_stay_as_they_are(tmp_path: Path, form: str) -> None:
    """`datasets` keeps such columns as JSON, in which a text has quotes."""
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": 'A "b"'}]
    rows = [{"messages": turns, "image": "a.png", "answer": answer} for answer in ("yes", 5)]
    path = Path(write_rows(tmp_path / "rows.jsonl", rows))
    if form == "parquet":
        import datasets

        written_rows = datasets.load_dataset("json", data_files=str(path), split="train",
                                             cache_dir=str(tmp_path / "cache"))  # fmt: skip
        path = tmp_path / "rows.parquet"
        written_rows.to_parquet(path)
    assert rows_of(path) == rows


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members.items():
            add(archive, name, data)
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_of_a_tar_file_are_rows_and_nothing_is_extracted(tmp_path: Path, form: int) -> None:
    long = "d" * 90 + "/"
    members = {
        "0.json": b'{"question": "a", "answer": "b"}', "0.png": encoded(picture(0)),
        f"{long}1.1.jpg": encoded(picture(1), "JPEG"), f"{long}1.0.png": encoded(picture(2)),
        f"{long}1.txt": b"two of them",
        "2.json": b'{"images": ["1.png", "2.0.png"], "text": "chosen"}',
        "2.0.png": encoded(picture(3)), "2.1.png": encoded(picture(4)),
        "README": b"belongs to no sample",
        "3.txt": b"text alone",
    }  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members, form)
    rows = rows_of(tmp_path)
    assert [{k: v for k, v in row.items() if k != "images"} for row in rows] == [
        {"question": "a", "answer": "b"}, {"text": "two of them"}, {"text": "chosen"},
        {"text": "text alone"},
    ]  # fmt: skip
    found = [[row.place.reference(image) for image in row.get("images", [])] for row in rows]
    names = [["0.png"], [f"{long}1.1.jpg", f"{long}1.0.png"], ["2.1.png", "2.0.png"], []]
    data = path.read_bytes()
    for references, expected in zip(found, names, strict=True):
        parts = [data[ref.offset :][: ref.size] for ref in references]
        assert parts == [members[name] for name in expected]
        assert all(ImageFiles(tmp_path).read(ref).mode == "RGB" for ref in references)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]
    with pytest.raises(BadRowError, match=r"the sample has no image 'x.png', only 0.png, 1.png"):
        rows[2].place.reference("x.png")


def test_odd_members_of_a_tar_file_make_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        add(archive, "1.json", b"[1, 2]")
        add(archive, "2.json", b"{no json")
        add(archive, "3.txt", b"\xff\xfe")
        add(archive, "4.txt", b"good")
    problems = [row.place.problem for row in rows_of(path)]
    expected = ["0.png is no regular file", "sample 1: its json is list", "sample 2:", "sample 3:"]
    assert problems[-1] is None
    for problem, beginning in zip(problems, expected, strict=False):
        assert problem.startswith(beginning)


def test_a_tar_file_that_is_cut_or_broken_is_no_shorter_one(tmp_path: Path) -> None:
    members = {f"{number}.txt": bytes(1500) for number in range(4)}
    data = write_tar(tmp_path / "whole.tar", members, tarfile.USTAR_FORMAT).read_bytes()
    header = data.index(b"2.txt")
    broken = data[:header] + b"\xff" * 512 + data[header + 512 :]
    for wrong in (data[: header + 700], data[:header], data[: header + 100], broken, b""):
        (tmp_path / "a.tar").write_bytes(wrong)
        with pytest.raises(DataError, match=r"a.tar is (no whole tar file|broken or cut at byte)"):
            rows_of(tmp_path / "a.tar")


def test_a_folder_of_tar_files_and_rows_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.txt": b"a"})
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"mixes tar files and rows.jsonl; keep one kind"):
        rows_of(tmp_path)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("is_declared", [True, False])
def test_columns_of_images_are_read_by_row_and_never_decoded_with_it(
    tmp_path: Path, form: str, is_declared: bool
) -> None:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    data = [encoded(picture(number)) for number in range(7)]
    cells = [{"bytes": one, "path": f"{number}.png"} for number, one in enumerate(data)]
    broken = {"bytes": b"no image", "path": None}
    columns = {
        "image": [*cells[:4], broken],
        "images": [[], cells[4:6], [cells[6]], [], []],
        "text": list("abcde"),
    }
    folder = tmp_path / "rows"
    folder.mkdir()
    if is_declared:
        features = datasets.Features(
            image=datasets.Image(), images=datasets.List(datasets.Image()),
            text=datasets.Value("string"),
        )  # fmt: skip
        table = datasets.Dataset.from_dict(columns, features=features).data.table
    else:
        table = pa.table(columns)
    if form == "parquet":
        parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    else:
        path = str(folder / "a.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    rows, files = rows_of(folder), ImageFiles(folder)
    for number, row in enumerate(rows[:4]):
        assert pixels(files.read(row["image"])) == pixels(picture(number))
    inner = [[pixels(files.read(image)) for image in row["images"]] for row in rows]
    assert inner == [[], [pixels(picture(4)), pixels(picture(5))], [pixels(picture(6))], [], []]
    with pytest.raises(BadRowError, match="is no image"):
        files.read(rows[4]["image"])
    assert str(rows[1]["images"][0]) == f"a.{form}, row 1, images/0"
