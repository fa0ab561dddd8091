"""Which folder a start lives in, and which changes of config a resumed run may carry."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from trainer.directory import choose_run, is_unfinished, new_attempt
from trainer.drift import check_drift, difference
from trainer.optim import AdamW


def commit_steps(folder: Path, *steps: int) -> None:
    """Let `folder` look like a run with these checkpoints."""
    for step in steps:
        step_folder = folder / f"checkpoints/step_{step:08d}"
        step_folder.mkdir(parents=True)
        (step_folder / "MANIFEST.json").write_text("{}")


def chosen(parent: Path, *, max_steps: int = 10, resume: str = "auto", name: str = "demo") -> str:
    """Return the chosen folder, relative to `parent`; nothing may be made there."""
    before = sorted(parent.rglob("*"))
    folder = choose_run(str(parent), name, max_steps, resume)
    assert sorted(parent.rglob("*")) == before
    return str(folder.relative_to(parent))


def test_fresh_name_gets_its_own_folder(tmp_path: Path) -> None:
    assert chosen(tmp_path) == "demo"
    assert chosen(tmp_path, resume="never") == "demo"


def test_unfinished_run_is_resumed(tmp_path: Path) -> None:
    commit_steps(tmp_path / "demo", 3, 6)
    assert chosen(tmp_path) == "demo"


def test_run_that_died_before_its_first_checkpoint_is_resumed(tmp_path: Path) -> None:
    new_attempt(tmp_path / "demo")
    assert chosen(tmp_path) == "demo"


def test_what_is_only_staged_does_not_finish_a_run(tmp_path: Path) -> None:
    commit_steps(tmp_path / "demo", 6, 10)
    (tmp_path / "demo/checkpoints/step_00000010").rename(
        tmp_path / "demo/checkpoints/step_00000010.tmp-1"
    )
    assert chosen(tmp_path) == "demo"


def test_finished_runs_are_counted_up(tmp_path: Path) -> None:
    commit_steps(tmp_path / "demo", 10)
    assert chosen(tmp_path) == "demo-2"
    commit_steps(tmp_path / "demo-2", 5)
    assert chosen(tmp_path) == "demo-2"
    commit_steps(tmp_path / "demo-2", 10)
    assert chosen(tmp_path) == "demo-3"


def test_larger_max_steps_resumes_a_finished_run(tmp_path: Path) -> None:
    commit_steps(tmp_path / "demo", 10)
    assert chosen(tmp_path, max_steps=11) == "demo"
    commit_steps(tmp_path / "demo-2", 10)
    assert chosen(tmp_path, max_steps=11) == "demo-2"  # the newest of that name
    assert chosen(tmp_path, max_steps=9) == "demo-3"


def test_resume_never_starts_anew_beside_an_unfinished_run(tmp_path: Path) -> None:
    commit_steps(tmp_path / "demo", 3)
    assert chosen(tmp_path, resume="never") == "demo-2"
    commit_steps(tmp_path / "demo-2", 3)
    assert chosen(tmp_path, resume="never") == "demo-3"


def test_another_name_that_begins_alike_is_another_run(tmp_path: Path) -> None:
    commit_steps(tmp_path / "demonstration", 3)
    commit_steps(tmp_path / "demo-x", 3)
    assert chosen(tmp_path) == "demo"


def test_given_folder_is_resumed_whatever_the_name(tmp_path: Path) -> None:
    commit_steps(tmp_path / "demo-2", 10)
    commit_steps(tmp_path / "demo-3", 3)
    assert chosen(tmp_path, resume=str(tmp_path / "demo-2")) == "demo-2"


def test_given_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    with pytest.raises(ValueError, match=r"demo has no checkpoint; give the folder of a run"):
        chosen(tmp_path, resume=str(tmp_path / "demo"))
    with pytest.raises(ValueError, match="resume=newest has no checkpoint"):
        chosen(tmp_path, resume="newest")


def test_symlinked_step_does_not_make_a_run(tmp_path: Path) -> None:
    commit_steps(tmp_path / "elsewhere", 10)
    (tmp_path / "demo/checkpoints").mkdir(parents=True)
    (tmp_path / "demo/checkpoints/step_00000010").symlink_to(
        tmp_path / "elsewhere/checkpoints/step_00000010"
    )
    assert is_unfinished(tmp_path / "demo", 10)
    with pytest.raises(ValueError, match="has no checkpoint"):
        chosen(tmp_path, resume=str(tmp_path / "demo"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-x",
        "a/b",
        "../x",
        "/abs",
        "a b",
        "a\n",
        "\u00e4",
        "a\x00",
        "x" * 101,
    ],
)
def test_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is no folder name; use letters, digits"):
        chosen(tmp_path, name=name)


@pytest.mark.parametrize("name", ["a", "7b", "llama-3.1_8B", "x" * 100])
def test_usual_names_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    assert chosen(tmp_path, name=name) == name


def test_attempts_count_up_and_never_share_a_folder(tmp_path: Path) -> None:
    assert [new_attempt(tmp_path).name for _ in range(3)] == ["001", "002", "003"]
    (tmp_path / "attempts/041").mkdir()
    (tmp_path / "attempts/notes.txt").touch()
    assert new_attempt(tmp_path).name == "042"


SAVED: dict[str, Any] = {
    "model": {"_target_": "models.llama.LlamaSpec", "hidden_size": 16, "num_hidden_layers": 2},
    "data": {
        "path": "a", "row_tokens": 32, "global_rows": 8, "micro_rows": 2, "cache": "c",
        "column": "text", "eval_path": None, "eval_fraction": 0.01,
    },
    "task": {"chunk_tokens": 24},
    "freeze": {"patterns": ["embed"]},
    "optim": {
        "_target_": "trainer.optim.AdamW", "states": "weights", "lr": 0.01, "betas": [0.9, 0.95],
    },
    "schedule": {"warmup_steps": 5},
    "mesh": {"dp_replicate": 1, "dp_shard": 1},
    "engine": {"_target_": "trainer.engines.native.NativeEngine"},
    "checkpoint": {"keep": 2},
    "callbacks": {"console": {"every": 1}},
    "launch": {"processes": 1},
    "name": "demo", "runs": "runs", "seed": 0, "max_steps": 10, "log_every": 1, "eval_every": None,
    "save_every": 3, "precision": "fp32", "tokenizer": "byte", "weights": "random",
    "resume": "auto", "resume_step": None, "resume_allow": [], "max_skipped_in_a_row": 3,
    "timeout_seconds": 20.0,
}  # fmt: skip


def changed(key: str, value: Any) -> dict[str, Any]:
    """Return SAVED with the leaf at the dotted `key` set to `value`."""
    tree = copy.deepcopy(SAVED)
    *parents, leaf = key.split(".")
    branch = tree
    for parent in parents:
        branch = branch[parent]
    branch[leaf] = value
    return tree


def test_same_config_has_no_changes() -> None:
    assert check_drift(SAVED, copy.deepcopy(SAVED), []) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.hidden_size", 32),
        ("model.num_hidden_layers", 3),
        ("model._target_", "models.other.OtherSpec"),
        ("data.row_tokens", 64),
        ("data.column", "content"),
        ("task.chunk_tokens", 12),
        ("freeze.patterns", []),
        ("seed", 1),
        ("precision", "bf16"),
        ("weights", "folder"),
        ("optim._target_", "trainer.muon.Muon"),
        ("optim.states", "8bit"),
    ],
)
def test_change_that_makes_another_run_is_refused_even_if_allowed(key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    was: Any = SAVED
    for name in (*parents, leaf):
        was = was[name]
    with pytest.raises(ValueError, match="another run of it; set it back, or start anew") as found:
        check_drift(SAVED, changed(key, value), [key])
    assert str(found.value).startswith(
        f"{key} was {was} when this run was saved and is {value} now"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", 0.1),
        ("optim.betas", [0.8, 0.9]),
        ("schedule.warmup_steps", 9),
        ("max_steps", 20),
        ("log_every", 5),
        ("eval_every", 5),
        ("save_every", None),
        ("mesh.dp_shard", 2),
        ("engine._target_", "trainer.engines.deepspeed.DeepSpeedEngine"),
        ("checkpoint.keep", 5),
        ("callbacks.console.every", 5),
        ("launch.processes", 4),
        ("data.micro_rows", 1),
        ("data.path", "moved"),
        ("tokenizer", "moved"),
        ("data.cache", "elsewhere"),
        ("data.eval_path", "held-out"),
        ("data.eval_fraction", 0.5),
        ("resume_step", 3),
        ("resume_allow", ["data.global_rows"]),
        ("name", "other"),
        ("runs", "moved"),
        ("max_skipped_in_a_row", 9),
        ("timeout_seconds", 60.0),
    ],
)
def test_change_of_how_it_runs_is_allowed_and_returned(key: str, value: Any) -> None:
    (found,) = check_drift(SAVED, changed(key, value), []).items()
    assert found[0] == key
    assert found[1][1] == value


def test_global_batch_may_change_only_when_allowed_by_name() -> None:
    new = changed("data.global_rows", 16)
    for allowed in ([], ["data"], ["data.row_tokens"]):
        with pytest.raises(
            ValueError,
            match=r"^data\.global_rows was 8 .* is 16 now, .* resume_allow=\[data\.global_rows\]",
        ):
            check_drift(SAVED, new, allowed)
    assert check_drift(SAVED, new, ["data.global_rows"]) == {"data.global_rows": (8, 16)}


def test_key_that_only_one_side_has_is_named_as_absent() -> None:
    new = copy.deepcopy(SAVED)
    new["model"]["rope_theta"] = 10000.0
    del new["launch"]
    assert difference(SAVED, new) == {
        "model.rope_theta": ("(absent)", 10000.0),
        "launch.processes": (1, "(absent)"),
    }
    with pytest.raises(ValueError, match=r"model\.rope_theta was \(absent\)"):
        check_drift(SAVED, new, [])


def test_callback_may_be_switched_off() -> None:
    assert check_drift(SAVED, changed("callbacks.console", None), []) == {
        "callbacks.console": ("(absent)", None),
        "callbacks.console.every": (1, "(absent)"),
    }


def test_group_of_free_settings_may_become_empty_and_full_again() -> None:
    """An empty mapping is a leaf of its own name, without the dot of the keys below it."""
    empty = changed("callbacks", {})
    assert check_drift(SAVED, empty, []).keys() == {"callbacks", "callbacks.console.every"}
    assert check_drift(empty, SAVED, []).keys() == {"callbacks", "callbacks.console.every"}


def test_run_saved_before_answers_could_be_asked_for_goes_on() -> None:
    new = copy.deepcopy(SAVED) | {"validation": {"every": 1}}
    assert check_drift(SAVED, new, []) == {"validation.every": ("(absent)", 1)}


def test_states_that_are_not_said_are_the_default() -> None:
    assert AdamW(lr=1.0).states == SAVED["optim"]["states"]
    silent = copy.deepcopy(SAVED)
    del silent["optim"]["states"]
    assert check_drift(SAVED, silent, []) == check_drift(silent, SAVED, []) == {}
    with pytest.raises(ValueError, match=r"^optim\.states was weights .* and is 8bit now"):
        check_drift(silent, changed("optim.states", "8bit"), [])


def test_allowed_changes_do_not_hide_a_forbidden_one() -> None:
    new = changed("optim.lr", 0.5)
    new["seed"] = 7
    with pytest.raises(ValueError, match=r"^seed was 0"):
        check_drift(SAVED, new, ["data.global_rows"])


@pytest.mark.parametrize("is_parent", [True, False])
def test_run_where_other_users_may_put_theirs_in_its_place_is_refused(
    tmp_path: Path, is_parent: bool
) -> None:
    run = tmp_path / "runs/one"
    run.mkdir(parents=True)
    shared = run.parent if is_parent else run
    shared.chmod(0o777)
    with pytest.raises(ValueError, match=r"can be written by other users \(mode 0777\).*chmod \+t"):
        new_attempt(run)
    shared.chmod(0o1777)  # as /tmp: nobody renames what is not theirs
    assert new_attempt(run).name == "001"


def test_new_run_is_closed_to_other_users(tmp_path: Path) -> None:
    assert new_attempt(tmp_path / "runs/one").parents[1].stat().st_mode & 0o077 == 0


def test_all_keys_that_make_another_run_of_it_are_named_at_once() -> None:
    new = copy.deepcopy(SAVED)
    new["model"] |= {f"a{number}": number for number in range(3)}
    told = "; ".join(
        f"model.a{n} was (absent) when this run was saved and is {n} now" for n in range(3)
    )
    with pytest.raises(ValueError, match=f"^{re.escape(told)}, which .* set them back"):
        check_drift(SAVED, new, [])
    new["model"] |= {f"b{number}": number for number in range(9)}
    with pytest.raises(ValueError, match="; and 8 more keys, which would make another run"):
        check_drift(SAVED, new, [])


def test_run_where_nothing_can_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be made: Not a directory; set runs=DIR where"):
        new_attempt(tmp_path / "file" / "runs" / "demo")
