"""`tessera evaluate` says what the run itself said, of runs, steps, folders and adapters."""

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.evaluate import _of_run, _print
from tests.ranks import run_ranks
from tests.runs import train_words
from trainer.distributed import Placement
from trainer.record import read_lines

ROWS = [
    {"text": " ".join(("red", "blue", "sky")[(n * k) % 3] for k in range(1, n % 4 + 2)),
     "label": ("bad", "good")[n * n % 5 > 1]}
    for n in range(40)
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:7]))
    return folder


def words(folder: Path, *more: str) -> list[str]:
    return [
        "experiment=sequence_classification", "tokenizer=byte", f"data.path={folder}/rows.jsonl",
        "data.eval_fraction=0.3", "data.row_tokens=64", "data.global_documents=8", "precision=fp32",
        f"data.cache={folder}/cache", "max_steps=4", "eval_every=2", "save_every=2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(folder: Path, model_folder: Path) -> Path:
    made = words(folder, f"model.path={model_folder}", "best.metric=loss", "optim.lr=1e-2")
    run_ranks(1, train_words, folder / "run", made)
    return folder / "run"


def printed(_: Placement, words: list[str]) -> str:
    """Return what the command prints; in a process of its own, which may start threads."""
    with redirect_stdout(io.StringIO()) as text:
        assert main(["evaluate", *words]) == 0
    return text.getvalue()


def evaluated(*given: str) -> dict[str, Any]:
    (text,) = run_ranks(1, printed, ["json=true", *given])
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def said(run: Path, step: int) -> dict[str, Any]:
    lines = read_lines(run / "metrics.jsonl")
    (line,) = (line for line in lines if line["split"] == "eval" and line["step"] == step)
    return {name: value for name, value in line.items() if name not in ("step", "split", "time")}


def test_a_run_and_its_steps_are_evaluated_as_they_were_in_training(run: Path) -> None:
    assert evaluated(f"checkpoint={run}") == said(run, 4)
    assert evaluated(f"checkpoint={run}/checkpoints/step_00000002") == said(run, 2)
    best = min((2, 4), key=lambda step: said(run, step)["loss"])
    assert evaluated(f"checkpoint={run}/checkpoints/best") == said(run, best)
    (text,) = run_ranks(1, printed, [f"checkpoint={run}"])
    assert f"{said(run, 4)['loss']:.6f}" in text
    assert "confusion (columns are guesses):" in text


def test_one_other_setting_leaves_the_others_of_the_run_as_they_were(run: Path) -> None:
    assert evaluated(f"checkpoint={run}", "seed=1") == said(run, 4)
    exact = evaluated(f"checkpoint={run}", "precision=fp64")
    assert exact["num_targets"] == said(run, 4)["num_targets"]
    assert exact["loss"] == pytest.approx(said(run, 4)["loss"], rel=1e-5)


def test_a_key_below_a_setting_without_keys_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.path=x sets a key of tokenizer, .* 'byte'"):
        _of_run(run / "config.yaml", ["tokenizer.path=x"])


def test_a_run_in_float8_is_evaluated_in_bf16_where_no_gpu_has_float8(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    made = [
        "experiment=demo", "model.num_hidden_layers=1", "precision=fp8", "max_steps=1",
        "engine.float8.emulate=true", "data.max_documents=20", f"data.cache={tmp_path}/cache",
        "data.global_rows=2", "data.eval_fraction=0.2", "eval_every=1", "callbacks={}",
    ]  # fmt: skip
    run_ranks(1, train_words, tmp_path / "run", made)
    *_, last = read_lines(tmp_path / "run" / "metrics.jsonl")
    found = evaluated(f"checkpoint={tmp_path}/run")
    assert found["num_targets"] == last["num_targets"]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-2)  # of rounding to 8 bits


def test_other_data_is_read_by_the_tokenizer_that_was_trained_with(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    assert "\ntokenizer: byte\n" in text
    config.write_text(text.replace("\ntokenizer: byte\n", "\ntokenizer: bpe\n"))
    other = (f"data.path={folder}/rows.jsonl", "data.max_documents=20", "data.eval_fraction=0.5")
    expected = evaluated(f"checkpoint={run}", *other)
    assert evaluated(f"checkpoint={tmp_path}/run", *other) == expected


def test_other_data_and_other_rows_per_pass_give_what_they_should(run: Path, folder: Path) -> None:
    test = f"data.eval_path={folder}/test.jsonl"
    whole = evaluated(f"checkpoint={run}", test)
    assert whole["num_targets"] == 7
    off = evaluated(f"checkpoint={run}", test, "data.packing=off", "data.micro_rows=3")
    assert off["confusion"] == whole["confusion"]
    assert off["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_a_folder_of_transformers_is_evaluated_with_the_names_of_its_config(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.symlink_to(run / "checkpoints" / "step_00000004" / "model")
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in model.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    (folder / "good.jsonl").write_text('{"text": "red sky", "label": "good"}\n' * 2)
    found = evaluated(
        f"checkpoint={moved}", "experiment=sequence_classification", "precision=fp32",
        f"data.eval_path={folder}/good.jsonl", "data.row_tokens=64", f"data.cache={folder}/cache",
    )  # fmt: skip
    assert found["confusion"]["labels"] == ["bad", "good"]
    assert found["num_targets"] == 2


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_an_adapter_is_evaluated_on_its_base(
    adapter: str, folder: Path, model_folder: Path
) -> None:
    made = words(folder, f"model.path={model_folder}", f"adapter={adapter}", "optim.lr=1e-2")
    run_ranks(1, train_words, folder / adapter, made)
    found = evaluated(f"checkpoint={folder / adapter}")
    expected = said(folder / adapter, 4)
    assert found.pop("confusion") == expected.pop("confusion")
    assert found == pytest.approx(expected, rel=1e-6)


def test_answers_of_a_run_are_judged_as_in_training_and_shown(
    folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    pairs = [{"prompt": f"is {n} odd? ", "completion": ("no", "yes")[n % 2]} for n in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    made = [
        "experiment=sft", f"model.path={model_folder}", f"data.path={folder}/pairs.jsonl",
        f"data.cache={folder}/cache", "data.eval_fraction=0.3", "data.row_tokens=64",
        "precision=fp32", "max_steps=30", "max_epochs=null", "eval_every=15", "optim.lr=1e-2",
        "schedule.warmup_steps=0", "validation.every=1", "validation.max_new_tokens=4",
    ]  # fmt: skip
    run_ranks(1, train_words, folder / "answers", made)
    page = tmp_path / "page.html"
    found = evaluated(f"checkpoint={folder}/answers", f"html={page}")
    assert found == said(folder / "answers", 30)
    assert found["exact_match"] > 0.2
    assert "odd?" in page.read_text()
    assert 0 < found["exact_match_question_only"] < 1
    other = f"data.eval_path={folder}/pairs.jsonl"  # also what the run trained on: nothing is known
    assert "exact_match_question_only" not in evaluated(f"checkpoint={folder}/answers", other)
    (folder / "odd.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs[1:7:2]))
    odd = evaluated(f"checkpoint={folder}/answers", f"data.eval_path={folder}/odd.jsonl")
    assert odd["exact_match_question_only"] == 1.0  # by what the run learnt from
    few = evaluated(f"checkpoint={folder}/answers", "validation.max_documents=3")
    assert few["num_answers"] == 3
    assert few["loss"] == found["loss"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "checkpoint is missing; set checkpoint=DIR"),
        (["checkpoint=nowhere"], "is no run with a checkpoint"),
        (["checkpoint={run}", "json=yes"], "json=yes is neither true nor false"),
        (["checkpoint={run}", "data.eval_pth=x"], "did you mean data.eval_path"),
        (["checkpoint={run}", "data.eval_path=x"], "data.eval_path=x does not exist"),
        (["checkpoint={run}", "data.eval_fraction=0"], "has nothing to evaluate on"),
        (["checkpoint={run}", "html=x.html"], "the run asks for none; set validation.every=1"),
        (
            ["checkpoint={run}", "validation.every=1"],
            "needs documents that ask and answer in words",
        ),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(
    run: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *(word.format(run=run) for word in given)]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_numbers_that_json_lacks_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    _print({"loss": float("nan"), "perplexity": float("inf"), "accuracy": 0.5}, is_json=True)
    found = json.loads(capsys.readouterr().out)  # a bare NaN would be read as a float
    assert found == {"loss": "NaN", "perplexity": "Infinity", "accuracy": 0.5}


def test_file_to_evaluate_on_is_tokenised_once(folder: Path, run: Path, tmp_path: Path) -> None:
    given = [
        f"checkpoint={run}/checkpoints/step_00000004/model",
        "experiment=sequence_classification",
    ]
    cache = tmp_path / "cache"
    alone = [f"data.eval_path={folder}/test.jsonl", f"data.cache={cache}", "data.row_tokens=64"]
    assert evaluated(*given, *alone)["num_targets"] == 7
    assert len(list((cache / "documents").iterdir())) == 1
