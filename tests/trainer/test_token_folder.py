"""`data=tokens`: trains as the text would, and refuses what does not fit."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.runs import tiny_run, train
from tests.token_folders import write_folder
from trainer.data.bpe import train_bpe
from trainer.data.pretraining import PretrainingData
from trainer.data.token_folder import TokenFolder
from trainer.data.tokenise_job import Texts, TokeniseJob
from trainer.data.tokenizers import ByteTokenizer
from trainer.distributed import Placement
from trainer.errors import DataError


def texts(folder: Path, count: int = 60) -> Path:
    path = folder / "texts.jsonl"
    lines = [json.dumps({"text": f"document {n} " * (n % 9 + 1)}) for n in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    data = Texts(path=str(texts(folder)), eval_fraction=0.2)
    TokeniseJob(output=str(folder / "out"), tokenizer="byte", workers=1, data=data).run()
    return folder / "out"


def spec(path: Path, **changes: object) -> TokenFolder:
    settings: dict[str, object] = {"row_tokens": 32, "global_rows": 4, **changes}
    return TokenFolder(path=str(path), **settings)  # type: ignore[arg-type]


def losses(run_folder: Path) -> list[tuple[str, float]]:
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [(line["split"], line["loss"]) for line in lines]


def test_a_run_on_shards_is_the_run_on_their_text_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    text = PretrainingData(
        path=str(texts(tmp_path)), eval_fraction=0.2, row_tokens=32, global_rows=4,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    tokens = spec(shards)
    run = replace(tiny_run(tmp_path, max_steps=4, eval_every=2), data=text)
    assert train(Placement(), tmp_path / "a", run)
    assert train(Placement(), tmp_path / "b", replace(run, data=tokens, tokenizer="auto"))
    found = losses(tmp_path / "b")
    assert found == losses(tmp_path / "a")
    assert {split for split, _ in found} == {"train", "eval"}


def test_auto_takes_the_tokenizer_that_lies_in_the_folder(shards: Path, tmp_path: Path) -> None:
    run = replace(tiny_run(tmp_path), data=spec(shards), tokenizer="auto")
    assert run.tokenizer_setting == str(shards)
    run.check(world_size=1)
    found = run.data.tokenizer(run.tokenizer_setting, run.model.vocab_size)
    assert found.fingerprint == ByteTokenizer().fingerprint


def test_a_vocabulary_that_is_too_small_is_refused(shards: Path, tmp_path: Path) -> None:
    run = replace(tiny_run(tmp_path), data=spec(shards), tokenizer="auto")
    with pytest.raises(ValueError, match=r"has 258 tokens, model\.vocab_size=257 has fewer rows"):
        replace(run, model=replace(run.model, vocab_size=257)).check(world_size=1)


def test_shards_without_a_held_out_part_need_eval_path(shards: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [50] * 5, shard_tokens=60, name="train")
    run = replace(tiny_run(tmp_path, eval_every=2), data=spec(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"nothing to evaluate on; set data\.eval_path or"):
        run.check(world_size=1)
    data = spec(tmp_path / "a", eval_path=str(shards))
    replace(run, data=data).check(world_size=1)
    _, evaluation = data.stores()
    assert evaluation is not None
    assert evaluation.parts[0].name == "eval"
    _, whole = spec(shards, eval_path=str(tmp_path / "a")).stores()
    assert whole is not None
    assert (whole.parts[0].name, whole.num_documents) == ("train", 5)


def test_another_tokenizer_is_refused_with_the_right_one(shards: Path, tmp_path: Path) -> None:
    train_bpe(tmp_path / "bpe", ["some text to learn"], 300)
    with pytest.raises(ValueError, match=f"were made with .*; set tokenizer={shards}"):
        spec(shards).tokenizer(str(tmp_path / "bpe"), 300)
    with pytest.raises(ValueError, match=r"tokenizer=bpe is trained on text.*set tokenizer=auto"):
        spec(shards).tokenizer("bpe", 300)
    job = TokeniseJob(
        output=str(tmp_path / "out"), tokenizer=str(tmp_path / "bpe"), workers=1,
        data=Texts(path=str(texts(tmp_path))),
    )  # fmt: skip
    job.run()
    with pytest.raises(ValueError, match=f"eval_path=.*another tokenizer.*tokenizer={shards}"):
        spec(shards, eval_path=str(tmp_path / "out")).check()


def test_folders_that_hold_no_finished_shards_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path=.*nothing is no folder; give one"):
        spec(tmp_path / "nothing").check()
    with pytest.raises(ValueError, match=r"data\.path=.* holds no shard; make some: tessera"):
        spec(tmp_path).check()
    with pytest.raises(ValueError, match=r"data\.eval_path=.* holds no shard"):
        spec(shards, eval_path=str(tmp_path)).check()
    write_folder(tmp_path / "a", [50] * 5, shard_tokens=60, name="train")
    (tmp_path / "a" / "index.json").unlink()
    with pytest.raises(ValueError, match="is unfinished; start its tessera tokenize again"):
        spec(tmp_path / "a").check()
    write_folder(tmp_path / "b", [50], shard_tokens=60, name="eval")
    with pytest.raises(ValueError, match="holds no training document"):
        spec(tmp_path / "b").check()


def test_a_damaged_or_missing_shard_is_found_before_training(tmp_path: Path) -> None:
    write_folder(tmp_path, [50] * 5, shard_tokens=60, name="train")
    path = tmp_path / "train-00002.shard"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=f"{path} has"):
        spec(tmp_path).check()
    path.unlink()
    with pytest.raises(DataError, match=f"{path} cannot be read at byte 0: No such file"):
        spec(tmp_path).check()
