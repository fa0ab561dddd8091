"""Rows and texts of files: what is read of every format, and what is refused, file by file."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.data import row_groups
from trainer.data.chat import ChatEncoder
from trainer.data.document_data import DocumentData
from trainer.data.named_sources import Source
from trainer.data.pretraining import PretrainingData
from trainer.data.sources import open_rows, open_texts
from trainer.data.token_folder import TokenFolder
from trainer.data.tokenise_job import Texts, TokeniseJob
from trainer.data.tokenizers import ByteTokenizer
from trainer.errors import DataError

LATIN = "gr\u00fcn".encode("latin1")
FORMATS = ("txt", "jsonl", "csv", "parquet", "arrow")


def file_of(kind: str, column: str, values: list[Any]) -> bytes:
    """Return a file with one column of a kind; of text the first value alone."""
    if kind == "txt":
        return str(values[0]).encode() if values else b""
    if kind == "jsonl":
        return "".join(json.dumps({column: value}) + "\n" for value in values).encode()
    if kind == "csv":
        return "\n".join([column, *map(str, values), ""]).encode()
    import pyarrow as pa
    from pyarrow import feather, parquet

    file = io.BytesIO()
    write = {"parquet": parquet.write_table, "arrow": feather.write_feather}[kind]
    write(pa.table({column: pa.array(values, None if values else pa.string())}), file)
    return file.getvalue()


def written(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


def texts(path: str, column: str = "text") -> list[str]:
    source = open_texts(Source(path=path), column)
    source.peek()
    return [document.text for document in source.documents()]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.txt": b"", "b.txt": b"x"}, ["x"]),
        ({"a.jsonl": b"", "b.jsonl": b'{"text": "x"}\n\n{"text": "y"}\n', "c.jsonl": b""},
         ["x", "y"]),
        ({"a.csv": b"", "b.csv": b"text\nx\n"}, ["x"]),
        ({"a.parquet": file_of("parquet", "text", []),
          "b.parquet": file_of("parquet", "text", ["x"])}, ["x"]),
        ({"a.arrow": file_of("arrow", "text", []),
          "b.arrow": file_of("arrow", "text", ["x"])}, ["x"]),
        # The byte order mark of some editors is no part of the text.
        ({"a.txt": b"\xef\xbb\xbfx"}, ["x"]),
        ({"a.jsonl": b'\xef\xbb\xbf{"text": "x"}\n'}, ["x"]),
        ({"a.csv": b"\xef\xbb\xbftext\nx\n"}, ["x"]),
        # Words that pandas takes for missing values.
        ({"a.csv": b"text\nNA\nNone\nnull\n"}, ["NA", "None", "null"]),
        ({"a.json": b'[{"text": "x"}, {"text": "y"}]'}, ["x", "y"]),
    ],
)  # fmt: skip
def test_texts_are_read(tmp_path: Path, files: dict[str, bytes], expected: list[str]) -> None:
    assert texts(written(tmp_path / "in", files)) == expected


REFUSED = {
    "empty": "holds empty files only; give one with text|cannot be read: .*; correct or remove it",
    "without rows": "holds no rows; give a file that has some|holds empty files only",
    "column": "no column 'text', only texts; did you mean texts[?] set data.column to one of them",
    "not UTF-8": r"is not UTF-8 at byte \d+; convert it|cannot be read: .*(?i:utf).*; correct or",
    "number": "row 0 of .*: column 'text' holds int, needed text; correct the row or drop it",
    "null": "row 1 of .*: column 'text' holds null, needed text; correct the row or drop it",
}


def faulty(kind: str, fault: str) -> bytes:
    if fault in ("empty", "without rows"):
        return b"" if fault == "empty" else file_of(kind, "text", [])
    if fault == "null":
        csv = b"text,n\nx,1\n,2\n"
        return csv if kind == "csv" else file_of(kind, "text", ["x", None])
    if fault == "not UTF-8":
        words = file_of(kind, "text", ["words"])
        return words.replace(b"words", LATIN + b".")
    return file_of(kind, "texts", ["word"]) if fault == "column" else file_of(kind, "text", [5])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fault", REFUSED)
def test_a_fault_is_refused_in_one_line_in_every_format(
    tmp_path: Path, kind: str, fault: str
) -> None:
    if kind == "txt" and fault in ("column", "number", "null"):
        return  # a text file is one text
    path = written(tmp_path / "in", {f"a.{kind}": faulty(kind, fault)})
    with pytest.raises((ValueError, DataError), match=REFUSED[fault]) as error:
        texts(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": b'{"text": "x"}\n', "b.jsonl": b'{"text": "x"}\n{"text": "no end\n'},
         r"b\.jsonl cannot be read: JSON parse error: .* in row 1; correct or remove it"),
        ({"a.jsonl": "{}".encode("utf-16")}, r"a\.jsonl is not UTF-8 at byte 0; convert it"),
        ({"a.csv": b"text,n\nx,1\n", "b.csv": b"text,n\nx,1\ny,2,3\n"},
         r"b\.csv cannot be read: .*Expected 2 fields in line 3, saw 3; correct or remove it"),
        ({"a.csv": b"text;n\nx;1\n"}, r"has one column, 'text;n'; csv needs commas .* not ';'"),
        ({"a.parquet": file_of("parquet", "text", ["x"])[:-9]}, r"a\.parquet cannot be read: "),
        ({"a.arrow": b"hello, world"}, r"a\.arrow cannot be read: "),
        ({"a.parquet": file_of("parquet", "text", ["x"]),
          "b.parquet": file_of("parquet", "body", ["x"])},
         r"in has files that differ in columns or types: .*; make them alike, or give one of them"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        texts(written(tmp_path / "in", files))
    assert "\n" not in str(error.value)


def test_a_row_group_that_memory_cannot_hold_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (file_of("parquet", "text", ["x" * count]) for count in (1, 5000))
    path = written(tmp_path / "in", {"a.parquet": small, "b.parquet": large, "c.parquet": small})
    assert len(texts(path)) == 3
    monkeypatch.setattr(row_groups, "free_memory", lambda: 4096)  # a machine's
    with pytest.raises(DataError, match=r"b\.parquet has a row group of .* 4\.0 KiB of memory are"):
        texts(path)


def test_a_row_group_of_a_file_that_is_small_on_disk_is_refused_when_its_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet, table

    path = Path(written(tmp_path / "in", {"b.parquet": file_of("parquet", "text", ["x" * 90_000])}))
    lines = [f"{n * 7919:x}" for n in range(200)]
    parquet.write_table(table({"text": lines}), path / "a.parquet", row_group_size=10)
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    assert sizes["b.parquet"] < sizes["a.parquet"]
    monkeypatch.setattr(row_groups, "free_memory", lambda: 4096)  # a machine's
    rows, found = open_rows(Source(path=str(path))).rows(), []
    with pytest.raises(DataError, match=r"b\.parquet has a row group of .* 4\.0 KiB of memory are"):
        found.extend(row["text"] for row in rows)
    assert found == lines


def test_settings_of_the_hub_are_refused_for_what_is_not_on_it(tmp_path: Path) -> None:
    path = written(tmp_path / "in", {"a.jsonl": b'{"text": "x"}\n'})
    text = PretrainingData(path=path, row_tokens=16, global_rows=2)
    chat = DocumentData(path=path, encoder=ChatEncoder(), row_tokens=16, global_documents=2)
    for data in (text, chat):
        for changes, message in (
            ({"split": "test"}, "data.split=test has no effect on data.path=.*; leave it out"),
            ({"subset": "en"}, "data.subset=en has no effect on data.path="),
            ({"eval_split": "test"}, "data.eval_split=test has no effect without data.eval_path"),
            ({"eval_path": path, "eval_split": "test"}, "data.eval_split=test has no effect on"),
            ({"path": None, "sources": {"a": Source(path=path)}, "split": "test"},
             "data.split=test belongs to data.path; set data.sources.NAME.split"),
            ({"path": None, "sources": {"a": Source(path=path, subset="en")}},
             r"data.sources.a.subset=en has no effect on data.sources.a.path="),
            ({"path": "stdlib", "split": "test"}, "stdlib"),
            ({"max_documents": 0}, "data.max_documents=0 is not positive"),
            ({"path": "allenai/c4"}, "does not exist; .*, or hf://datasets/allenai/c4 for that on"),
            ({"path": "https://huggingface.co/datasets/a/b"}, "or hf://datasets/a/b for that on"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                replace(data, **changes).check()  # type: ignore[type-var]
    tokens = TokenFolder(
        sources={"a": Source(path=path, split="test")}, row_tokens=16, global_rows=2
    )
    with pytest.raises(ValueError, match=r"data\.sources\.a\.split=test has no effect"):
        tokens.check()
    with pytest.raises(ValueError, match=r"settings of data\. have no effect but data.eval_frac"):
        TokeniseJob(output="x", tokenizer="byte", megatron="y", data=Texts(max_documents=2))


def test_the_first_documents_are_used_when_that_was_asked_for(tmp_path: Path) -> None:
    rows = [{"text": f"document {n}"} for n in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = written(tmp_path / "in", {"a.jsonl": lines})
    some, all_of_them = open_rows(Source(path=path), limit=7), open_rows(Source(path=path))
    assert list(some.rows()) == rows[:7]
    assert some.key() != all_of_them.key()
    cache, made = str(tmp_path / "cache"), {"path": path, "eval_path": path, "max_documents": 7}
    text = PretrainingData(row_tokens=16, global_rows=2, cache=cache, **made)  # type: ignore[arg-type]
    chat = DocumentData(
        encoder=ChatEncoder(), row_tokens=16, global_documents=2, cache=cache, **made  # type: ignore[arg-type]
    )  # fmt: skip
    stores = list(text.stores(ByteTokenizer()))
    for loader in chat.build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1):
        assert loader is not None
        stores.append(loader.rows.store)
    assert [store.num_documents for store in stores if store] == [7] * 4
    modules = open_texts(Source(path="stdlib"), "text", limit=3)
    assert len(list(modules.documents())) == 3
    job = TokeniseJob(
        output=str(tmp_path / "out"), tokenizer="byte", workers=1,
        data=Texts(path=path, max_documents=7, eval_fraction=0.0),
    )  # fmt: skip
    assert job.run()[0].stores["train"][0].num_documents == 7
    with pytest.raises(ValueError, match=r"was begun with data\.max_documents=7, not 8; go on"):
        replace(job, data=replace(job.data, max_documents=8)).check()
