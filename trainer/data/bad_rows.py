"""Rows that no document can be made of: written down, counted, and too many are an error."""

import json
import logging
from collections import Counter
from pathlib import Path

from trainer.data.examples import Note
from trainer.errors import DataError

log = logging.getLogger(__name__)
FILE = "bad_rows.jsonl"
MAX_SHARE, MAX_IN_A_ROW = 0.001, 100
_MIN_ROWS = 1000  # a share of fewer would refuse the first bad row


class BadRows:
    """Keeps the budget of one source, and counts what encoders had to do to good rows."""

    def __init__(self, folder: Path, source: str) -> None:
        self.path, self.source = folder / FILE, source
        self.num_rows = self.num_bad = self.in_a_row = 0
        self.notes: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.path.unlink(missing_ok=True)

    def good(self, notes: tuple[Note, ...]) -> None:
        """Count a row that became a document."""
        self.num_rows += 1
        self.in_a_row = 0
        for note in notes:
            self.notes[note.kind] += 1
            self.first.setdefault(note.kind, note.detail)

    def bad(self, reason: str) -> None:
        """Write a bad row down; DataError when there were too many."""
        line = {"source": self.source, "row": self.num_rows, "reason": reason}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.num_rows += 1
        self.num_bad += 1
        self.in_a_row += 1
        if self.in_a_row >= MAX_IN_A_ROW:
            raise self._is_over(f"{self.in_a_row} rows in a row, the last {self.num_rows - 1},")
        if self.num_rows >= _MIN_ROWS:
            self._check_share()

    def finish(self) -> None:
        """Say what was found; DataError when too large a share of all rows was bad."""
        if self.num_bad:
            self._check_share()
            log.warning(
                "%d of %d rows of %s are bad and are replaced by the next good one: %s",
                self.num_bad, self.num_rows, self.source, self.path,
            )  # fmt: skip
        for kind, number in self.notes.items():
            log.info("%s: %d %s, the first %r", self.source, number, kind, self.first[kind])

    def _check_share(self) -> None:
        if self.num_bad > max(1.0, MAX_SHARE * self.num_rows):
            raise self._is_over(f"{self.num_bad} of {self.num_rows} rows")

    def _is_over(self, what: str) -> DataError:
        last = json.loads(self.path.read_text(encoding="utf-8").splitlines()[-1])
        return DataError(
            f"{self.source}: {what} are bad (allowed: {MAX_SHARE:.1%}, {MAX_IN_A_ROW} in a row); "
            f"the last, row {last['row']}: {last['reason']}"
        )
