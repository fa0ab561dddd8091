"""A29: what may change between the starts of one run, on a run that the command line made."""

from pathlib import Path

import pytest

from launch.train import main
from tests.ranks import run_ranks
from tests.runs import train_words
from tests.token_folders import write_folder
from trainer.data.bpe import train_bpe
from trainer.verify.forked import RankFailedError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return the folder of a run of two steps, and its command line."""
    folder = tmp_path_factory.mktemp("drift")
    for name in ("a", "b"):
        write_folder(folder / name, [50] * 40, shard_tokens=600, name="train")
    words = [
        "model=llama_tiny", "model.vocab_size=258", "model.hidden_size=16",
        "model.num_hidden_layers=1", "data=tokens", "data.path=null",
        f"data.sources.a.path={folder / 'a'}", f"data.sources.b.path={folder / 'b'}",
        "data.sources.a.weight=1", "data.sources.b.weight=1", "data.row_tokens=32",
        "data.global_rows=8", "precision=fp32", f"runs={folder / 'runs'}", "name=drift",
        "max_steps=4", "save_every=2", "eval_every=null", "resume_step=2",
    ]  # fmt: skip
    first = [word for word in words if not word.startswith(("max_steps", "resume_step"))]
    run_ranks(1, train_words, folder / "runs" / "drift", [*first, "max_steps=2"])
    return folder, words


FATAL = ["model.hidden_size=32", "model.num_hidden_layers=2", "model.vocab_size=300", "seed=1",
         "data.row_tokens=16"]  # fmt: skip
RECORDED = ["optim.lr=0.5", "max_steps=6", "log_every=3"]


@pytest.mark.parametrize("word", FATAL)
def test_what_would_make_another_run_of_it_is_refused(
    run: tuple[Path, list[str]], word: str
) -> None:
    _, words = run
    key, _, value = word.partition("=")
    message = rf"{key} was \d+ when this run was saved and is {value} now, which would make another"
    for allowed in ("", f"resume_allow=[{key}]"):
        with pytest.raises(ValueError, match=message):
            main([*words, word, *filter(None, [allowed]), "dry_run=true"])


@pytest.mark.parametrize(
    ("word", "key"), [("optim=muon", "optim._target_"), ("optim=adamw8bit", "optim.states")]
)
def test_an_optimizer_that_keeps_other_state_is_refused_before_any_process_starts(
    run: tuple[Path, list[str]], word: str, key: str
) -> None:
    _, words = run
    with pytest.raises(ValueError, match=f"{key} was .* now, which would make another run of it"):
        main([*words, word, "dry_run=true"])


def test_state_that_the_optimizer_does_not_keep_is_a_setting_to_change(
    run: tuple[Path, list[str]],
) -> None:
    """Where no config of before is compared: a Python caller, or settings that the class keeps."""
    folder, words = run
    with pytest.raises(
        RankFailedError, match="set model, optim and precision to those of the save"
    ):
        run_ranks(1, train_words, folder / "runs" / "drift", [*words, "optim=sgd"])


@pytest.mark.parametrize("word", RECORDED)
def test_what_is_recorded_is_allowed_and_said(
    run: tuple[Path, list[str]], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, words = run
    key, _, value = word.partition("=")
    assert main([*words, word, "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert f"# changed since this run was saved: {key}: " in printed
    assert f" -> {value}\n" in printed


def test_the_global_batch_changes_when_it_is_allowed_by_name(
    run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, words = run
    with pytest.raises(ValueError, match=r"set it back, or allow it with resume_allow=\[data"):
        main([*words, "data.global_rows=4", "dry_run=true"])
    allowed = ["data.global_rows=4", "resume_allow=[data.global_rows]"]
    assert main([*words, *allowed, "dry_run=true"]) == 0
    assert "data.global_rows: 8 -> 4" in capsys.readouterr().out


MIXES = {
    "weights": ["data.sources.a.weight=3"],
    "a new source": ["data.sources.c.path={}/c", "data.sources.c.weight=1"],
    "one less": [],
}


@pytest.mark.parametrize("name", MIXES)
def test_the_mixture_changes_when_it_is_allowed_by_name(
    run: tuple[Path, list[str]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, words = run
    if not (folder / "c").exists():
        write_folder(folder / "c", [50] * 10, shard_tokens=600, name="train")
    if name == "one less":
        words = [word for word in words if not word.startswith("data.sources.b.")]
    words = [*words, *(word.format(folder) for word in MIXES[name]), "dry_run=true"]
    message = (
        r": the mixture was a weight 1, b weight 1 when this run was saved and is .*; "
        r"set data\.sources back, or allow it with resume_allow=\[data\.mix\]$"
    )
    with pytest.raises(ValueError, match=message):
        main(words)
    assert main([*words, "resume_allow=[data.mix]"]) == 0
    assert "# changed since this run was saved: data.sources." in capsys.readouterr().out


def test_shares_of_the_same_proportions_are_no_other_mixture(run: tuple[Path, list[str]]) -> None:
    _, words = run
    scaled = ["data.sources.a.weight=0.5", "data.sources.b.weight=0.5"]
    assert main([*words, *scaled, "dry_run=true"]) == 0


@pytest.mark.parametrize("change", ["shard", "tokenizer", "mix"])
def test_other_data_behind_the_same_names_is_refused(
    run: tuple[Path, list[str]], change: str
) -> None:
    """The data are known by their content, so these show when the checkpoint is taken up."""
    folder, words = run
    saved = {path: path.read_bytes() for name in ("a", "b") for path in (folder / name).iterdir()}
    if change == "shard":
        message = r"the data's fingerprint of data\.sources\.b is"
        write_folder(folder / "b", [51] * 40, shard_tokens=600, name="train")
    elif change == "tokenizer":
        message = "another one than made the shards"
        train_bpe(folder / "a", ["some text to learn"], 258)
    else:
        message = r"data\.sources had the shares a 1, b 1 .* resume_allow=\[data\.mix\]"
        words = [*words, "data.sources.a.weight=3"]
    try:
        with pytest.raises(Exception, match=message):
            run_ranks(1, train_words, folder / "runs" / "drift", words)
    finally:
        for path, content in saved.items():
            path.write_bytes(content)


def test_without_a_change_it_goes_on(run: tuple[Path, list[str]]) -> None:
    folder, words = run
    run_ranks(1, train_words, folder / "runs" / "drift", words)
    assert (folder / "runs" / "drift" / "checkpoints" / "step_00000004").is_dir()
