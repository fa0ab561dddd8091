"""Flax's msgpack and npz: there and back, cut arrays, shards, damaged files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.gemma_trees import flatten
from trainer import flax_file
from trainer.errors import StorageError
from trainer.flax_file import read_flax, read_npz, write_flax, write_npz

msgpack = pytest.importorskip("msgpack")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64)


def tree_of(dtype: torch.dtype) -> dict[str, Any]:
    numbers = torch.arange(60).to(dtype)
    return {
        "model": {"a": {"kernel": numbers.view(3, 20)}, "b": {"kernel": numbers[:7].clone()}},
        "scalar": numbers[3].clone(),
        "empty": numbers[:0].view(0, 4).clone(),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    first, second = flatten(found), flatten(expected)
    assert first.keys() == second.keys()
    for path, leaf in second.items():
        assert first[path].dtype == leaf.dtype
        assert torch.equal(first[path], leaf), path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_chunk", [2**30, 16])
def test_a_tree_comes_back_from_msgpack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, max_chunk: int
) -> None:
    monkeypatch.setattr(flax_file, "MAX_CHUNK", max_chunk)
    write_flax(tmp_path, tree_of(dtype))
    assert_same(read_flax(tmp_path), tree_of(dtype))
    raw = (tmp_path / flax_file.SINGLE).read_bytes()
    assert (b"__msgpack_chunked_array__" in raw) == (max_chunk == 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_a_tree_comes_back_from_npz(tmp_path: Path, dtype: torch.dtype) -> None:
    tree = tree_of(dtype)
    write_npz(tmp_path / "params.npz", tree)
    assert_same(read_npz(tmp_path / "params.npz"), tree)


def array(numbers: Any) -> Any:
    """Pack as flax.serialization does: shape, dtype name, row-major bytes."""
    numbers = np.asarray(numbers)
    content = (numbers.shape, numbers.dtype.name, numbers.tobytes("C"))
    return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))


def test_a_file_made_by_hand_as_flax_makes_it_is_read(tmp_path: Path) -> None:
    half = np.arange(3, dtype=np.float32)
    tree = {
        "a": array(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "scalar": msgpack.ExtType(3, msgpack.packb(((), "int32", np.int32(7).tobytes()))),
        "cut": {
            "__msgpack_chunked_array__": True,
            "shape": {"0": 2, "1": 3},
            "chunks": {"0": array(half), "1": array(half + 3)},
        },
    }
    (tmp_path / flax_file.SINGLE).write_bytes(msgpack.packb(tree, strict_types=True))
    expected = torch.arange(6.0).view(2, 3)
    assert_same(
        read_flax(tmp_path),
        {"a": expected, "scalar": torch.tensor(7, dtype=torch.int32), "cut": expected},
    )


def sharded(folder: Path) -> dict[str, Tensor]:
    tree = {str(i): torch.full((100,), float(i)) for i in range(5)}
    write_flax(folder, {"layers": tree}, max_file_gb=800e-9)  # two tensors of 400 bytes
    return tree


def test_shards_and_their_index(tmp_path: Path) -> None:
    tree = sharded(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.msgpack"))
    assert files == [f"flax_model-0000{i}-of-00003.msgpack" for i in (1, 2, 3)]
    index = json.loads((tmp_path / flax_file.INDEX).read_text())
    assert index["metadata"]["total_size"] == 2000
    assert index["weight_map"]["layers/4"] == files[2]
    assert_same(read_flax(tmp_path), {"layers": tree})


def test_damage_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no flax_model.msgpack; give a folder"):
        read_flax(tmp_path)
    sharded(tmp_path)
    (tmp_path / "flax_model-00002-of-00003.msgpack").unlink()
    with pytest.raises(StorageError, match=r"00002-of-00003\.msgpack is missing, which"):
        read_flax(tmp_path)
    write_flax(tmp_path, tree_of(torch.float32))
    path = tmp_path / flax_file.SINGLE
    whole = path.read_bytes()
    for content in (whole[:-40], b"", b"\x93", b"plain text", msgpack.packb([1, 2])):
        path.write_bytes(content)
        with pytest.raises(StorageError, match=f"{path.name} holds no "):
            read_flax(tmp_path)
    for bad in (
        msgpack.ExtType(2, msgpack.packb((1.0, 2.0))),
        msgpack.ExtType(1, msgpack.packb(((2,), "float8_e4m3fn", b"12"))),
        msgpack.ExtType(1, msgpack.packb(((3,), "float32", b"1234"))),
    ):
        path.write_bytes(msgpack.packb({"a": bad}))
        with pytest.raises(StorageError, match="holds no Flax weights, or not all"):
            read_flax(tmp_path)


def test_a_damaged_npz_is_said_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    write_npz(path, tree_of(torch.float32))
    whole = path.read_bytes()
    for content in (whole[:100], b"text"):
        path.write_bytes(content)
        with pytest.raises(StorageError, match=r"params.npz is no npz file of weights"):
            read_npz(path)
