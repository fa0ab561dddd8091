"""Who is to blame: from records and places alone, without a process."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.traces import GONE, STOPPED, read_places
from launch.verdict import Witness, judge

TRAIN = {"step": 37, "phase": "train_step", "samples": [[8, 10]], "since": 400.0}
DATA = {"step": 37, "phase": "data", "samples": [[10, 12]], "since": 390.0}
LOG = {"step": 36, "phase": "log", "samples": [], "since": 380.0}


def collective(name: str = "all_reduce", number: int = 9, since: float = 400.0) -> dict[str, Any]:
    return {"name": name, "sizes": [[4]], "group": "mesh_tp", "number": number, "since": since}


def waited(
    rank: int, place: dict[str, Any] = TRAIN, *, time: float = 1000.0, **changes: Any
) -> Witness:
    """A rank that gave up waiting, or noticed that another one did."""
    record = {"code": 70, "reason": "RuntimeError: [gloo/x.cc:1] Timed out", "time": time}
    record |= {**place, "provenance": [], "is_consequence": True}
    record |= {"collective": collective(since=place["since"])} | changes
    return Witness(rank=rank, place=place, record=record, return_code=70)


def failed(rank: int, time: float, reason: str = "ArithmeticError: broken") -> Witness:
    record = {"code": 70, "reason": reason, "time": time, **TRAIN}
    record |= {"provenance": ["web[3:5]"], "is_consequence": False, "collective": None}
    return Witness(rank=rank, place=TRAIN, record=record, return_code=70)


def blamed(*witnesses: Witness) -> tuple[int, str]:
    return judge(witnesses)


def test_rank_that_failed_is_named_and_not_those_that_lost_it() -> None:
    rank, sentence = blamed(waited(0, time=1.0), failed(1, 2.0), waited(2, time=1.5))
    assert rank == 1
    assert sentence == (
        "rank 1 of 3 failed first in step 37 (train_step), samples [8:10] from web[3:5]: "
        "ArithmeticError: broken"
    )


def test_of_two_failures_the_earlier_one_is_named() -> None:
    assert blamed(failed(0, 2.0), failed(1, 1.0))[0] == 1


def test_killed_rank_comes_before_all_others_and_says_on_what_it_worked() -> None:
    killed = Witness(rank=2, place=DATA, return_code=-signal.SIGKILL)
    rank, sentence = blamed(waited(0), failed(1, 1.0), killed)
    assert rank == 2
    assert "in step 37 (data), samples [10:12]: killed by SIGKILL" in sentence


def test_rank_that_we_had_to_kill_is_not_the_one_that_failed() -> None:
    assert blamed(failed(0, 1.0), Witness(rank=1, place=DATA))[0] == 0


def test_silent_rank_did_not_arrive() -> None:
    rank, sentence = blamed(waited(0), waited(1), Witness(rank=2, place=DATA), waited(3))
    assert rank == 2
    assert sentence == (
        "rank 2 of 4 did not arrive: it was in step 37 (data), samples [10:12]; ranks 0, 1, 3 "
        "waited 600 s in step 37 (train_step) for all_reduce of [[4]] (number 9 of group mesh_tp)"
    )


def test_silent_rank_at_the_place_of_the_others_still_waits() -> None:
    """Ranks give up one after the other; under torchrun some have not when the first judges."""
    still_waiting = Witness(rank=1, place=TRAIN)
    assert blamed(waited(0), still_waiting, Witness(rank=2, place=DATA))[0] == 2
    assert "rank 1 of 2 did not arrive" in blamed(waited(0), still_waiting)[1]  # stuck in a step


def test_stopped_rank_is_named_as_such_wherever_it_stands() -> None:
    stopped = Witness(rank=1, place=TRAIN | {"state": STOPPED})
    rank, sentence = blamed(waited(0), stopped, Witness(rank=2, place=TRAIN))
    assert rank == 1
    assert "it is stopped (SIGSTOP) in step 37 (train_step)" in sentence


def test_rank_that_never_came_to_the_run_is_named() -> None:
    assert "rank 1 of 2 did not arrive: it had not come to the run yet" in blamed(
        waited(0, {"step": 0, "phase": "connect", "samples": [], "since": 400.0}, collective=None),
        Witness(rank=1),
    )[1]  # fmt: skip


@pytest.mark.parametrize("odd", [LOG, {"step": 38, "phase": "data", "samples": [], "since": 410.0}])
def test_rank_elsewhere_than_most_did_not_arrive(odd: dict[str, Any]) -> None:
    other = waited(1, odd, collective=collective(number=7))
    rank, sentence = blamed(waited(0), other, waited(2))
    assert rank == 1
    assert f"in step {odd['step']} ({odd['phase']})" in sentence
    assert "the ranks issued different collectives; ranks 0, 2 waited 600 s in step 37" in sentence


def test_of_two_ranks_that_waited_the_one_that_waited_longer_missed_the_other() -> None:
    other = waited(0, collective=collective(number=10), time=999.0)
    rank, sentence = blamed(other, waited(1, LOG))
    assert rank == 0
    assert sentence.endswith("rank 1 waited 620 s in step 36 (log) for all_reduce of [[4]] "
                             "(number 9 of group mesh_tp)")  # fmt: skip


def test_rank_that_came_after_the_first_gave_up_was_late() -> None:
    late = waited(1, time=1001.0, collective=collective(since=1000.9))
    rank, sentence = blamed(waited(0), late)
    assert rank == 1
    assert "it came too late in step 37 (train_step)" in sentence


def test_ranks_at_one_place_in_different_collectives_are_all_told() -> None:
    _, sentence = blamed(waited(0), waited(1, collective=collective("broadcast")))
    assert sentence.startswith("all 2 ranks were in step 37 (train_step), but in different coll")
    assert "rank 0 waited 600 s in step 37 (train_step) for all_reduce of" in sentence
    assert "for broadcast of [[4]]" in sentence


def test_ranks_in_the_same_collective_point_to_the_network() -> None:
    assert "look at the network" in blamed(waited(0), waited(1))[1]


def test_aborted_rank_is_no_cause_where_another_one_was_elsewhere() -> None:
    """NCCL aborts every rank whose time is over; the one that is elsewhere goes on."""
    aborted = [Witness(rank=n, place=TRAIN, return_code=-signal.SIGABRT) for n in (0, 1)]
    rank, sentence = blamed(*aborted, Witness(rank=2, place=DATA))
    assert rank == 2
    assert "did not arrive: it was in step 37 (data)" in sentence


def test_aborted_rank_among_ranks_at_one_place_says_that_collectives_differ() -> None:
    aborted = Witness(rank=1, place=TRAIN, return_code=-signal.SIGABRT)
    rank, sentence = blamed(waited(0), aborted)
    assert rank == 1
    assert "it was aborted in step 37 (train_step)" in sentence
    assert "by gloo or NCCL: the collectives did not match" in sentence


def test_rank_gone_without_a_record_is_said_to_be_gone() -> None:
    rank, sentence = blamed(waited(0), Witness(rank=1, place=TRAIN | {"state": GONE}))
    assert rank == 1
    assert "it ended without a record in step 37 (train_step)" in sentence


def test_long_lists_are_cut() -> None:
    place = TRAIN | {"samples": [[n, n + 1] for n in range(64)]}
    assert "[3:4] and 60 more: killed" in blamed(Witness(rank=0, place=place, return_code=-9))[1]


def test_code_that_differs_from_the_record_counts_more() -> None:
    crashed = Witness(
        rank=0, record={"code": 0, "reason": "finished", "time": 1.0}, return_code=-11
    )
    assert "killed by SIGSEGV" in blamed(crashed)[1]


def test_places_are_read_whatever_lies_there(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        process.send_signal(signal.SIGSTOP)
        place = TRAIN | {"pid": process.pid, "host": socket.gethostname()}
        (tmp_path / "place.00000.json").write_text(json.dumps(place) + "\nrest of a longer line")
        (tmp_path / "place.00001.json").write_text(json.dumps(place | {"host": "another"}))
        (tmp_path / "place.00002.json").write_text('{"step": 3')
        os.waitpid(process.pid, os.WUNTRACED)  # returns once it is stopped
        places = read_places(tmp_path, range(4))
    finally:
        process.kill()
        process.wait()
    assert [found.get("step") for found in places] == [37, 37, None, None]
    assert [found["state"] for found in places[1:]] == ["", "", ""]
    assert places[0]["state"] == STOPPED
    assert read_places(tmp_path, range(1))[0]["state"] == GONE
