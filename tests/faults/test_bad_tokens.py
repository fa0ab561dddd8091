"""A19: tokens outside the vocabulary, and another tokenizer than made them, end a run with 65."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from launch.exit_codes import DATA, code_of
from tests.conftest import Figure
from tests.ranks import run_ranks
from tests.runs import start_in, tiny_run
from tests.token_folders import write_folder
from trainer.construct import fit
from trainer.data.bpe import train_bpe
from trainer.data.shards import BLOCK_BYTES, HASHES, HEADER, TOKENS, Shard
from trainer.data.token_folder import TokenFolder
from trainer.data.tokens import INDEX
from trainer.distributed import Placement
from trainer.run import Run

PLACE = 777  # of the token that is no token


def run_on(folder: Path, cache: Path, **changes: Any) -> Run:
    data = TokenFolder(path=str(folder), row_tokens=32, global_rows=8, micro_rows=2)
    return tiny_run(cache, data=data, tokenizer="auto", max_steps=16, **changes)


def outcome(placement: Placement, folder: Path, run: Run) -> tuple[int, str]:
    """Return the exit code and the message of a run that is refused."""
    try:
        fit(run, start_in(folder, placement))
    except Exception as error:
        return code_of(error), str(error)
    return 0, ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One shard of 4,000 tokens, all of which 16 steps read."""
    write_folder(tmp_path / "tokens", [98] * 40, shard_tokens=1 << 20, name="train")
    return tmp_path / "tokens"


def shard_of(folder: Path) -> Path:
    (path,) = folder.glob("*.shard")
    return path


def spoil(path: Path) -> int:
    """Write a token that the tokenizer lacks; return its byte."""
    section = Shard(path).footer.sections[TOKENS]
    byte = section.offset + PLACE * np.dtype(section.dtype).itemsize
    data = bytearray(path.read_bytes())
    data[byte : byte + 2] = (300).to_bytes(2, "little")
    path.write_bytes(data)
    return byte


def hash_anew(folder: Path) -> None:
    """Make the hashes of the shard, its footer and the index say what is there now."""
    path = shard_of(folder)
    data, place = path.read_bytes(), Shard(path).footer.sections[HASHES]
    blocks = range(HEADER.size, place.offset, BLOCK_BYTES)
    hashes = np.array(
        [xxhash.xxh3_64_intdigest(data[n : min(n + BLOCK_BYTES, place.offset)]) for n in blocks],
        "<u8",
    )
    magic, version, offset, size, _ = HEADER.unpack(data[: HEADER.size])
    tree = json.loads(data[offset : offset + size])
    tree["xxh3_128_of_hashes"] = xxhash.xxh3_128_hexdigest(hashes.data)
    text = json.dumps(tree, indent=1).encode()
    head = HEADER.pack(magic, version, offset, len(text), xxhash.xxh3_128_digest(text))
    path.write_bytes(head + data[HEADER.size : place.offset] + hashes.tobytes() + text)
    index = json.loads((folder / INDEX).read_text())
    index["stores"]["train"][0]["fingerprint"] = xxhash.xxh3_128_hexdigest(text)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("hashes", ["stale", "rebuilt"])
def test_a_token_outside_the_vocabulary_is_named_with_file_and_byte(
    tmp_path: Path, cache: Path, folder: Path, hashes: str, figure: Figure
) -> None:
    path = shard_of(folder)
    byte = spoil(path)
    assert list(Shard(path).damaged())
    if hashes == "rebuilt":
        hash_anew(folder)
        assert not list(Shard(path).damaged())
    ((code, message),) = run_ranks(1, outcome, tmp_path / "run", run_on(folder, cache))
    assert code == DATA
    assert message == (
        f"{path} holds token 300 at byte {byte}, its vocabulary has 258; "
        f"delete {folder} and start again"
    )
    figure(f"A19 token outside the vocabulary, {hashes} hashes", code, "is the exit code")


def test_another_tokenizer_beside_the_shards_is_refused_before_the_first_step(
    tmp_path: Path, cache: Path, folder: Path
) -> None:
    train_bpe(tmp_path / "other", ["some text to learn"], 258)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    ((code, message),) = run_ranks(1, outcome, tmp_path / "run", run_on(folder, cache))
    assert code == DATA
    assert message.startswith(f"{folder}/tokenizer.json (or a file beside it) is another one")
    assert not (tmp_path / "run").exists()


def test_without_any_of_it_the_run_ends_well(tmp_path: Path, cache: Path, folder: Path) -> None:
    assert run_ranks(1, outcome, tmp_path / "run", run_on(folder, cache)) == [(0, "")]
