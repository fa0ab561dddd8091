"""Which evaluation a stop cut off: a file in the run's folder, as a checkpoint stays what it is.

Standard library only.
"""

from pathlib import Path

from trainer.files import read_number, write_text

FILE = "evaluation_due"


def read_due(folder: Path) -> int | None:
    """Return the step whose evaluation is to be repeated, if any."""
    return read_number(folder / FILE)


def write_due(folder: Path, step: int | None) -> None:
    """Note that the evaluation of `step` was cut off; None: of none."""
    if step is not None:
        write_text(folder / FILE, f"{step}\n")
    else:
        (folder / FILE).unlink(missing_ok=True)
