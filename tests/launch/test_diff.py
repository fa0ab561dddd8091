"""Two runs side by side: what differs, from which step on, and by how much."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.diff.series import read_losses
from launch.diff.trainer_state import read_state
from tests.made_runs import TARGETS, append_steps, loss_of, made_run
from trainer.files import write_json


def diffed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and what `json=true` says, the series by name."""
    code = main(["diff", *words, "json=true"])
    found = json.loads(capsys.readouterr().out)
    return code, found | {drift["name"]: drift for drift in found["losses"]}


def a_little_off(step: int) -> float:
    loss = loss_of(step)
    return loss if step < 7 else loss + 1e-13 if step < 20 else loss * 1.01


def test_runs_with_the_same_numbers_are_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = made_run(tmp_path / "a"), made_run(tmp_path / "b", config={"name": "b", "runs": "else"})
    assert main(["diff", f"a={a}", f"b={b}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["equal"] * 7 + ["loss"]
    assert (
        lines[6] == "loss             equal at all 40 common steps (of each step, from the ledgers)"
    )


def test_the_first_bit_that_differs_is_found_and_the_largest_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = made_run(tmp_path / "a"), made_run(tmp_path / "b", loss=a_little_off)
    code, found = diffed(capsys, f"a={a}", f"b={b}")
    loss = found["loss"]
    assert (code, found["equal"]) == (1, False)
    assert (loss["first_step"], loss["num_common"], loss["num_different"]) == (7, 40, 34)
    exact = [loss_of(7) * TARGETS / TARGETS, a_little_off(7) * TARGETS / TARGETS]
    assert loss["first_hex"] == [value.hex() for value in exact]
    assert loss["largest"] == pytest.approx(0.01 / 1.01)
    assert loss["last_step"] == 40
    assert loss["last"] == pytest.approx([loss_of(40), loss_of(40) * 1.01])
    assert main(["diff", f"a={a}", f"b={b}"]) == 1
    assert "first     step 7 " in capsys.readouterr().out


def test_what_stands_beside_the_numbers_is_compared_section_by_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = made_run(tmp_path / "a")
    b = made_run(tmp_path / "b", config={"optim": {"lr": 0.001}, "runs": "elsewhere"})
    write_json(b / "environment.json", {"git_commit": "abd+", "packages": {"torch": "2.14"}})
    write_json(b / "notes/about.json", {"fingerprint": "beef", "tokens": 31_620})
    code, found = diffed(capsys, f"a={a}", f"b={b}")
    assert code == 1
    assert found["config"] == {"optim.lr": [0.003, 0.001]}
    assert found["code"] == {"git_commit": ["abc", "abd+"]}
    assert found["environment"] == {"packages.torch": ["2.13", "2.14"]}
    assert found["data"] == {"fingerprint": ["f00d", "beef"]}
    assert main(["diff", f"a={a}", f"b={b}", "only=losses"]) == 0
    assert main(["diff", f"a={a}", f"b={b}", "only=data,losses"]) == 1


def test_runs_that_log_at_other_steps_are_compared_where_both_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = made_run(tmp_path / "a", log_every=4), made_run(tmp_path / "b", log_every=10)
    code, found = diffed(capsys, f"a={a}", f"b={b}")
    assert code == 0
    assert (found["loss"]["num_common"], found["grad_norm"]["num_common"]) == (40, 2)
    for folder in (a, b):
        (folder / "ledger/rank00000.jsonl").unlink()
    code, found = diffed(capsys, f"a={a}", f"b={b}")
    assert (code, found["loss"]["num_common"]) == (
        1,
        0,
    )  # no log point of one covers the steps of another's


def test_steps_that_were_executed_again_count_as_they_survived(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "made")
    append_steps(folder, range(31, 36), attempt=2, loss=lambda step: 9.0)
    with open(folder / "ledger/rank00000.jsonl", "a") as file:
        file.write('{"attempt": 2, "step": 36, "los')
    losses = read_losses(folder)
    assert list(losses) == list(range(1, 36))
    assert [losses[30].mean, losses[31].mean] == [pytest.approx(loss_of(30)), 9.0]


def state_file(folder: Path, text: str) -> Path:
    file = folder / "trainer_state.json"
    file.write_text(f'{{"global_step": 40, "log_history": [{text}]}}')
    return file


def test_a_trainer_state_is_compared_over_the_same_steps_within_what_it_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = made_run(tmp_path / "a")
    means = [sum(map(loss_of, range(first, first + 10))) / 10 for first in (1, 11, 21)]
    entries = ", ".join(
        f'{{"step": {10 * n}, "loss": {mean:.4f}, "grad_norm": {1 / (10 * n):.6f}, '
        '"learning_rate": 0.003}'
        for n, mean in enumerate(means, start=1)
    )
    entries += f', {{"step": 20, "eval_loss": {loss_of(20) + 0.1!r}}}, {{"step": 40, "x": 1}}'
    file = state_file(tmp_path, entries)
    code, found = diffed(capsys, f"a={a}", f"b={file}")
    assert code == 0
    names = ("loss", "grad_norm", "lr", "evaluation loss")
    assert [found[name]["num_common"] for name in names] == [3, 3, 3, 1]
    assert found["loss"]["note"] == "within what was printed, 5e-05 at most"
    worse = state_file(tmp_path, entries.replace(f"{means[1]:.4f}", f"{means[1] + 2e-4:.4f}"))
    code, found = diffed(capsys, f"a={a}", f"b={worse}")
    assert (code, found["loss"]["first_step"]) == (1, 20)


def test_a_number_printed_in_full_is_held_to_a_float32(tmp_path: Path) -> None:
    text = (
        '{"step": 1, "loss": 2.345678806304931}, {"step": 2, "loss": 3}, {"step": 3, "loss": NaN}'
    )
    logged = read_state(state_file(tmp_path, text))["loss"]
    assert logged[1].tolerance == pytest.approx(2.3456788 * 2**-23)
    assert (logged[2].since, logged[2].value) == (1, 3.0)
    assert math.isnan(logged[3].value)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["a=A"], "b is missing; set b=DIR, see tessera diff --help"),
        (["a=A", "b=A", "only=speed"], "only=speed is no section; set some of config, code"),
        (["a=A", "b=A", "c=1"], "unknown key c; "),
        (["a=A", "b=EMPTY"], "holds neither metrics.jsonl nor a ledger; give the folder of a run"),
        (["a=A", "b=A/config.yaml"], "is no trainer_state.json"),
        (["a=A", "b=A", "json=yes"], "json=yes is neither true nor false"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    words: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = made_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    words = [word.replace("EMPTY", str(tmp_path / "empty")).replace("A", str(a)) for word in words]
    assert main(["diff", *words]) == 64
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert what in error
