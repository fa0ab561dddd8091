"""`tessera explain` and `tessera list`: who set a key, what it means, and what else there is."""

import pytest

from launch.cli import main
from launch.compose import compose
from launch.exit_codes import BAD_CONFIG, FINISHED
from launch.fields import fields_of
from launch.known_keys import Known, known_keys
from launch.menu import config_folder, groups
from launch.origins import settings_of


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == FINISHED
    return capsys.readouterr().out


def line_of(file: str, text: str) -> int:
    lines = (config_folder() / f"{file}.yaml").read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if text in line]
    return number


def test_a_key_is_told_with_the_file_that_set_it_and_the_one_that_it_overrode(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = said(capsys, "explain", "optim.lr", "experiment=demo").splitlines()
    assert lines[0] == "optim.lr = 0.003"
    assert lines[1].split() == [
        "set", "by", f"configs/experiment/demo.yaml:{line_of('experiment/demo', 'lr: 3.0e-3')}",
        "3.0e-3",
    ]  # fmt: skip
    assert lines[2].split() == [
        "over", f"configs/optim/adamw.yaml:{line_of('optim/adamw', 'lr:')}", "3.0e-4"
    ]  # fmt: skip
    assert "  meaning   Learning rate where the schedule's factor is 1." in lines
    assert "  type      float" in lines


def test_the_command_line_comes_last_and_counts() -> None:
    found = settings_of("optim.lr", ["experiment=demo", "optim.lr=1", "seed=3"])
    assert [setting.text for setting in found] == ["3.0e-4", "3.0e-3", "optim.lr=1"]
    assert found[-1].place == "the command line"


def test_a_length_on_the_command_line_is_named_as_what_sets_the_other() -> None:
    (_, last) = settings_of("max_epochs", ["max_steps=3"])
    assert "which sets the other length" in last.place


def test_a_value_that_replaces_all_around_a_key_is_told() -> None:
    found = settings_of("callbacks.closing.prompt", ["callbacks.closing=null"])
    assert [setting.text for setting in found] == ["callbacks.closing=null"]


def test_a_group_is_told_with_its_choice_its_choices_and_its_keys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(capsys, "explain", "data", "experiment=demo", "data.micro_rows=2")
    assert text.startswith("data = stdlib\n")
    assert "experiment/demo.yaml" in text.splitlines()[1]
    assert f"choices   {', '.join(groups()['data'])}" in " ".join(text.split("\n            "))
    assert "\n  data.micro_rows = 2\n" in text


def test_a_key_that_nobody_sets_has_the_default_of_its_spec_and_its_legal_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(capsys, "explain", "best.goal")
    assert text.startswith("best.goal = auto\n  set by    its default   trainer/best.py:")
    assert "  choices   auto, min, max\n" in text


def test_what_must_be_set_is_said_where_a_run_would_be_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(capsys, "explain", "model.path", "experiment=sft")
    assert text.startswith("model.path = missing: it must be set\n")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("lr", "did you mean optim.lr?"),
        ("optm.lr", "did you mean optim.lr?"),
        ("max_step", "did you mean max_steps?"),
        ("data.micro_row", "data.micro_rows"),
        ("zzzzzz", "see tessera list"),
    ],
)
def test_an_unknown_key_is_refused_in_one_line_with_the_nearest(
    key: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", key]) == BAD_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert near in line


def test_explain_wants_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "experiment=demo"]) == BAD_CONFIG
    assert "takes one key, found 0" in capsys.readouterr().err


@pytest.mark.parametrize("experiment", ["demo", "sft", "dpo", "sequence_classification"])
def test_every_setting_says_what_it_means(experiment: str) -> None:
    """Those of models have the names and the meaning that they have in Hugging Face's configs."""

    def is_silent(key: str, known: Known) -> bool:
        is_group = isinstance(known.value, dict) and "_target_" in known.value
        return not (is_group or known.field is None or known.field.meaning) and (
            not key.startswith("model.")
        )

    keys = known_keys(compose([f"experiment={experiment}"], is_partial=True).tree)
    assert len(keys) > 100
    assert [key for key, known in keys.items() if is_silent(key, known)] == []


def test_fields_are_read_off_the_source_as_python_has_them() -> None:
    from dataclasses import fields
    from importlib import import_module

    for target in ("trainer.run.Run", "trainer.data.document_data.DocumentData",
                   "models.llama.LlamaSpec", "launch.local.LocalSpec"):  # fmt: skip
        module, _, name = target.rpartition(".")
        spec = getattr(import_module(module), name)
        assert list(fields_of(target)) == [field.name for field in fields(spec)]


def test_list_has_a_line_on_each_choice_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    for group, choices in groups().items():
        lines = said(capsys, "list", group).splitlines()
        assert [line.split()[0] for line in lines] == [f"{group}={choice}" for choice in choices]
        assert all(len(line.split()) > 1 for line in lines)


def test_a_group_that_there_is_not_is_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["list", "dat"]) == BAD_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean data?" in line
