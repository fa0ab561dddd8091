"""A run whose mixture changes between two starts: what it trains on is that of plain lists."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launch.cli import main
from launch.exit_codes import CHECK_FAILED, FINISHED
from tests.faults.test_wrong_numbers import BACK
from tests.faults.wrong_numbers import nonsense_run
from tests.ledgers import committed, ledgers
from tests.mixtures import Stretch, slow_order
from tests.ranks import run_ranks
from tests.runs import DieAt, tiny_run, train
from tests.texts import texts_in
from tests.token_folders import write_folder
from tests.trainer.test_replay import again
from trainer.checkpoint.spec import CheckpointSpec
from trainer.data.eval_loader import EvalLoader
from trainer.data.loader import StepLoader
from trainer.data.named_sources import Source
from trainer.data.order import permute, round_keys
from trainer.data.sample_order import SampleOrder
from trainer.data.token_folder import TokenFolder
from trainer.files import read_json
from trainer.mesh import MeshSpec
from trainer.record import read_lines
from trainer.run import Run
from trainer.verify.forked import RankFailedError

ROWS = {"wiki": 31, "code": 12, "talk": 5}
OLD, NEW = {"wiki": 3, "code": 1}, {"wiki": 1, "talk": 2}
SIZE, BORDER, STEPS = 8, 6, 12  # rows of a step, steps before the change, steps
ORDERED = ("wiki", "code", "talk")


@dataclass(frozen=True, kw_only=True)
class Listed(SampleOrder):
    """An order that is a list."""

    rows: tuple[int, ...]

    def locate(self, samples: np.ndarray) -> list[int]:
        return [self.rows[sample] for sample in samples]


@dataclass(frozen=True, kw_only=True)
class ListedLoader(StepLoader):
    """Reads rows by a list."""

    listed: tuple[int, ...]

    @property
    def order(self) -> SampleOrder:  # type: ignore[override]
        order = super().order
        return Listed(**{n: getattr(order, n) for n in ("counts", "numbers", "eras")},
                      rows=self.listed)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ListedFolder(TokenFolder):
    """Builds that loader, over all sources: the slow reference."""

    listed: tuple[int, ...]

    def build(self, **settings: Any) -> tuple[StepLoader, EvalLoader | None]:
        loader, eval_loader = super().build(**settings)
        return ListedLoader(**vars(loader), listed=self.listed), eval_loader


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of rows of 8 tokens; a document of 6 letters fills one."""
    folder = tmp_path_factory.mktemp("tokens")
    for number, (name, rows) in enumerate(ROWS.items()):
        lengths = [6] * rows
        lengths[number] = 5
        write_folder(folder / name, lengths, shard_tokens=80, name="train")
    return folder


def run_of(cache: Path, tokens: Path, weights: dict[str, int], **changes: Any) -> Run:
    settings: dict[str, Any] = {
        "save_every": 3, "deterministic": "topology_free", "mesh": MeshSpec(dp_shard=-1),
        "checkpoint": CheckpointSpec(background=False, keep=9),
    }  # fmt: skip
    run = tiny_run(cache, **(settings | changes))
    sources = {name: Source(path=str(tokens / name), weight=w) for name, w in weights.items()}
    data = TokenFolder(sources=sources, row_tokens=8, global_rows=SIZE, micro_rows=2)
    return replace(run, data=data)


def order_of(border: int) -> list[tuple[str, int]]:
    """Return the samples of a run of STEPS whose mixture changes behind a step, by plain lists."""
    stretches = [Stretch(OLD, border * SIZE), Stretch(NEW, (STEPS - border) * SIZE)]
    return slow_order(stretches, 0)


def reference(cache: Path, tokens: Path, border: int, folder: Path) -> list[str]:
    """Train by the list in one go; return the loss of each step."""
    listed = []
    for source, number in order_of(border):
        key, (epoch, index) = ORDERED.index(source), divmod(number, ROWS[source])
        keys = round_keys("rows", 0, *([key] if key else []), epoch)
        first = sum(ROWS[name] for name in ORDERED[:key])
        listed.append(first + permute(index, ROWS[source], keys))
    run = run_of(cache, tokens, dict.fromkeys(ORDERED, 1), max_steps=STEPS)
    data = ListedFolder(**vars(run.data), listed=tuple(listed))
    run_ranks(1, train, folder, replace(run, data=data))
    return losses(folder)


def losses(folder: Path) -> list[str]:
    """Return the loss of each step of the surviving history, in every bit."""
    return [lines[0]["loss_sum"] for lines in committed(ledgers(folder)).values()]


def configured(folder: Path) -> None:
    """Give each start the config that its mixture stands for, as the command would."""
    for attempt in sorted((folder / "attempts").iterdir()):
        mix = read_json(attempt / "mix.json") if (attempt / "mix.json").exists() else {"eras": []}
        tree = {"deterministic": "topology_free", "data": {"mix": str(mix["eras"][-1:])}}
        (attempt / "config.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture(scope="module")
def changed(tokens: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank; with another mixture on two, which die; and on one again."""
    folder = tmp_path_factory.mktemp("changed") / "run"
    run_ranks(1, train, folder, run_of(cache, tokens, OLD, max_steps=BORDER))
    new = run_of(cache, tokens, NEW, max_steps=STEPS)
    with pytest.raises(RankFailedError, match=r"allow it with resume_allow=\[data\.mix\]"):
        run_ranks(1, train, folder, new)
    allowed = replace(new, resume_allow=["data.mix"], callbacks={"die": DieAt(11)})
    with pytest.raises(RankFailedError, match="died without a result"):
        run_ranks(2, train, folder, allowed)
    run_ranks(1, train, folder, new)  # behind a checkpoint with that mixture nothing changes
    configured(folder)
    return folder


def test_steps_behind_a_change_are_those_of_a_list_in_every_bit_on_one_and_two_ranks(
    changed: Path, tokens: Path, cache: Path, tmp_path: Path
) -> None:
    expected = reference(cache, tokens, BORDER, tmp_path / "listed")
    assert losses(changed) == expected
    assert len(set(expected)) == STEPS
    weights = [
        (folder / f"checkpoints/step_{STEPS:08d}/model/model.safetensors").read_bytes()
        for folder in (changed, tmp_path / "listed")
    ]
    assert weights[0] == weights[1]


def test_a_change_is_written_down(changed: Path) -> None:
    (line,) = [one for one in read_lines(changed / "metrics.jsonl") if one["split"] == "mix"]
    done = Counter(source for source, _ in order_of(BORDER)[: BORDER * SIZE])
    assert line.pop("time")
    assert line == {
        "step": BORDER + 1, "split": "mix", "first_sample": BORDER * SIZE, "was": OLD,
        "becomes": NEW, "done": dict(done),
    }  # fmt: skip
    state = read_json(changed / f"checkpoints/step_{STEPS:08d}/state/state.json")["data"]
    assert read_json(changed / "attempts/004/mix.json") == state["mix"]
    assert state["mix"]["eras"][1] == [BORDER * SIZE, [1, 0, 2], [done["wiki"], done["code"]]]
    assert len(json.dumps(state)) < 1024


def proved(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["ledger", f"run={folder}", "json=true"])
    return code, json.loads(capsys.readouterr().out)


def test_the_ledger_proves_each_source_over_the_change(
    changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = proved(changed, capsys)
    assert (code, found["findings"]) == (FINISHED, [])
    assert found["samples"] == STEPS * SIZE
    assert found["mixtures"] == 2
    assert found["compared"] >= 1  # step 10 of both starts, with the same mixture
    assert found["by_source"] == dict(Counter(source for source, _ in order_of(BORDER)))
    assert main(["ledger", f"run={changed}"]) == FINISHED
    assert "by source, over 2 mixture(s): wiki " in capsys.readouterr().out


@pytest.mark.parametrize("place", ["count", "start", "first"])
def test_mixtures_that_do_not_fit_are_found(
    changed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    folder = Path(shutil.copytree(changed, tmp_path / "run"))
    path = folder / f"checkpoints/step_{STEPS:08d}/state/state.json"
    state = read_json(path)
    era = state["data"]["mix"]["eras"][1]
    if place == "count":
        era[2][0] += 1
        message = f"sample {BORDER * SIZE}: the mixture that begins here says that"
    elif place == "start":
        era[1][2] = 5
        message = "step 7: attempt 3 followed another mixture than the newest checkpoint says"
    else:
        era[0] -= SIZE
        message = f"sample {(BORDER - 1) * SIZE}: the mixture that begins here says that"
    path.write_text(json.dumps(state))
    code, found = proved(folder, capsys)
    assert code == CHECK_FAILED
    assert any(message in one for one in found["findings"])


@pytest.mark.parametrize(("step", "weights"), [(5, OLD), (8, NEW), (11, NEW)])
def test_steps_before_and_behind_a_change_are_replayed(
    changed: Path, tokens: Path, cache: Path, step: int, weights: dict[str, int]
) -> None:
    run = run_of(cache, tokens, weights, max_steps=STEPS)
    found = again(run, changed, step)
    assert found.start == (step - 1) // 3 * 3
    assert found.is_same_bits


def test_going_back_before_a_change_makes_it_there(
    changed: Path, tokens: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(changed, tmp_path / "run"))
    back = run_of(cache, tokens, NEW, max_steps=STEPS, resume_step=3)
    with pytest.raises(RankFailedError, match=r"resume_allow=\[data\.mix\]"):
        run_ranks(1, train, folder, back)
    folder = Path(shutil.copytree(changed, tmp_path / "again"))
    run_ranks(2, train, folder, replace(back, resume_allow=["data.mix"]))
    configured(folder)
    assert losses(folder) == reference(cache, tokens, 3, tmp_path / "listed")
    code, found = proved(folder, capsys)
    assert (code, found["findings"]) == (FINISHED, [])
    assert found["by_source"] == dict(Counter(source for source, _ in order_of(3)))


@pytest.mark.slow
def test_a_rewind_over_a_change_keeps_what_follows_also_in_another_process(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The change lies behind step 24; step 28 is nonsense, and step 20 is gone back to."""
    more = tmp_path / "more.jsonl"
    more.write_text("".join(texts_in(cache).read_text().splitlines(keepends=True)[20:40]))
    old = nonsense_run(cache, range(0), **(BACK | {"max_steps": 24}))
    run_ranks(1, train, tmp_path / "whole", old)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    sources = {
        "text": Source(path=old.data.path, weight=3),
        "more": Source(path=str(more), weight=1),
    }
    changes = {"data_path": None, "data_sources": sources, "resume_allow": ["data.mix"]}
    new = nonsense_run(cache, range(27 * SIZE, 28 * SIZE), **BACK, **changes)
    run_ranks(1, train, tmp_path / "whole", new)
    assert read_json(tmp_path / "whole/rewinds.json")["20"]["mix"]["eras"][1][0] == 24 * SIZE
    with pytest.raises(RankFailedError, match="died without a result"):
        # Only behind the rewind does this start come to that step.
        run_ranks(1, train, tmp_path / "killed", replace(new, callbacks={"die": DieAt(22)}))
    run_ranks(1, train, tmp_path / "killed", replace(new, resume_allow=[]))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    stretches = [Stretch({"text": 1}, 24 * SIZE), Stretch({"text": 3, "more": 1}, 24 * SIZE)]
    trained = [n for n in range(48 * SIZE) if not 20 * SIZE <= n < 28 * SIZE]
    expected = Counter(slow_order(stretches, 0)[n][0] for n in trained)
    for name in ("whole", "killed"):
        configured(tmp_path / name)
        code, found = proved(tmp_path / name, capsys)
        assert (code, found["findings"]) == (FINISHED, [])
        assert found["passed_over"] == [[20 * SIZE, 28 * SIZE]]
        assert found["by_source"] == dict(expected)
