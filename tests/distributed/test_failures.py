"""One rank fails or does not arrive: all end in time, and what is said names the right one."""

import json
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.faults.injected import Fault, execute_fault, prepare
from tests.ranks import run_ranks
from trainer.distributed import Placement, Ranks
from trainer.mesh import MeshSpec
from trainer.verify.forked import RankFailedError
from trainer.whereabouts import Whereabouts

TIMEOUT_SECONDS = 5.0


def run_fault(
    folder: Path,
    cache: Path,
    fault: Fault,
    ranks: int = 2,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[dict[str, Any]]:
    """Return what each rank left."""
    attempt = folder / "runs" / "tiny" / "attempts" / "001"
    prepare(attempt, cache, fault, timeout_seconds)
    assert set(run_ranks(ranks, execute_fault, attempt)) == {70}
    return [json.loads((attempt / f"exit.{rank:05d}.json").read_text()) for rank in range(ranks)]


def test_error_of_one_rank_is_told_with_its_step_and_samples_by_every_rank(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fault = Fault(kind="error", phase="train_step")
    # Nobody waits for its time to be over: it is far beyond the limit of `run_ranks`.
    records = run_fault(tmp_path, cache, fault, timeout_seconds=600.0)
    assert [record["is_consequence"] for record in records] == [True, False]
    cause = records[1]
    assert (cause["step"], cause["phase"]) == (3, "train_step")
    assert cause["samples"] == [[17, 18], [19, 20], [21, 22], [23, 24]]
    assert len(cause["provenance"]) == 4
    assert cause["reason"] == "ArithmeticError: broken on purpose"
    work = "samples [17:18] [19:20] [21:22] [23:24] from train["
    text = capfd.readouterr().err
    assert f"tessera: rank 1 of 2 failed in step 3 (train_step), {work}" in text
    assert "tessera: rank 0 of 2 lost the others in step 3 (train_step): " in text
    assert f"tessera: rank 1 of 2 failed first in step 3 (train_step), {work}" in text
    assert text.count("Traceback") == 1


def test_error_of_a_single_process_is_told_with_its_step_and_samples(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_fault(tmp_path, cache, Fault(kind="error", phase="data", rank=0), ranks=1)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("tessera: rank 0 of 1 failed in step 3 (data), samples [16:17] [17:18] ")
    assert last.endswith(
        ": ArithmeticError: broken on purpose; last committed step: none; once the cause is "
        "mended, the same command starts anew; exit code 70 (internal error, out of memory, or "
        "too many non-finite steps)"
    )


def test_collective_that_one_rank_skips_ends_in_time_and_names_it(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_fault(tmp_path, cache, Fault(kind="skipped collective", phase="log"))
    text = capfd.readouterr().err
    # Rank 0, which waits since step 3, leaves first: rank 1 may see it before its own 2 s are over.
    assert re.search(
        r"tessera: rank 1 of 2 "
        r"(did not arrive: it waited \d+ s in step 4 \(train_step\) for all_reduce"
        r"|lost the others in step 4 \(train_step\): )",
        text,
    )
    assert re.search(
        r"issued different collectives; rank 0 waited \d+ s in step 3 \(log\) for broadcast", text
    )


def test_rank_that_is_stuck_in_its_data_longer_than_the_timeout_is_named(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fault = Fault(kind="sleep", phase="data", seconds=TIMEOUT_SECONDS + 1.5)
    run_fault(tmp_path, cache, fault)
    assert re.search(
        r"tessera: rank 1 of 2 did not arrive: it (was|came too late) in step 3 \(data\), "
        r"samples \[17:18\] \[19:20\] \[21:22\] \[23:24\].*; "
        r"rank 0 waited \d+ s in step 3 \((train_step|data_of_others)\) for all_reduce of ",
        capfd.readouterr().err,
    )


def wait_alone(placement: Placement, timeout_seconds: float) -> float:
    """Wait in a group of the mesh for ranks that do not come; return for how many seconds."""
    ranks = Ranks(placement, timeout_seconds)
    group = MeshSpec(pp=2, dp_replicate=2).build(ranks=ranks).group("pp")
    dist.all_reduce(torch.ones(1), group=group)
    start = time.monotonic()
    if placement.rank == 0:
        with pytest.raises(RuntimeError, match="Timed out"):
            dist.recv(torch.ones(1), src=2, group=group)
    elif placement.rank == 1:
        with pytest.raises(RuntimeError, match="Timed out"):
            dist.all_reduce(torch.ones(1), group=group)
    waited = time.monotonic() - start
    store = dist.distributed_c10d._get_default_store()
    if placement.rank < 2:
        store.set(f"rank {placement.rank} waited", "")
    store.wait(["rank 0 waited", "rank 1 waited"], timedelta(seconds=60))
    store.set(f"rank {placement.rank} goes", "")
    if placement.rank == 0:  # the store is its own: it goes last
        store.wait([f"rank {rank} goes" for rank in range(4)], timedelta(seconds=60))
    return waited


def test_groups_of_a_mesh_wait_no_longer_than_the_timeout() -> None:
    """torch gives groups that a mesh makes 30 minutes, whatever the whole was given."""
    assert min(run_ranks(4, wait_alone, 3.0)[:2]) > 2.5


def say_and_stop(placement: Placement, writer: int) -> None:
    os.write(writer, b"x")
    signal.pause()


def test_ranks_without_a_result_in_time_are_told_with_their_stacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()

    def time_is_over_when_both_are_there(*_: Any) -> list[Any]:
        os.read(reader, 1)
        os.read(reader, 1)
        return []

    monkeypatch.setattr("trainer.verify.forked.wait", time_is_over_when_both_are_there)
    with pytest.raises(RankFailedError) as caught:
        run_ranks(2, say_and_stop, writer)
    first, *ranks = re.split(r"\nrank (?=\d)", str(caught.value))
    assert first == "no result within 150.0 s from rank 0, 1"
    for number, text in enumerate(ranks):
        assert re.match(rf"{number}, \d+\.\d s of CPU time:\nFatal Python error: Aborted\n", text)
        assert " in say_and_stop\n" in text
    assert len(ranks) == 2
    os.close(reader)
    os.close(writer)


def test_noting_where_a_step_is_costs_less_than_50_microseconds(tmp_path: Path) -> None:
    """The best of many, for others use the machine too."""
    whereabouts = Whereabouts()
    whereabouts.share(tmp_path, 0)
    samples, sources = [(n, n + 2) for n in range(8)], ["web[3:5]"] * 16

    def step(number: int) -> float:
        start = time.perf_counter()
        whereabouts.enter("data", number, samples)
        whereabouts.enter("train_step", number, samples, sources)
        whereabouts.enter("control")
        return time.perf_counter() - start

    assert min(step(number) for number in range(1000)) < 50e-6
    whereabouts.close()
    place = json.loads((tmp_path / "place.00000.json").read_text().partition("\n")[0])
    assert (place["step"], place["phase"], place["pid"]) == (999, "control", os.getpid())
