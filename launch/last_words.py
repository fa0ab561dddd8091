"""What a rank that fails says, and what it leaves for the others. No collective: they may hang."""

import json
import os
import re
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.exit_codes import BAD_CONFIG, INTERNAL, code_of, in_words
from launch.restarts import how_it_stopped, standing, way_on
from launch.terminal import say, write_traceback
from launch.traces import read_places, read_records
from launch.verdict import Witness, judge
from trainer.redaction import redact, redact_tree

if TYPE_CHECKING:
    from trainer.distributed import Placement
    from trainer.whereabouts import Whereabouts

SETTLE_SECONDS = 2.0  # for the other ranks to leave their records
POLL_SECONDS = 0.05


def describe(
    error: Exception, whereabouts: "Whereabouts", placement: "Placement"
) -> dict[str, Any]:
    """Return the exit record of a failure: what, when, where, on which samples.

    Secrets are masked here, in all of it: who shortens a text later cannot cut one in two.
    """
    from trainer.errors import (
        CorruptionError,
        MemoryExhaustedError,
        NumericError,
        StorageError,
    )

    code = code_of(error)
    is_consequence = placement.world_size > 1 and lost_the_others(error)
    is_known = code != INTERNAL or type(error).__module__ == "trainer.errors"
    record = {
        "code": code,
        "reason": str(error) if is_known else f"{type(error).__name__}: {error}",
        "traceback": None if is_known or is_consequence else traceback.format_exception(error),
        "time": time.time(),
        **whereabouts.place,
        "provenance": whereabouts.provenance,
        # What these say is of other steps, or of a disk: the samples at hand are not to blame.
        "is_of_samples": not isinstance(error, NumericError | StorageError | CorruptionError),
        "is_consequence": is_consequence,
        "is_final": code != INTERNAL or isinstance(error, NumericError),
        "is_oom": isinstance(error, MemoryError | MemoryExhaustedError),
        "collective": last_collective() if is_consequence else None,
    }
    return dict(redact_tree(record))


def lost_the_others(error: BaseException | None) -> bool:
    """Whether the error, or one that it followed from, says that other ranks are gone or late.

    gloo raises plain RuntimeErrors, for a lost peer, a timeout and a wrong size alike; its source
    file stands in their text. NCCL and the store have their own class.
    """
    from torch.distributed import DistError

    if error is None:
        return False
    is_from_gloo = isinstance(error, RuntimeError) and "gloo/" in str(error)
    return (
        is_from_gloo
        or isinstance(error, DistError)
        or lost_the_others(error.__cause__ or error.__context__)
    )


def last_collective() -> dict[str, Any] | None:
    """Return the collective that this rank waits in: the oldest unfinished, else the last one.

    From torch's flight recorder, which is on by default (TORCH_FR_BUFFER_SIZE) for gloo and NCCL.
    """
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_fr_trace_json", None)  # private; absent in older versions
    entries = json.loads(dump()).get("entries", []) if dump else []
    if not entries:
        return None
    entry = next((entry for entry in entries if not entry["retired"]), entries[-1])
    return {
        "name": entry["profiling_name"].partition(":")[2],
        "sizes": entry["input_sizes"],
        "group": entry["process_group"][1],
        "number": entry["collective_seq_id"],
        "since": entry["time_created_ns"] / 1e9,
        "is_done": entry["retired"],
    }


def report(
    error: Exception, record: dict[str, Any], placement: "Placement", attempt: Path | None
) -> None:
    """Say what failed: one line where the remedy is known, a traceback where it is not."""
    if record["traceback"]:
        write_traceback(error)
    witness = Witness(rank=placement.rank, record=record)
    name = f"rank {placement.rank} of {placement.world_size}"
    code = in_words(record["code"])
    if record["is_consequence"]:
        text = f"{name} lost the others{witness.where}: {without_advice(redact(str(error)))}"
    elif record["step"]:
        committed = newest_of(attempt)
        text = (
            f"{name} failed{witness.where}{witness.work}: {witness.reason}; {standing(committed)}; "
            f"once the cause is mended, {way_on(committed)}; {code}"
        )
    else:
        text = str(error) if record["code"] == BAD_CONFIG else f"{error}; {code}"
    say(text)


def stopped(reason: str, attempt: Path | None, code: int) -> str:
    """Return the last line of a run that stopped."""
    return how_it_stopped(reason, newest_of(attempt), code)


def report_first(error: Exception, record: dict[str, Any], rank: int, attempt: Path) -> None:
    """Write a traceback, unless another rank of this start has: our supervisor says the rest.

    Of the others it stands in their exit records.
    """
    if record["traceback"] is None:
        return
    try:
        (attempt / "failed_first").touch(exist_ok=False)
    except FileExistsError:
        return
    except OSError:  # a full disk: rather twice than never
        pass
    say(f"rank {rank} fails:")
    write_traceback(error)


def newest_of(attempt: Path | None) -> int:
    """Return the newest committed step of a run, by one of its starts; 0: there is none."""
    from trainer.directory import newest_step

    return newest_step(attempt.parent.parent) if attempt else 0


def judge_here(attempt: Path, num_ranks: int) -> str:
    """Say which rank is to blame, where no supervisor will; waits for the others' records."""
    places = read_places(attempt, range(num_ranks))
    deadline = time.monotonic() + SETTLE_SECONDS
    while (
        not all(records := read_records(attempt, range(num_ranks))) and time.monotonic() < deadline
    ):
        time.sleep(POLL_SECONDS)
    _, sentence = judge(
        [
            Witness(rank=rank, place=place, record=record)
            for rank, (place, record) in enumerate(zip(places, records, strict=True))
        ]
    )
    return sentence


def leave_record(attempt: Path, rank: int, record: dict[str, Any]) -> None:
    """Write a rank's exit record, whole or not at all."""
    write_whole(attempt / f"exit.{rank:05d}.json", record)


def write_whole(path: Path, values: dict[str, Any]) -> None:
    """Write one object, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values))
    os.replace(temporary, path)


def without_advice(text: str) -> str:
    """Return gloo's message without its source file and its advice."""
    return re.sub(r"^\[[^]]*\] ", "", text).partition(". This is typically")[0]
