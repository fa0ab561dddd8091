"""`tessera doctor`, and the floors that it and pyproject.toml have in common."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from launch import doctor
from launch.cli import main
from launch.exit_codes import BAD_CONFIG
from launch.floors import FLOORS, PYTHON, Floor, is_below
from tests.test_architecture import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def floors_of(requirements: list[str]) -> dict[str, str]:
    found = (re.match(r"([\w-]+)>=([\w.]+)", line) for line in requirements)
    return {match[1]: match[2] for match in found if match}


def test_pyproject_and_the_table_have_the_same_floors() -> None:
    ours = {name: floor.version for name, floor in FLOORS.items() if floor.is_ours}
    required = floors_of(PROJECT["dependencies"])
    extras = floors_of(
        [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    )
    assert len(required) == len(PROJECT["dependencies"])
    assert ours == required | {name: extras[name] for name in ours if name not in required}
    assert PROJECT["requires-python"] == ">=" + ".".join(map(str, PYTHON))
    assert all(floor.reason for floor in FLOORS.values())


@pytest.mark.parametrize(
    ("version", "floor", "is_old"),
    [
        ("2.13.0+cpu", "2.11", False), ("2.11", "2.11.0", False), ("2.11.0", "2.11", False),
        ("2.9.1", "2.11", True), ("1.3.7", "1.3.8", True), ("1.10", "1.9", False),
        ("5.3.0rc1", "5.3", False), ("13.0.0", "13.0", False), ("12.3.0", "13.0", True),
    ],
)  # fmt: skip
def test_versions_are_compared_by_their_numbers(version: str, floor: str, is_old: bool) -> None:
    assert is_below(version, floor) is is_old


def test_a_version_below_its_floor_is_said_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    floor = Floor(version="99", reason="CVE-0000-1 (before 99)")
    monkeypatch.setattr(doctor, "FLOORS", {"numpy": floor, "no-such-package": floor})
    assert main(["doctor", f"runs={tmp_path}"]) == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if "BAD" in line]
    (line,) = bad
    assert "numpy" in line
    assert line.endswith("needed >= 99; pip install 'numpy>=99': CVE-0000-1 (before 99)")


def test_the_findings_of_this_machine_are_read_by_programs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = main(["doctor", "json=true", f"runs={tmp_path / 'not' / 'there'}"])
    findings = json.loads(capsys.readouterr().out)
    assert code == (0 if all(finding["is_fine"] for finding in findings) else 1)
    names = [finding["check"] for finding in findings]
    assert names[:2] == ["python", "torch"]
    for name in ("torch build", "cores", "memory", f"disk of {tmp_path}", "/dev/shm",
                 f"writers of {tmp_path}", f"clock of {tmp_path}"):  # fmt: skip
        assert name in names
    assert not list(tmp_path.iterdir())


def test_a_folder_that_everybody_may_write_in_is_bad_unless_sticky(tmp_path: Path) -> None:
    for mode, is_fine in ((0o777, False), (0o1777, True), (0o755, True), (0o775, True)):
        tmp_path.chmod(mode)
        assert doctor.check_writers(tmp_path).is_fine is is_fine


def test_what_is_too_small_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_disk(tmp_path).is_fine
    monkeypatch.setattr(doctor, "MIN_DISK", 1 << 60)
    finding = doctor.check_disk(tmp_path)
    assert not finding.is_fine
    assert finding.remedy == "delete old runs, or set runs=DIR on another disk"
    monkeypatch.setattr(doctor, "MAX_SKEW_SECONDS", -1.0)
    assert not doctor.check_clock(tmp_path).is_fine


@pytest.mark.parametrize("word", ["json=maybe", "fix=true", "--json", "run=x"])
def test_unknown_options_are_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", word]) == BAD_CONFIG
    assert len(capsys.readouterr().err.splitlines()) == 1
