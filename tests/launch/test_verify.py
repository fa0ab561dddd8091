"""`tessera verify` as people run it: tables, faults that it must find, refusals."""

import json
import os

import pytest
import torch

from launch.verify import main
from trainer.verify.layouts import LAYOUTS

QUICK = ["experiment=demo", "steps=5"]


def test_layouts_that_agree_are_listed_with_their_deviations(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*QUICK, "layouts=[fsdp,tp_sp]"]) == 0
    out = capsys.readouterr().out
    assert "LlamaSpec" in out
    assert "one process" in out
    assert "all 2 layouts agree" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("fsdp", "tp_sp"))]
    for name, ranks, *values, _seconds in rows:
        assert name in ("fsdp", "tp_sp")
        assert ranks == "2"
        assert len(values) == 8
        assert all(0 <= float(value) < 1e-4 for value in values)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("dropped_all_reduce", ["ddp: model.embed_tokens.weight: ranks hold copies that differ"]),
        ("doubled_gradient", ["ddp: gradients of model.embed_tokens.weight differs by 1,"]),
        ("shifted_label", ["ddp: gradients of ", "allowed 1e-12"]),
    ],
)
def test_a_fault_is_found_and_its_parameter_named(
    capsys: pytest.CaptureFixture[str], fault: str, words: list[str]
) -> None:
    assert main([*QUICK, "layouts=[ddp]", f"inject={fault}"]) == 1
    err = capsys.readouterr().err
    for word in [*words, "1 of 1 layouts differ"]:
        assert word in err


def test_a_sum_that_is_left_out_is_found_in_every_layout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In its first step: later ones go on from what another faulty layout saved."""
    words = ["layouts=[fsdp,tp,tp_sp,cp,pp]", "inject=dropped_all_reduce", "json=true"]
    assert main([*QUICK, *words]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["layout"] for line in lines] == ["fsdp", "tp", "tp_sp", "cp", "pp"]
    for line in lines:
        found = line["checks"].get("gradients", {"deviation": 0.0, "tolerance": 0.0})
        is_wrong = found["deviation"] > found["tolerance"]
        assert is_wrong or "ranks hold copies that differ" in line["failure"], line


def test_adapters_are_verified_at_the_small_size(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["adapter=dora", "adapter.dropout=0.1", "adapter.targets=[q_proj,layers.29.*,mlp.*]"]
    assert main([*QUICK, *words, "layouts=[fsdp_tp]"]) == 0
    out = capsys.readouterr().out
    for note in ("adapter.dropout=0", "B starts at random", "the small model lacks: layers.29.*"):
        assert note in out
    assert main([*QUICK, *words, "layouts=[ddp]", "inject=doubled_gradient"]) == 1
    assert "q_proj.lora_magnitude_vector differs by 1," in capsys.readouterr().err


def test_virtual_tokens_are_verified_before_made_documents(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*QUICK, "adapter=prompt", "layouts=[fsdp_tp]"]) == 0
    assert "adapter.num_virtual_tokens=3, which fit the small rows" in capsys.readouterr().out
    assert main([*QUICK, "adapter=prompt", "layouts=[ddp]", "inject=doubled_gradient"]) == 1
    assert "additional_embedding.weight differs by 1," in capsys.readouterr().err


def test_json_has_one_object_per_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "layouts=[ddp,tp4_sp]", "json=true", "model.num_attention_heads=6",
                 "model.num_key_value_heads=6", "model.hidden_size=192"]) == 0  # fmt: skip
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["layout"] for line in lines] == ["ddp", "tp4_sp"]
    for line in lines:
        assert line["passes"]
        assert line["checks"]["gradients"]["deviation"] <= 1e-12
    assert lines[1]["resumed_from"] == "ddp"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layouts=[fdsp]"], r"layouts=fdsp is unknown; did you mean fsdp\?"),
        (["inject=nothing"], r"inject=nothing is unknown; set it to one of dropped_all_reduce"),
        (["json=maybe"], r"json=maybe is neither true nor false"),
        (["steps=2"], r"steps=2 is too short a curve; set it to 5 or more"),
        (["max_stepz=3"], r"unknown key max_stepz"),
    ],
)
def test_wrong_options_are_refused(words: list[str], message: str) -> None:
    others = [word for word in QUICK if not word.startswith("steps=")]
    with pytest.raises(ValueError, match=message):
        main([*others, *words])


def test_help_lists_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in LAYOUTS)


def test_a_gpu_of_this_machine_stays_out_of_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks are forked: CUDA cannot start in them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != ""
    )
    assert main([*QUICK, "layouts=[ddp]"]) == 0
    assert "all 1 layouts agree" in capsys.readouterr().out
