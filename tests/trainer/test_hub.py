"""Data sets of the Hub: the rows of one commit, whatever the network does, and clear refusals.

A Hub of our own answers; each question is asked by a new process, whose packages read its address
when they are imported.
"""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import Hub, Repository, serve
from trainer.data.chat import ChatEncoder
from trainer.data.document_data import DocumentData
from trainer.data.named_sources import Source
from trainer.data.pretraining import PretrainingData
from trainer.data.sources import open_rows
from trainer.data.tokenise_job import Texts, TokeniseJob
from trainer.data.tokenizers import ByteTokenizer

LIMIT_SECONDS = 100
ROWS = [{"text": f"row {n}: " + "w\u00f6rd " * (n % 7), "n": n} for n in range(90)]
CARD = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*.parquet
  - split: test
    path: en/test.parquet
- config_name: de
  data_files: de/*.parquet
---
"""
ASK = """
import json, sys
from trainer.data.named_sources import Source
from trainer.data.sources import open_rows
for path, subset, split, limit in json.load(sys.stdin):
    try:
        rows = open_rows(Source(path=path, subset=subset, split=split), limit=limit)
        answer = {"key": rows.key(), "place": rows.place, "rows": list(rows.rows())}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))
"""


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["text", "n"])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=20)
    return file.getvalue()


FILES = {
    "subsets": {
        "README.md": CARD, "en/train-0.parquet": parquet(ROWS[:50]),
        "en/train-1.parquet": parquet(ROWS[50:]), "en/test.parquet": parquet(ROWS[:9]),
        "de/all.parquet": parquet(ROWS[9:20]),
    },
    "lines": {"train.jsonl": jsonl(ROWS), "test.jsonl": jsonl(ROWS[:9]), "run.py": b"exit(3)"},
    "table": {"train.csv": csv_of([*ROWS, {"text": "NA", "n": 90}])},
    "texts": {"a.txt": "one\ntwo\n\u00fc".encode(), "b.txt": b"three\r\n"},
    "pictures": {"a.png": b"", "b.png": b""},
    "nothing": {"README.md": b"# soon"},
    "empty": {"train.jsonl": b""},
    "damaged": {"train.parquet": parquet(ROWS)[:-9]},
    "script": {"script.py": b"raise SystemExit(3)", "train.jsonl": jsonl(ROWS)},
}  # fmt: skip


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub({f"owner/{name}": Repository([files]) for name, files in FILES.items()})
    hub.repositories["owner/gated"] = Repository([FILES["lines"]], is_gated=True)
    old = Repository([FILES["texts"]])
    card = (
        f"---\nconfigs:\n- config_name: a\n  data_files: hf://datasets/owner/old@{old.sha()}/a.txt"
    )
    old.commits.append({**FILES["texts"], "README.md": f"{card}\n---\n".encode()})
    hub.repositories["owner/old"] = old
    with serve(hub):
        yield hub


def python(hub: Hub, home: Path, *words: str, stdin: str = "", **more: str) -> Any:
    """Run a new process that has this Hub, and an empty cache."""
    environment = {**os.environ, **hub.environment(str(home / "hf")), **more}
    return subprocess.run(
        [sys.executable, *words], env=environment, input=stdin, capture_output=True, text=True,
        timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip


def ask(hub: Hub, home: Path, *questions: tuple[Any, ...], **more: str) -> list[dict[str, Any]]:
    """Return rows, key and place of each (path, subset, split, limit), or the error."""
    whole = [
        [path if ":" in path else f"hf://datasets/owner/{path}", *rest, *[None] * (3 - len(rest))]
        for path, *rest in questions
    ]
    done = python(hub, home, "-c", ASK, stdin=json.dumps(whole), **more)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def local_rows(folder: Path, files: dict[str, bytes]) -> list[dict[str, Any]]:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("/", "-")).write_bytes(content)
    return list(open_rows(Source(path=str(folder))).rows())


def test_rows_are_those_of_the_same_files_here(hub: Hub, tmp_path: Path) -> None:
    found = ask(
        hub, tmp_path, ("subsets", "en"), ("subsets", "en", "test"), ("subsets", "de"),
        ("lines", None, "test"), ("table",), ("texts",), ("lines", None, None, 7), ("empty",),
    )  # fmt: skip
    rows = [answer["rows"] for answer in found]
    assert rows[:4] == [ROWS, ROWS[:9], ROWS[9:20], ROWS[:9]]
    assert rows[6:] == [ROWS[:7], []]
    assert rows[4] == local_rows(tmp_path / "table", FILES["table"])
    assert rows[4][-1]["text"] == "NA"
    assert rows[5] == local_rows(tmp_path / "texts", FILES["texts"])
    assert len({answer["key"] for answer in found}) == len(found)


def test_the_key_and_the_rows_are_of_a_commit(hub: Hub, tmp_path: Path) -> None:
    moving = hub.repositories["owner/moving"] = Repository([FILES["lines"]])
    first, again = ask(hub, tmp_path, ("moving",), ("moving@main",))
    assert first["key"] == again["key"]
    assert first["place"] == f"hf://datasets/owner/moving@{moving.sha()}"
    moving.commits.append({"train.jsonl": jsonl(ROWS[::-1])})
    old = moving.sha(0)
    newer, pinned = ask(hub, tmp_path, ("moving",), (f"moving@{old}",))
    assert newer["rows"] == ROWS[::-1]
    assert newer["key"] != first["key"]
    assert pinned == first


def test_what_cannot_work_is_refused_in_one_line(hub: Hub, tmp_path: Path) -> None:
    cases: dict[tuple[Any, ...], str] = {
        ("nobody",): "ValueError: data.path=hf://datasets/owner/nobody is not on the Hub, or not",
        ("gated",): "DataError: data.path=hf://datasets/owner/gated cannot be read: Dataset 'owner",
        ("lines@v2",): "revision 'v2' does not exist; give a branch, a tag",
        ("lines", None, "tset"): "no split 'tset'; did you mean test? set data.split to one of t",
        ("lines", None, "train[:9]"): "no split 'train[:9]'; did you mean train?",
        ("lines", "e"): "has no subset 'e'; set data.subset to one of default",
        ("subsets",): "has several subsets; set data.subset to one of en, de",
        ("subsets", "enn"): "has no subset 'enn'; did you mean en? set data.subset to one of en",
        ("pictures",): "holds imagefolder files, needed one of text, csv, parquet",
        ("nothing",): "cannot be read: The directory at hf://datasets/owner/nothing@",
        ("damaged",): "cannot be read: Parquet magic bytes not found",
        ("script",): "cannot be read: Dataset scripts are no longer supported, but found script",
        ("old",): "/a.txt, which is no file of its commit; bring its files, and set data.path=F",
        ("hf://owner/lines",): "is no data set of the Hub; needed hf://datasets/OWNER/NAME or",
        ("hf://datasets/lines",): "is no data set of the Hub",
        ("hf://datasets/owner/lines/train.jsonl",): "its files are chosen by subset and split",
    }  # fmt: skip
    for case, answer in zip(cases, ask(hub, tmp_path, *cases), strict=True):
        assert cases[case] in answer["error"], (case, answer)
        assert "\n" not in answer["error"]


def test_without_the_hub_it_is_said_what_to_do(hub: Hub, tmp_path: Path) -> None:
    (offline,) = ask(hub, tmp_path, ("lines",), HF_HUB_OFFLINE="1")
    assert "owner/lines is on the Hub, and HF_HUB_OFFLINE is set; bring its" in offline["error"]
    assert "set data.path=FOLDER, or unset it" in offline["error"]
    with serve(Hub()) as gone:
        pass
    (unreachable,) = ask(gone, tmp_path, ("lines",))
    assert "owner/lines cannot be read from the Hub: [Errno" in unreachable["error"]
    assert "; start the same command again, or bring its files" in unreachable["error"]


def test_a_broken_connection_loses_and_doubles_no_row(hub: Hub, tmp_path: Path) -> None:
    hub.breaks.update(["train.jsonl", "en/train-0.parquet"])
    found = ask(hub, tmp_path, ("lines",), ("subsets", "en"))
    assert [answer["rows"] for answer in found] == [ROWS, ROWS]
    assert not +hub.breaks


BUILD = """
import sys
from pathlib import Path
from trainer.data.chat import ChatEncoder
from trainer.data.document_data import DocumentData
from trainer.data.pretraining import PretrainingData
from trainer.data.tokenise_job import Texts, TokeniseJob
from trainer.data.tokenizers import ByteTokenizer
hub = {"path": "hf://datasets/owner/subsets", "subset": "en", "max_documents": 60,
       "eval_path": "hf://datasets/owner/lines", "eval_split": "test", "cache": sys.argv[1]}
text = PretrainingData(row_tokens=32, global_rows=2, **hub)
chat = DocumentData(encoder=ChatEncoder(), row_tokens=64, global_documents=2, **hub)
stores = list(text.stores(ByteTokenizer()))
text.check()
chat.check()
for loader in chat.build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1):
    stores.append(loader.rows.store)
print(*(store.fingerprint for store in stores))
"""


def test_texts_and_documents_of_the_hub_are_those_of_files(hub: Hub, tmp_path: Path) -> None:
    """The same tokens, training and evaluation, in both kinds of data."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[:60]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS[:9]))
    here: Any = {
        "path": str(tmp_path / "a.jsonl"), "eval_path": str(tmp_path / "b.jsonl"),
        "cache": str(tmp_path / "cache"),
    }  # fmt: skip
    text = PretrainingData(row_tokens=32, global_rows=2, **here)
    chat = DocumentData(encoder=ChatEncoder(), row_tokens=64, global_documents=2, **here)
    stores = list(text.stores(ByteTokenizer()))
    for loader in chat.build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1):
        assert loader is not None
        stores.append(loader.rows.store)
    done = python(hub, tmp_path, "-c", BUILD, str(tmp_path / "other"))
    assert done.stdout.split() == [store.fingerprint for store in stores if store], done.stderr


TOKENISE = """
import sys
from trainer.data.tokenise_job import Texts, TokeniseJob
output, *paths = sys.argv[1:]
for path in paths:
    job = TokeniseJob(output=output, tokenizer="byte", shard_tokens=3000, workers=1,
                      data=Texts(path=path))
    try:
        job.check()
        job.run()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_an_interrupted_tokenisation_goes_on_at_the_same_commit(hub: Hub, tmp_path: Path) -> None:
    """The second file is out of reach at first; then a newer commit appears."""
    rows = [{"text": f"row {n}"} for n in range(1300)]  # 1,024 are tokenised at a time
    long = hub.repositories["owner/long"] = Repository(
        [{"train-0.jsonl": jsonl(rows[:1200]), "train-1.jsonl": jsonl(rows[1200:])}]
    )
    (tmp_path / "here.jsonl").write_bytes(jsonl(rows))
    path, old = "hf://datasets/owner/long", f"hf://datasets/owner/long@{long.sha()}"

    def tokenise(*paths: str) -> str:
        return str(python(hub, tmp_path, "-c", TOKENISE, str(tmp_path / "there"), *paths).stdout)

    def shards(output: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / output).glob("*.shard")}

    hub.missing.add("train-1.jsonl")
    assert tokenise(path).startswith(f"DataError: data.path={path} cannot be read from the Hub: ")
    kept = shards("there")
    assert kept
    hub.missing.clear()
    long.commits.append({"train.jsonl": jsonl(rows[:1])})
    said = tokenise(path, old).splitlines()
    assert len(said) == 1
    assert f"was begun with data.path={old}, not {path}@" in said[0]
    TokeniseJob(
        output=str(tmp_path / "whole"), tokenizer="byte", shard_tokens=3000, workers=1,
        data=Texts(path=str(tmp_path / "here.jsonl")),
    ).run()  # fmt: skip
    assert shards("there") == shards("whole")
    assert kept.items() <= shards("there").items()
