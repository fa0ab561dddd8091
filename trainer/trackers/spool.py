"""The rows of metrics.jsonl, followed while the run writes them.

metrics.jsonl is the truth and the spool in one: nothing is queued anywhere else, so nothing can be
lost, and what was not delivered today can be delivered tomorrow.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trainer.columns import WORDS
from trainer.trackers.protocol import Row

_OUTSIDE = ("step", "split", "time")


class Spool:
    """Reads what is new each time it is asked; memory is that of one row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_step = 0
        """The last step that was read, whole or in part."""
        self._file: BinaryIO | None = None
        self._row: Row | None = None

    def is_replaced(self) -> bool:
        """Whether the run went back: then the file is another one, and is read from its start."""
        if self._file is None:
            return False
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            return False  # in a rename
        known = os.fstat(self._file.fileno())
        if (now.st_ino, now.st_dev) == (known.st_ino, known.st_dev):
            return False
        self.close()
        return True

    def rows(self, *, is_complete: bool) -> Iterator[Row]:
        """Yield the rows that are whole: a later step has begun, or the file `is_complete`."""
        for line in self._lines():
            point = _point(line)
            if point is None:
                continue
            row, self._row = self._row, point
            if row is not None and row.step == point.step:
                self._row = Row(step=row.step, time=point.time, values=row.values | point.values)
            elif row is not None:
                yield row
            self.last_step = point.step
        if is_complete and self._row is not None:
            row, self._row = self._row, None
            yield row

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._row, self.last_step = None, None, 0

    def _lines(self) -> Iterator[bytes]:
        if self._file is None:
            try:
                self._file = open(self.path, "rb")  # noqa: SIM115
            except FileNotFoundError:
                return  # the first point is not there yet
        while True:
            start = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                self._file.seek(start)  # the writer is in the middle of it
                return
            yield line


def _point(line: bytes) -> Row | None:
    """Return one line's numbers; None for a line that was torn by a crash."""
    try:
        point: dict[str, Any] = json.loads(line)
        step, split, time = int(point["step"]), point["split"], float(point["time"])
    except (ValueError, KeyError, TypeError):
        return None
    values = {
        f"{split}/{name}": number
        for name, value in point.items()
        if name not in _OUTSIDE and (number := _number(value)) is not None
    }
    return Row(step=step, time=time, values=values)


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return WORDS.get(value)
    return value if isinstance(value, int | float) else None
