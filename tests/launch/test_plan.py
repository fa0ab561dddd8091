"""`tessera plan` says what a run would need, and exits with 1 where that does not fit."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import probe
from launch.plan import main
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.planning.devices import DEVICES

SMALL = (
    "experiment=demo", "model.num_hidden_layers=1", "model.hidden_size=32",
    "model.intermediate_size=64", "data.row_tokens=32",
)  # fmt: skip


def test_a_plan_shows_facts_memory_speed_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "device=h100", "processes=2", "mfu=0.5"]) == 0
    out = capsys.readouterr().out
    assert "plan of demo: Llama on 2 processes, dp_replicate 2, precision fp32" in out
    for needed in (
        "17,568: 17,568 trainable, 0 frozen",
        "4 rows of 32 tokens a step = 2 data ranks x micro-batches of 2 rows, 1 accumulated",
        "400 steps x 128 tokens a step = 51,200 tokens",
        "M per token = per matmul weight 2 forward",
        "saved every 200 steps, the newest 2 stay",
        "at an MFU of 50% (given) of the peak in the NVIDIA H100 data sheet",
        "of 79.6 GiB per rank, 0% (h100)",
    ):
        assert needed in out
    assert len(out.splitlines()) < 25


def test_a_device_that_is_too_small_is_a_failed_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEVICES, "l40s", replace(DEVICES["l40s"], memory_gib=1e-4))
    assert main([*SMALL, "device=l40s", "layouts=true", "json=true"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is False
    assert sum(plan["memory"]["by_category"].values()) == plan["memory"]["peak"]
    assert plan["tokens_per_second"] > 0
    assert [row["name"] for row in plan["layouts"]] == ["single"]
    assert plan["layouts"][0]["peak"] == plan["memory"]["peak"]


LONG = (
    *SMALL, "model.num_hidden_layers=2", "data.row_tokens=256", "data.global_rows=4",
    "data.micro_rows=4",
)  # fmt: skip


def test_a_run_that_does_not_fit_is_told_the_most_that_it_may_keep(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(num_bytes: float) -> dict[str, Any]:
        device = replace(DEVICES["l40s"], memory_gib=num_bytes / 2**30)
        monkeypatch.setitem(DEVICES, "l40s", device)
        assert main([*LONG, "device=l40s", "json=true"]) == 1
        plan = json.loads(capsys.readouterr().out)
        assert isinstance(plan, dict)
        return plan

    plan = planned(1)  # no budget is small enough
    most, least = plan["memory"]["peak"], plan["budget_peak"]
    assert plan["budget"] is None
    assert least < 0.9 * most
    has = (most + least) / 2
    plan = planned(has)
    # Blocks are two: the budget that a third one would take does not exist.
    modes = [
        ActivationCheckpointing(mode="budget", budget=budget).modes(2)
        for budget in (plan["budget"], plan["budget"] + 0.05)
    ]
    assert modes[0] != modes[1]
    assert plan["budget_peak"] <= has


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["device=h10"], "did you mean h100"),
        (["processes=0"], "processes=0 is no number of processes"),
        (["mfu=2"], "mfu=2 is no share of a peak"),
        (["layouts=maybe"], "layouts=maybe is neither true nor false"),
        (["procesess=2"], "did you mean processes"),
        (["processes=3"], "data.global_rows=4 is not divisible by 3"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([*SMALL, *words])


def test_a_probe_trains_three_steps_of_the_same_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        seen.extend(command)
        (runs,) = (word.partition("=")[2] for word in command if word.startswith("runs="))
        folder = Path(runs) / "probe"
        folder.mkdir()
        lines = [
            {"split": "train", "tokens_per_second": rate, "memory_gib": 0.5}
            for rate in (1.0, 10.0, 12.0)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(probe.subprocess, "run", run)
    found = probe.probe(["experiment=demo", "max_steps=9", "max_epochs=2"], 2)
    assert (found.tokens_per_second, found.memory_gib) == (11.0, 0.5)
    assert {"max_steps=3", "launch.processes=2", "experiment=demo"} <= set(seen)
    assert not {"max_steps=9", "max_epochs=2"} & set(seen)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_probe_takes_real_steps(processes: int, tmp_path: Path) -> None:
    words = [*SMALL, "data.max_documents=10", f"data.cache={tmp_path}"]
    found = probe.probe(words, processes)
    assert found.tokens_per_second > 0
    assert found.memory_gib > 0.1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_table_has_every_layout_of_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "model.num_hidden_layers=2", "data.micro_rows=1"]
    assert main([*words, "processes=4", "layouts=true", "json=true"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["layouts"]}
    assert {"ddp", "fsdp", "hsdp 2x2", "tp4", "cp4", "pp2 x fsdp2", "zero1", "zero3"} <= set(rows)
    assert "4 stages of 2 layers" in rows["pp4"]["problem"]
    assert all((row["peak"] is None) != (row["problem"] is None) for row in rows.values())
