"""Going on with a run: its checkpoints, the newest that is intact, and the files it appends to."""

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from trainer import drift
from trainer.best import Best
from trainer.checkpoint import commit
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.contents import Contents
from trainer.checkpoint.loading import steps_for_all
from trainer.checkpoint.lock import RunLock
from trainer.checkpoint.retention import point, set_aside
from trainer.data.loader import StepLoader
from trainer.data.tokenizers import Tokenizer
from trainer.determinism import check_bits
from trainer.directory import CHECKPOINTS, CONFIG, ENVIRONMENT, MIX, REWIND, read_rewind
from trainer.distributed import Ranks
from trainer.environment import environment, version_of
from trainer.evaluation_due import read_due
from trainer.files import write_json, write_text
from trainer.mesh import Mesh
from trainer.model_files import write_model_files
from trainer.numerics.guard import Guard
from trainer.numerics.rewinds import Rewinds, kept, rewinds_of, write_rewinds
from trainer.phases import PhasedEngine
from trainer.progress import Progress
from trainer.record import RunRecord
from trainer.redaction import redact_tree
from trainer.run import Run


def checkpoints_of(
    run: Run,
    attempt: Path,
    ranks: Ranks,
    mesh: Mesh,
    lock: RunLock | None,
    tokenizer: Tokenizer,
    contents: Contents,
    loader: StepLoader,
) -> Checkpoints:
    """Return the run's checkpoints. Collective."""
    folder = attempt.parent.parent
    config = (attempt / CONFIG).read_bytes() if ranks.placement.is_main else b""
    return Checkpoints(
        run.checkpoint,
        folder / CHECKPOINTS,
        ranks=ranks,
        lock=lock,
        facts={
            "run": folder.name,
            "world_size": ranks.placement.world_size,
            "mesh": mesh.describe(),
            "config_xxh3": xxhash.xxh3_128_hexdigest(config),
            "data": loader.rows.store.fingerprint,
            "versions": {name: version_of(name) for name in ("tessera-train", "torch")},
        },
        describe_model=partial(write_model_files, run, tokenizer, contents),
        contents=contents,
    )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run stands: what a checkpoint fills beside weights and optimizer state."""

    progress: Progress
    best: Best
    guard: Guard
    loader: StepLoader
    bits: dict[str, Any]
    """What decides the bits of this start beside its config."""
    skipped_in_a_row: int = 0

    def at(self, state: dict[str, Any], rewinds: Rewinds) -> "Place":
        """Return the place after the step of a checkpoint's state.json."""
        progress = self.progress
        progress.load(state["progress"])
        if "best" in state:  # checkpoints of version 0.1 had none
            self.best.load(state["best"])
        if "spike" in state:  # nor this
            self.guard.load(state["spike"])
        rewound = rewinds.get(progress.step)
        mix = {"mix": rewound.mix} if rewound and rewound.mix else {}
        loader = self.loader.resumed(progress.step, state["data"] | mix)
        if rewound:
            loader = loader.passing_over(rewound.last)
        return replace(self, loader=loader, skipped_in_a_row=state["skipped_in_a_row"])


def resume(
    run: Run, checkpoints: Checkpoints, ranks: Ranks, engine: PhasedEngine, place: Place
) -> Place:
    """Load the newest intact checkpoint; return the place after its step. Collective."""
    # Rank 0 looks once for all: a shared file system need not show every rank the same.
    folder = checkpoints.folder.parent
    found = commit.committed_steps(checkpoints.folder), read_rewind(folder), read_due(folder)
    steps, rewound_to, due = json.loads(ranks.broadcast_text(json.dumps(found)))
    # The same command may be started again, by a scheduler too: it goes back once, not each time.
    is_rewind = run.resume_step is not None and run.resume_step != rewound_to
    if is_rewind:
        if run.resume_step not in steps:
            raise ValueError(
                f"resume_step={run.resume_step} has no checkpoint in {checkpoints.folder}; "
                f"set it to one of {steps}"
            )
        steps = [run.resume_step]
    place = restore(run, checkpoints, ranks, engine, place, steps)
    place.progress.evaluation_due = place.progress.step == due
    if ranks.placement.is_main and is_rewind:
        write_text(folder / REWIND, str(run.resume_step))
    return place


def restore(
    run: Run,
    checkpoints: Checkpoints,
    ranks: Ranks,
    engine: PhasedEngine,
    place: Place,
    steps: list[int],
) -> Place:
    """Load the first of `steps` that is intact, and leave nothing of what came after it.

    Collective.
    """
    folder = checkpoints.folder.parent
    state = checkpoints.restore(engine.at, steps, strict=run.resume_strict)
    if state is None:
        engine.at(1)
        return place
    rewinds = rewinds_of(folder, ranks)
    check_bits(run, state["progress"]["step"], state.get("bits"), place.bits)
    place = place.at(state, kept(rewinds, state["progress"]["step"]))
    loader = place.loader.mixed(may_change=drift.ALLOW_MIX in run.resume_allow)
    place = replace(place, loader=loader)
    if ranks.placement.is_main:
        # Newest first: whatever is interrupted here, the newest that is left belongs to the rest.
        for step in commit.committed_steps(checkpoints.folder):
            if step > place.progress.step:
                set_aside(commit.step_folder(checkpoints.folder, step), "rewound")
        if rewinds != kept(rewinds, place.progress.step):
            write_rewinds(folder, kept(rewinds, place.progress.step))
    place.best.survive(steps_for_all(checkpoints.folder, ranks))
    if ranks.placement.is_main:
        with suppress(OSError):  # hints: nothing depends on them, and the next save renews them
            point(checkpoints.folder, place.progress.step, place.best.step)
    return place


def open_record(
    folder: Path, attempt: Path, ranks: Ranks, progress: Progress, loader: StepLoader
) -> RunRecord:
    """Open the run's files; rank 0 makes this start's config and environment the newest ones, and
    notes what mixtures of sources it follows."""
    if ranks.placement.is_main:
        found = environment(ranks.placement.world_size)
        write_json(attempt / ENVIRONMENT, redact_tree(found))
        if not loader.mixture.is_plain:
            write_json(attempt / MIX, loader.mixture.state())
        for name in (CONFIG, ENVIRONMENT):
            shutil.copyfile(attempt / name, folder / name)
    record = RunRecord(
        folder, rank=ranks.placement.rank, data_rank=loader.rank, attempt=int(attempt.name),
        resumed_step=progress.step,
    )  # fmt: skip
    if (change := loader.change_at(progress.step)) is not None:
        # At the first step that has it: where that is lost and trained again, so is the line.
        record.metrics(progress.step + 1, "mix", change)
    return record
