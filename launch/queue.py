"""Which runs Slurm has, queued or running: by the scripts that they came with, whoever typed it."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from launch.handover import PLAN
from launch.sbatch import SCRIPT, places_of

ASK_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A run that Slurm has."""

    place: Path
    """Where it was handed over."""
    words: str
    """`running as 17_3`: Slurm's state, and the number of the job and its task."""


def runs_in_queue(folder: Path) -> dict[Path, Queued]:
    """Return {folder of a run: how it stands} of all runs below a folder that Slurm has.

    Nothing where this machine has no Slurm. ValueError where Slurm does not answer.
    """
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i %T %o"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=ASK_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise ValueError(
            f"squeue does not say what is queued ({said}), and a run could be submitted twice; try "
            "again once Slurm answers"
        ) from None
    return read_queue(done.stdout, folder.resolve())


def read_queue(text: str, folder: Path) -> dict[Path, Queued]:
    """Return what lines of `number state script` say of the runs below a folder.

    ValueError for one whose files were removed: a new one in their place would be its, too.
    """
    found = {}
    for line in text.splitlines():
        number, state, command = line.split(" ", 2)
        script = Path(command)
        if script.name != SCRIPT or not script.resolve().is_relative_to(folder):
            continue
        places = places_of(script.read_text()) if script.exists() else []
        place = dict(enumerate(places)).get(int(number.partition("_")[2] or 0), script)
        if not (place / PLAN).exists():
            raise ValueError(
                f"job {number} is {state.lower()}, and {place} is gone, which it needs; scancel "
                f"{number}, and try again"
            )
        found[place.parents[1].resolve()] = Queued(
            place=place, words=f"{state.lower()} as {number}"
        )
    return found
