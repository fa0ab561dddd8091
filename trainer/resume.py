"""Going on with a run: its checkpoints, the newest that is intact, and the files it appends to."""

import json
import shutil
from functools import partial
from pathlib import Path

from trainer.best import Best
from trainer.checkpoint import commit
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.contents import Contents
from trainer.checkpoint.lock import RunLock
from trainer.data.loader import StepLoader
from trainer.data.tokenizers import Tokenizer
from trainer.directory import CHECKPOINTS, CONFIG, ENVIRONMENT, REWIND, read_rewind
from trainer.distributed import Ranks
from trainer.environment import environment
from trainer.files import write_json, write_text
from trainer.mesh import Mesh
from trainer.model_files import write_model_files
from trainer.phases import PhasedEngine
from trainer.progress import Progress
from trainer.record import RunRecord
from trainer.redaction import redact_tree
from trainer.run import Run


def checkpoints_of(
    run: Run,
    folder: Path,
    ranks: Ranks,
    mesh: Mesh,
    lock: RunLock | None,
    tokenizer: Tokenizer,
    contents: Contents,
) -> Checkpoints:
    """Return the run's checkpoints. Collective."""
    return Checkpoints(
        run.checkpoint,
        folder / CHECKPOINTS,
        ranks=ranks,
        lock=lock,
        facts={
            "run": folder.name,
            "world_size": ranks.placement.world_size,
            "mesh": mesh.describe(),
        },
        describe_model=partial(write_model_files, run, tokenizer, contents),
        contents=contents,
    )


def resume(
    run: Run,
    checkpoints: Checkpoints,
    ranks: Ranks,
    engine: PhasedEngine,
    loader: StepLoader,
    progress: Progress,
    best: Best,
) -> tuple[StepLoader, int]:
    """Load the newest intact checkpoint; return the loader going on there, and the skip count.

    Collective.
    """
    # Rank 0 looks once for all: a shared file system need not show every rank the same.
    folder = checkpoints.folder.parent
    steps, rewound_to = json.loads(
        ranks.broadcast_text(
            json.dumps([commit.committed_steps(checkpoints.folder), read_rewind(folder)])
        )
    )
    # The same command may be started again, by a scheduler too: it goes back once, not each time.
    is_rewind = run.resume_step is not None and run.resume_step != rewound_to
    if is_rewind:
        if run.resume_step not in steps:
            raise ValueError(
                f"resume_step={run.resume_step} has no checkpoint in {checkpoints.folder}; "
                f"set it to one of {steps}"
            )
        steps = [run.resume_step]
    state = checkpoints.restore(engine.at, steps)
    if state is None:
        engine.at(1)
        return loader, 0
    progress.load(state["progress"])
    if "best" in state:  # checkpoints of version 0.1 had none
        best.load(state["best"])
    loader = loader.resumed(progress.step, state["data"])
    if ranks.placement.is_main:
        for step in commit.committed_steps(checkpoints.folder):
            if step > progress.step:
                commit.set_aside(commit.step_folder(checkpoints.folder, step), "rewound")
        if is_rewind:
            write_text(folder / REWIND, str(run.resume_step))
    return loader, state["skipped_in_a_row"]


def open_record(folder: Path, attempt: Path, ranks: Ranks, progress: Progress) -> RunRecord:
    """Open the run's files; rank 0 makes this start's config and environment the newest ones."""
    if ranks.placement.is_main:
        found = environment(ranks.placement.world_size)
        write_json(attempt / ENVIRONMENT, redact_tree(found))
        for name in (CONFIG, ENVIRONMENT):
            shutil.copyfile(attempt / name, folder / name)
    return RunRecord(
        folder, rank=ranks.placement.rank, attempt=int(attempt.name), resumed_step=progress.step
    )
