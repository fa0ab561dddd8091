"""Everything that a run's folder tells about it, read once."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.report.starts import Past, read_past
from trainer.checkpoint.commit import committed_steps
from trainer.directory import CHECKPOINTS, CONFIG, ENVIRONMENT
from trainer.files import read_json
from trainer.notes import ABOUT, ANSWERS, BASELINES, NOTES, PLAN, SAMPLE, read_note
from trainer.points import METRICS, Points, read_points
from trainer.redaction import redact_tree
from trainer.stored_config import read_stored


@dataclass(frozen=True, kw_only=True)
class History:
    """A run as its folder has it; a part that is missing is empty."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    points: Points
    past: Past
    checkpoints: list[int]
    """Steps, newest first."""
    about: dict[str, Any]
    baselines: dict[str, Any]
    sample: dict[str, Any]
    answers: dict[str, Any]
    plan: dict[str, Any]
    problems: list[str]
    """What could not be read."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def last_step(self) -> int:
        """The last step that is known to have been done."""
        steps = [self.points.train.steps, self.points.evals.steps]
        ends = [start.last_step or 0 for start in self.past.starts[-1:]]
        return max(
            [*(column[-1] for column in steps if column), *ends, *self.checkpoints[:1]], default=0
        )

    @property
    def max_steps(self) -> int | None:
        """How far the run was to go."""
        found = self.about.get("max_steps") or self.config.get("max_steps")
        return found if type(found) is int else None

    @property
    def is_finished(self) -> bool:
        return bool(self.past.starts) and self.past.starts[-1].ending[0] == 0


def read_history(folder: Path) -> History:
    """Return what is known of a run; ValueError for a folder that is none."""
    is_run = any((folder / name).exists() for name in (METRICS, CONFIG, "attempts"))
    if not is_run:
        raise ValueError(
            f"{folder} holds neither {METRICS} nor {CONFIG}; give the folder of a run, runs/NAME"
        )
    problems: list[str] = []
    return History(
        folder=folder,
        config=_read(folder / CONFIG, read_stored, problems),
        environment=_read(folder / ENVIRONMENT, read_json, problems),
        points=read_points(folder),
        past=read_past(folder),
        checkpoints=committed_steps(folder / CHECKPOINTS),
        about=_counts(read_note(folder, ABOUT)),
        **{kind: read_note(folder, kind) for kind in (BASELINES, SAMPLE, ANSWERS)},
        plan=_plan(folder, problems),
        problems=problems,
    )


def _read(path: Path, reader: Any, problems: list[str]) -> dict[str, Any]:
    """Return an object without its secrets; nothing, and a line that says so, where it fails."""
    try:
        found = reader(path)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return {}
    return redact_tree(found) if isinstance(found, dict) else {}


def _plan(folder: Path, problems: list[str]) -> dict[str, Any]:
    """Return what was predicted, which most runs have not; a file that says nothing is told."""
    is_there = (folder / NOTES / f"{PLAN}.json").exists()
    found = redact_tree(read_note(folder, PLAN)) if is_there else {}
    if is_there and not found:
        problems.append(f"{NOTES}/{PLAN}.json cannot be read")
    return dict(found)


def _counts(about: dict[str, Any]) -> dict[str, Any]:
    """Return a note with what can be counted with, and its words."""
    numbers = {name: value for name, value in about.items() if type(value) is int}
    texts = {name: value for name, value in about.items() if isinstance(value, str)}
    epochs = {n: v for n, v in part(about, "epochs").items() if isinstance(v, int | float)}
    return numbers | texts | {"epochs": epochs, "banner": part(about, "banner")}


def part(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return what lies below a key; nothing where that is no tree."""
    found = tree.get(key)
    return found if isinstance(found, dict) else {}
