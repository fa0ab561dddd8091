"""The words of commands: what is known is read, all else is refused in one line."""

import pytest

from launch.cli import main
from launch.exit_codes import BAD_CONFIG
from launch.words import options_of, refuse_idle, split_off

NEEDED, DEFAULTS = {"run": "DIR"}, {"json": "false"}


def read(*words: str) -> dict[str, str]:
    return options_of("peek", words, needed=NEEDED, defaults=DEFAULTS, optional=["step"])


def test_options_have_their_text_or_their_default_and_optional_ones_may_be_absent() -> None:
    assert read("run=a=b") == {"run": "a=b", "json": "false"}
    assert read("step=3", "json=true", "run=x") == {"run": "x", "step": "3", "json": "true"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stp=3"], "unknown key stp; did you mean step? see tessera peek --help"),
        (["xyzzy=3"], "unknown key xyzzy; see tessera peek --help"),
        (["run.x=3"], "unknown key run.x; did you mean run? see tessera peek --help"),
        (["--run=x"], "'--run=x' is no option; write key=value, see tessera peek --help"),
        (["run"], "'run' is no option; write key=value, see tessera peek --help"),
        (["run=x", "run=x"], "tessera peek has run twice; leave one of them out"),
        (["json=true"], "run is missing; set run=DIR, see tessera peek --help"),
        (["run="], "run is missing; set run=DIR, see tessera peek --help"),
    ],
)
def test_words_that_fit_no_option_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # compared whole
        read(*words)
    assert str(caught.value) == message


def test_own_options_are_split_off_and_the_rest_stays_as_it_is() -> None:
    words = ["data=a", "steps=3", "~task", "data=a"]
    assert split_off("peek", words, ["steps"]) == ({"steps": "3"}, ["data=a", "~task", "data=a"])
    with pytest.raises(ValueError, match="tessera peek has steps twice"):
        split_off("peek", ["steps=3", "steps=4"], ["steps"])


@pytest.mark.parametrize(
    "command",
    ["checkpoints", "convert", "doctor", "export", "generate", "inspect", "ledger",
     "replay", "sync", "tokenize", "verify"],
)  # fmt: skip
def test_every_command_refuses_a_dashed_word_in_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--fast=1"]) == BAD_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert "'--fast=1' is no option; write key=value" in line


@pytest.mark.parametrize("command", ["train", "verify", "inspect", "evaluate"])
def test_an_option_among_the_words_of_a_config_is_given_once(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "dry_run" if command == "train" else "json"
    assert main([command, f"{key}=true", f"{key}=false"]) == BAD_CONFIG
    assert f"tessera {command} has {key} twice" in capsys.readouterr().err


def test_typed_settings_of_answers_need_answers_and_those_of_a_recipe_may_stay() -> None:
    recipe = {"validation": {"every": None, "max_new_tokens": 8}}
    refuse_idle(["experiment=idefics_vqa", "validation.every=null"], recipe)
    typed = ["validation.every=1", "+validation.max_new_tokens=4"]
    refuse_idle(typed, {"validation": {"every": 1, "max_new_tokens": 4}})
    with pytest.raises(ValueError, match=r"^validation\.max_new_tokens=4 has no effect, .*every=1"):
        refuse_idle(typed[1:], recipe)
