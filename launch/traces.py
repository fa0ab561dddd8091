"""What the ranks leave in the folder of a start: places, records, and what they wait in.

Standard library only.
"""

import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

STOPPED, GONE = "stopped", "gone"


def read_records(attempt: Path, ranks: Iterable[int]) -> list[dict[str, Any]]:
    """Return what each rank left when it ended."""
    return [_read(attempt / f"exit.{rank:05d}.json") for rank in ranks]


def read_waits(attempt: Path, ranks: Iterable[int]) -> list[dict[str, Any]]:
    """Return what each hanging rank said that it waits in: a record of one that has not ended."""
    return [_read(attempt / f"wait.{rank:05d}.json") for rank in ranks]


def read_places(attempt: Path, ranks: Iterable[int]) -> list[dict[str, Any]]:
    """Return where each rank is now, and as its `state` whether it is stopped or gone."""
    places = [_read(attempt / f"place.{rank:05d}.json") for rank in ranks]
    here = socket.gethostname()
    return [
        place | {"state": state_of(place["pid"]) if place.get("host") == here else ""}
        for place in places
    ]


def _read(path: Path) -> dict[str, Any]:
    """Return the object in the first line of a file, or nothing where none can be read."""
    try:
        found = json.loads(path.read_text().partition("\n")[0])
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def state_of(pid: int) -> str:
    """Return whether a process of this machine is stopped or gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return GONE
    letter = status.partition("State:\t")[2][:1]
    return {"T": STOPPED, "Z": GONE, "X": GONE}.get(letter, "")


def cpu_seconds(pid: int | None) -> float:
    """Return what a process of this machine and the children that it waited for have used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
