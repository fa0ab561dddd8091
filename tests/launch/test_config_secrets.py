"""A config holds no secret, and takes from the environment only what is named for it."""

from pathlib import Path

import pytest

from launch.cli import main
from launch.compose import compose
from launch.exit_codes import BAD_CONFIG
from tests.secrets import SECRETS, shown

KEYS = ("data.path", "name", "model.path", "tracker.wandb.entity", "runs")
TEXT = ["experiment=pretrain_text", "tokenizer=byte"]


@pytest.mark.parametrize(
    ("key", "name"),
    list(
        zip(
            ["data.path", "name", "model.path", "tracker.wandb.entity", "runs"],
            SECRETS,
            strict=True,
        )
    ),
)
def test_a_secret_in_a_config_is_refused_without_being_shown(
    key: str, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*TEXT, "data.path=x", f"runs={tmp_path / 'runs'}", "model=pretrained", "tracker=wandb"]
    assert main(["train", *words, "model.path=x", f'{key}="{shown(name)}"']) == BAD_CONFIG
    output = capfd.readouterr()
    assert SECRETS[name] not in output.out + output.err
    assert output.err.startswith(f"tessera: {key} holds what looks like a")
    assert len(output.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_secret_on_an_unreadable_command_line_is_not_repeated(
    capfd: pytest.CaptureFixture[str],
) -> None:
    token = SECRETS["hub token"]
    assert main(["train", *TEXT, f"data.path={{{token}: "]) == BAD_CONFIG
    assert token not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["HOME", "TESSERA_TEXTS"])
def test_a_config_may_read_places_and_names_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "/texts")
    tree = compose([*TEXT, f"data.path='${{oc.env:{name}}}/a'"]).tree
    assert tree["data"]["path"] == "/texts/a"


@pytest.mark.parametrize(
    "value", ["${oc.env:HF_TOKEN}", "${oc.env:HF_TOKEN,none}", "${oc.${seed}:HF_TOKEN}"]
)
def test_a_config_may_not_read_other_variables(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-bird")
    with pytest.raises(ValueError, match=r"\S") as refusal:
        compose([*TEXT, "seed=env", f"data.path='{value}'"])
    assert "canary-bird" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TESSERA_TEXTS", raising=False)
    with pytest.raises(ValueError, match=r"^data.path: \$\{oc.env:TESSERA_TEXTS\} is not set"):
        compose([*TEXT, "data.path='${oc.env:TESSERA_TEXTS}'"])
    default = compose([*TEXT, "data.path='${oc.env:TESSERA_TEXTS,texts}'"]).tree
    assert default["data"]["path"] == "texts"


def test_a_secret_in_a_named_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_TEXTS", shown("password in a URL"))
    with pytest.raises(ValueError, match="holds what looks like a URL with a password"):
        compose([*TEXT, "data.path='${oc.env:TESSERA_TEXTS}'"])
