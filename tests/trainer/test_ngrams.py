"""N-grams are counted where there is something to compare, and refused elsewhere at the start."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.launch.test_compose import MANDATORY, bound, rows_in
from tests.runs import tiny_run, train
from tests.token_folders import write_folder
from trainer.callbacks.ngrams import NgramBaselines
from trainer.data.token_folder import TokenFolder
from trainer.distributed import Placement
from trainer.notes import BASELINES, read_note


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "reward"])
def test_a_task_without_bits_per_byte_is_refused_before_the_start(
    task: str, tmp_path: Path
) -> None:
    words = [word.format(**rows_in(tmp_path)) for word in MANDATORY[f"task={task}"]]
    run = bound("experiment=demo", f"task={task}", *words, "eval_every=null")
    message = r"compares bits_per_byte, and evaluations of this task have .*; set callbacks.ngrams"
    with pytest.raises(ValueError, match=message):
        run.check(1)
    replace(run, callbacks={}).check(1)


def test_a_large_vocabulary_is_that_of_the_tokenizer_not_of_the_model() -> None:
    bound("experiment=demo", "model.vocab_size=5000").check(1)
    bound("experiment=demo", "model.vocab_size=4096", "tokenizer=bpe").check(1)
    with pytest.raises(ValueError, match="at most 4096 tokens, the tokenizer has 4097; set"):
        bound("experiment=demo", "model.vocab_size=4097", "tokenizer=bpe").check(1)


@pytest.mark.parametrize("counts_bytes", [True, False])
def test_text_whose_bytes_nobody_counted_has_nothing_to_compare(
    tmp_path: Path, counts_bytes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(
        tmp_path / "text", [40, 30, 50], shard_tokens=999, name="train", counts_bytes=counts_bytes
    )
    text = str(tmp_path / "text")
    data = TokenFolder(path=text, eval_path=text, row_tokens=16, global_rows=2)
    run = tiny_run(tmp_path, max_steps=2, eval_every=2, callbacks={"ngrams": NgramBaselines()})
    with caplog.at_level(logging.INFO, "trainer"):
        assert train(Placement(), tmp_path / "run", replace(run, data=data, tokenizer="auto"))
    assert bool(read_note(tmp_path / "run", BASELINES)) is counts_bytes
    assert ("no n-grams to compare with: bits per byte are nan" in caplog.text) is not counts_bytes


def test_a_run_without_evaluations_says_that_there_is_nothing_to_compare(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(tmp_path, max_steps=1, eval_every=None, callbacks={"ngrams": NgramBaselines()})
    with caplog.at_level(logging.INFO, "trainer"):
        assert train(Placement(), tmp_path / "run", run)
    assert "no n-grams to compare with: the run evaluates nothing; set eval_every" in caplog.text
