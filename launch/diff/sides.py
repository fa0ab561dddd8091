"""What stands beside the numbers of two runs: config, code, environment, data."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.diff.series import Loss, read_losses
from trainer.checkpoint.commit import committed_steps, read_manifest, step_folder
from trainer.directory import CHECKPOINTS, CONFIG, ENVIRONMENT
from trainer.drift import difference, fits
from trainer.errors import StorageError
from trainer.files import read_mapping
from trainer.notes import ABOUT, read_note
from trainer.points import METRICS, Points, read_points
from trainer.redaction import redact_tree
from trainer.stored_config import read_stored

# Where a run lies, and how it is gone on with: no difference between two runs.
_OWN = ("name", "runs", "resume", "resume_step", "resume_allow", "data.cache")
_CODE = ("git_commit", "packages.tessera-train")
Pairs = dict[str, tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two runs."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        return redact_tree(read_stored(path)) if path.exists() else {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        return redact_tree(read_mapping(self.folder / ENVIRONMENT))

    @cached_property
    def points(self) -> Points:
        return read_points(self.folder)

    @cached_property
    def losses(self) -> dict[int, Loss]:
        return read_losses(self.folder)

    @cached_property
    def data(self) -> dict[str, Any]:
        """What is known of its data: the fingerprint, and how much there is."""
        note = read_note(self.folder, ABOUT)
        names = ("fingerprint", "documents", "tokens", "held_out_documents")
        known = {name: note[name] for name in names if name in note}
        steps = committed_steps(self.folder / CHECKPOINTS)
        if "fingerprint" not in known and steps:
            try:
                manifest = read_manifest(step_folder(self.folder / CHECKPOINTS, steps[0]))
            except StorageError:
                return known
            known["fingerprint"] = manifest.get("data")
        return known


def side(key: str, path: Path) -> Side:
    """Return a run; ValueError for a folder that is none."""
    if not any((path / name).exists() for name in (METRICS, "ledger", CONFIG)):
        raise ValueError(
            f"{key}={path} holds neither {METRICS} nor a ledger; give the folder of a run, or as b "
            "a trainer_state.json"
        )
    return Side(folder=path)


def config_pairs(a: Side, b: Side) -> Pairs:
    """Return the settings that differ, but for where a run lies."""
    return {
        key: pair for key, pair in difference(a.config, b.config).items() if not fits(key, _OWN)
    }


def code_pairs(a: Side, b: Side) -> Pairs:
    """Return commit and version where they differ; a `+` marks a checkout with changes."""
    return {k: v for k, v in difference(a.environment, b.environment).items() if k in _CODE}


def environment_pairs(a: Side, b: Side) -> Pairs:
    """Return versions and hardware that differ."""
    return {k: v for k, v in difference(a.environment, b.environment).items() if k not in _CODE}


def data_pairs(a: Side, b: Side) -> Pairs:
    """Return what of the data differs, of what both know."""
    return {k: (a.data[k], b.data[k]) for k in a.data if k in b.data and a.data[k] != b.data[k]}
