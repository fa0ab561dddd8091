"""What a run says of itself that is no number of a step: RUN/notes/KIND.json, the newest of each.

What was printed is gone with the terminal; these are for whoever looks at the run later. Standard
library only.
"""

import logging
from pathlib import Path
from typing import Any

from trainer.files import read_mapping, write_json
from trainer.redaction import redact_tree

log = logging.getLogger(__name__)
NOTES, REPORT = "notes", "report.html"
ABOUT = "about"  # what is trained, on what: counts and the banner
BASELINES = "baselines"  # what any model must beat, of which metric
SAMPLE = "sample"  # text that the model wrote
PLAN = "plan"  # what `tessera plan run=DIR` says of it: memory, work, speed
ANSWERS = "answers"  # questions of the validation, with pictures and what was answered


def write_note(folder: Path, kind: str, values: dict[str, Any]) -> None:
    """Write a note of a run, over the one of its kind before; a full disk ends no run for it."""
    try:
        (folder / NOTES).mkdir(exist_ok=True)
        write_json(folder / NOTES / f"{kind}.json", redact_tree(values))
    except OSError as error:
        log.warning("no note of the run's %s (%s); the run goes on", kind, error)


def read_note(folder: Path, kind: str) -> dict[str, Any]:
    """Return a note; nothing where there is none that can be read."""
    return read_mapping(folder / NOTES / f"{kind}.json")
