"""Weight files of the JAX world: Flax's msgpack, in one file or in shards, and npz.

Format: `flax.serialization` and the Flax checkpoints of transformers 4. A tree is nested dicts of
torch tensors.
"""

import json
import math
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor

from models.gemma_trees import Tree, flatten, nest
from trainer.errors import StorageError
from trainer.files import write_json

SINGLE, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
MAX_CHUNK = 2**30  # bytes of one msgpack array; Flax cuts larger ones
_MAX_RATIO, _SMALL = 20, 1 << 20  # of an npz: unpacked to packed bytes, and what is always allowed
_ARRAY, _SCALAR = 1, 3  # codes of msgpack extension types; 2 is a complex number
_CHUNKED = "__msgpack_chunked_array__"
_NAMES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16,
    "bfloat16": torch.bfloat16, "int64": torch.int64, "int32": torch.int32, "int16": torch.int16,
    "int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
_DTYPES = {dtype: name for name, dtype in _NAMES.items()}


def read_flax(folder: Path) -> Tree:
    """Return the tree of a folder's Flax weights.

    Raises ValueError where there are none, StorageError where a file is damaged or missing.
    """
    if (folder / SINGLE).is_file():
        return _read_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has no {SINGLE}; give a folder with Flax weights")
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{folder / INDEX} is no index of weights: {error!r}") from error
    leaves: dict[str, Tensor] = {}
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise StorageError(f"{folder / file} is missing, which {INDEX} names; fetch it again")
        leaves |= flatten(_read_file(folder / file))
    if lost := sorted(set(weight_map) - set(leaves)):
        raise StorageError(f"{folder}: no file holds {lost[0]}, which {INDEX} names")
    return nest(leaves)


def write_flax(folder: Path, tree: Tree, *, max_file_gb: float = 5.0) -> None:
    """Write the tree; more than `max_file_gb` (1e9 bytes) go into shards with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    filled, total = 0, 0
    for path, leaf in flatten(tree).items():
        if shards[-1] and filled + leaf.nbytes > max_file_gb * 1e9:
            shards.append({})
            filled = 0
        shards[-1][path] = leaf
        filled, total = filled + leaf.nbytes, total + leaf.nbytes
    if len(shards) == 1:
        _write_file(folder / SINGLE, tree)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"flax_model-{number:05d}-of-{len(shards):05d}.msgpack"
        _write_file(folder / file, nest(shard))
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _msgpack() -> Any:
    try:
        import msgpack
    except ImportError:
        raise ValueError("Flax files need msgpack; pip install 'tessera-train[jax]'") from None
    return msgpack


def _read_file(path: Path) -> Tree:
    msgpack = _msgpack()

    def decoded(code: int, data: bytes) -> Any:
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"extension type {code} is no array")
        shape, name, content = msgpack.unpackb(data, raw=False)
        return _tensor(content, name, shape)

    try:
        # Keys of Flax trees are text; anything else is another kind of file.
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=decoded, raw=False)
        whole = _joined(tree)
    except (ValueError, KeyError, TypeError, RuntimeError, msgpack.UnpackException) as error:
        raise StorageError(f"{path} holds no Flax weights, or not all: {error}") from error
    if not isinstance(whole, dict):
        raise StorageError(f"{path} holds no tree of weights")
    return whole


def _tensor(content: bytes, name: str, shape: list[int]) -> Tensor:
    if name not in _NAMES:
        raise ValueError(f"dtype {name} has no counterpart in torch")
    dtype = _NAMES[name]
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(content)} bytes for an array {list(shape)} of {name}")
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)


def _joined(node: Any) -> Any:
    """Put arrays together that were cut into chunks."""
    if not isinstance(node, dict):
        return node
    if _CHUNKED not in node:
        return {key: _joined(value) for key, value in node.items()}
    shape = [node["shape"][str(i)] for i in range(len(node["shape"]))]
    chunks = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
    return torch.cat(chunks).view(shape)


def _write_file(path: Path, tree: Tree) -> None:
    msgpack = _msgpack()

    def packed(leaf: Tensor) -> Any:
        flat = leaf.detach().cpu().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy().tobytes()
        shape = tuple(leaf.shape)
        return msgpack.ExtType(_ARRAY, msgpack.packb((shape, _DTYPES[leaf.dtype], content)))

    def chunked(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: chunked(value) for key, value in node.items()}
        if node.nbytes <= MAX_CHUNK:
            return packed(node)
        parts = node.reshape(-1).split(max(1, MAX_CHUNK // node.dtype.itemsize))
        return {
            _CHUNKED: True,
            "shape": {str(i): size for i, size in enumerate(node.shape)},
            "chunks": {str(i): packed(part) for i, part in enumerate(parts)},
        }

    path.write_bytes(msgpack.packb(chunked(tree), strict_types=True))


def read_npz(path: Path) -> Tree:
    """Return the tree of an npz file, whose names are paths joined by `/`.

    numpy has no bfloat16: it stores one as two opaque bytes, which are read as such.
    """
    leaves = {}
    try:
        _check_npz(path)
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            for name in file.files:
                array = file[name]
                if array.dtype == np.dtype("V2"):
                    leaves[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
                else:
                    leaves[name] = torch.from_numpy(array)
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise StorageError(f"{path} is no npz file of weights: {error}") from error
    return nest(leaves)


def _check_npz(path: Path) -> None:
    """Raise ValueError where arrays are larger than what is stored, before any is read."""
    with ZipFile(path) as archive:
        for member in archive.infolist():
            if member.file_size > _MAX_RATIO * member.compress_size + _SMALL:
                raise ValueError(
                    f"{member.filename} unpacks {member.compress_size} bytes to {member.file_size}"
                )
            with archive.open(member) as stream:
                is_first = np.lib.format.read_magic(stream) == (1, 0)
                read = np.lib.format.read_array_header_1_0
                shape, _, dtype = (read if is_first else np.lib.format.read_array_header_2_0)(
                    stream
                )
            if math.prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(f"{member.filename} has {member.file_size} bytes for {shape}")


def write_npz(path: Path, tree: Tree) -> None:
    """Write the tree as npz; a bfloat16 leaf as numpy would: two opaque bytes a number."""
    arrays = {}
    for name, leaf in flatten(tree).items():
        tensor = leaf.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            arrays[name] = tensor.view(torch.int16).numpy().view("V2")
        else:
            arrays[name] = tensor.numpy()
    np.savez(path, **arrays)  # type: ignore[arg-type]  # stubs take names for options
