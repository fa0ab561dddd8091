"""Import of Megatron's token files: written by hand here, read exactly, refused where they lie."""

import struct
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.megatron import open_megatron
from trainer.data.shards import Shard
from trainer.data.tokenise_job import Texts, TokeniseJob
from trainer.errors import DataError

CODES = {"u1": 1, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}
DOCUMENTS = [[[256, 5, 6], [7, 257]], [[256, 257]], [[256, 1, 2, 3, 257]]]  # of sequences


def write(folder: Path, documents: list[list[list[int]]] = DOCUMENTS, **changes: Any) -> str:
    """Write the two files by the book, but for `changes`; return the prefix."""
    dtype = changes.get("dtype", "<u2")
    sequences = [sequence for document in documents for sequence in document]
    lengths = changes.get("lengths", [len(sequence) for sequence in sequences])
    size = np.dtype(dtype).itemsize
    pointers = [sum(map(len, sequences[:n])) * size for n in range(len(sequences))]
    borders = [sum(map(len, documents[:n])) for n in range(len(documents) + 1)]
    pointers = changes.get("pointers", pointers)
    borders = changes.get("borders", borders)
    (folder / "a.idx").write_bytes(
        changes.get("magic", b"MMIDIDX\0\0")
        + struct.pack("<Q", changes.get("version", 1))
        + struct.pack("<B", changes.get("code", CODES[dtype]))
        + struct.pack("<QQ", len(lengths), len(borders))
        + np.array(lengths, "<i4").tobytes()
        + np.array(pointers, "<i8").tobytes()
        + np.array(borders, "<i8").tobytes()
        + changes.get("rest", b"")
    )
    tokens = np.array([token for sequence in sequences for token in sequence]).astype(dtype)
    (folder / "a.bin").write_bytes(tokens.tobytes() + changes.get("rest_of_bin", b""))
    return str(folder / "a")


def job(prefix: str, output: Path, **changes: Any) -> TokeniseJob:
    settings = {"tokenizer": "byte", "data": Texts(eval_fraction=0.0), **changes}
    return TokeniseJob(megatron=prefix, output=str(output), **settings)


@pytest.mark.parametrize("dtype", ["<i2", "<i4", "<i8", "<u2"])
@pytest.mark.parametrize("rest", [b"", b"\0" * 4])
def test_every_document_arrives_with_its_tokens(tmp_path: Path, dtype: str, rest: bytes) -> None:
    index, _ = job(write(tmp_path, dtype=dtype, rest=rest), tmp_path / "out").run()
    shard = Shard(tmp_path / "out" / "train-00000.shard")
    flat = [list(chain.from_iterable(document)) for document in DOCUMENTS]
    starts = shard.read("starts", 0, 9)
    assert [shard.tokens(a, b).tolist() for a, b in pairwise(starts.tolist())] == flat
    assert shard.footer.num_bytes == 0
    assert (index.vocabulary.bos_token_id, index.vocabulary.eos_token_id) == (256, 257)


def test_the_shards_say_which_borders_the_documents_really_have(tmp_path: Path) -> None:
    index, _ = job(write(tmp_path, [[[1, 257]], [[2, 3, 257]]]), tmp_path / "out").run()
    assert (index.vocabulary.bos_token_id, index.vocabulary.eos_token_id) == (None, 257)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"MMIDIDY\0\0"}, "begins with"),
        ({"version": 2}, "version 2; needed"),
        ({"code": 6}, "dtype code 6; needed one of"),
        ({"rest": b"\0"}, r"a\.idx has \d+ bytes, its counts say"),
        ({"pointers": [0, 6, 10, 13]}, "sequence 3 begins at byte 13, needed 14"),
        ({"pointers": [0, 10, 6, 14]}, "sequence 1 begins at byte 10, needed 6"),
        ({"lengths": [3, 2, 2, 6]}, r"a\.bin has 24 bytes, a\.idx says 26"),
        ({"rest_of_bin": b"\0\0"}, r"a\.bin has 26 bytes, a\.idx says 24"),
        ({"borders": [0, 3, 2, 4]}, "do not ascend from 0 to 4"),
        ({"borders": [1, 2, 3, 4]}, "do not ascend from 0 to 4"),
        ({"borders": [0, 2, 3]}, "do not ascend from 0 to 4"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        job(write(tmp_path, **changes), tmp_path / "out").check()
    assert not (tmp_path / "out").exists()


def test_a_cut_index_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.idx does not exist"):
        open_megatron(str(tmp_path / "a"))
    write(tmp_path)
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\0\0")
    with pytest.raises(DataError, match="has 9 bytes, its header alone has 34"):
        open_megatron(str(tmp_path / "a"))


@pytest.mark.parametrize(("dtype", "token"), [("<u2", 258), ("<i4", -1)])
def test_a_token_that_the_tokenizer_lacks_is_named_with_its_place(
    tmp_path: Path, dtype: str, token: int
) -> None:
    prefix = write(tmp_path, [[[1, 2]], [[3, token]]], dtype=dtype)
    place = 3 * np.dtype(dtype).itemsize
    with pytest.raises(DataError, match=rf"a\.bin holds token {token} at byte {place}, .* has 258"):
        job(prefix, tmp_path / "out").run()
    assert not list((tmp_path / "out").glob("*.shard"))
