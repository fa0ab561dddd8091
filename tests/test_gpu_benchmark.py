"""The comparison on a GPU works the first time: all of it runs here, on tiny models."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import in_turn
from benchmarks.gpu import train
from benchmarks.gpu.cases import CASES, OURS, THEIRS, Case, write_run
from benchmarks.gpu.sides import Curve, published_flops
from benchmarks.gpu.train import Measured, figures_of

ROOT = Path(__file__).resolve().parent.parent
PEAK = 989e12


def measured(case: Case, side: str, seconds: float, **changes: object) -> Measured:
    given: dict[str, object] = {"seconds": [9.0, seconds, seconds], "is_watched": side == OURS}
    curve = Curve(**(given | changes))  # type: ignore[arg-type]
    return Measured(case=case, side=side, curves=[curve], tokens=16384, peak=PEAK, flops=(8e9, 7e9))


def test_targets_are_judged_by_the_median_step() -> None:
    one, fast = CASES["1b 4096"], CASES["1b 4096 fp8"]
    found = [
        measured(one, OURS, 0.2),
        measured(one, THEIRS, 0.25),
        measured(fast, OURS, 0.2 / 1.3, syncs="called a synchronizing CUDA operation", retries=2),
    ]
    figures = {figure.name: figure for figure in figures_of(found)}
    share = figures["1b 4096, MFU by 6N + 12LdT"]
    assert share.value == pytest.approx(16384 / 0.2 * 8e9 / PEAK)
    assert share.is_met
    assert figures["1b 4096 beside theirs, tokens/s"].value == pytest.approx(1.25)
    assert figures["1b 4096 fp8 beside 1b 4096, tokens/s"].value == pytest.approx(1.3)
    counts = {name: figures[name].value for name in list(figures)[-3:]}
    assert counts == {
        "allocator retries": 2,
        "recompiles after warm-up": 0,
        "cases with a host sync in a step": 1,
    }
    assert not figures["allocator retries"].is_met


def test_a_full_step_of_8b_is_judged_by_the_most_that_it_took() -> None:
    (case,) = (case for case in CASES.values() if case.most_gib is not None)
    for taken, is_met in ((70.0, True), (75.0, False)):
        one = measured(case, OURS, 1.0, peak_gib=60.0, reserved_gib=taken)
        (figure, *_) = figures_of([one])
        assert figure.name == "8b pure_bf16 adamw8bit 4096, memory taken, GiB"
        assert (figure.value, figure.is_met) == (taken, is_met)


@pytest.mark.parametrize(("visible", "seen"), [(None, "0"), ("2,3", "2"), ("", "")])
def test_a_side_sees_one_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None, seen: str
) -> None:
    found = []

    def run(words: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        found.append(env["CUDA_VISIBLE_DEVICES"])
        (Path(words[5]) / "curve.json").write_text(json.dumps({}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    in_turn.run_rounds("benchmarks.gpu.sides", (OURS,), tmp_path, rounds=1, threads=1)
    assert found == [seen]


def test_the_published_formula_of_llama_3_2_1b(tmp_path: Path) -> None:
    case = CASES["1b 4096"]
    run = write_run(case, tmp_path / "run", size="full", is_compiled=False)
    weights = 1_235_814_400  # as its model card counts: the tied table once
    expected = 6 * weights + 12 * 16 * 2048 * 4096
    assert published_flops(run, run.trained_model()) == expected


def test_wrong_words_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["size=huge"], "size=huge is unknown; set it to full or tiny"),
        (["size=tiny", "only=7b"], "only=7b is unknown; set it to some of 1b 4096"),
        (["sizes=tiny"], "sizes=tiny is unknown; set one of size"),
    ):
        assert train.main(words) == 64
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_all_cases_run_on_any_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.train", "size=tiny", "compile=false"],
        cwd=ROOT, capture_output=True, text=True, timeout=380,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    for name, case in CASES.items():
        sides = [line for line in lines if line.startswith(f"| {name} | ")]
        is_left_out = f"{name}: not measured, the package torchao" in done.stderr
        assert len(sides) == (0 if is_left_out else len(case.sides) - is_compiler_s(case)), name
    assert "1b 4096 beside theirs, tokens/s" in done.stdout


def is_compiler_s(case: Case) -> bool:
    """Whether one of the sides compiles, which compile=false leaves out."""
    return "theirs_compiled" in case.sides
