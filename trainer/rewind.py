"""Going back to an older checkpoint in the middle of a run, and on with other data."""

import logging
import shutil
from pathlib import Path

from trainer.directory import CONFIG, new_attempt
from trainer.distributed import Ranks
from trainer.loop import Loop
from trainer.numerics.rewinds import Rewound, rewinds_of, with_another, write_rewinds
from trainer.numerics.watch import RewindError
from trainer.phases import PhasedEngine
from trainer.resume import Place, open_record, restore
from trainer.run import Run

log = logging.getLogger(__name__)


def go_back(loop: Loop, run: Run, engine: PhasedEngine, ranks: Ranks, error: RewindError) -> None:
    """Bring a loop to where `error` says; the samples up to the spike are passed over.

    What a start after a crash would do, but in this process: a new attempt, the ledger goes on,
    metrics are cut back, newer checkpoints are set aside. Collective.
    """
    loop.control.drain()
    loop.checkpoints.finish()  # what it commits is set aside below
    loop.record.result(loop.readback.flush())  # it was executed, whatever becomes of it
    loop.record.close()
    goes_on_with = loop.loader.first_sample(error.spike)
    folder = loop.checkpoints.folder.parent
    place = Place(
        progress=loop.progress, best=loop.best, guard=loop.guard, loader=loop.loader, bits=loop.bits
    )  # fmt: skip
    place = restore(run, loop.checkpoints, ranks, engine, place, error.steps)
    step = loop.progress.step
    loop.loader = place.loader.passing_over(goes_on_with)
    loop.watch.skipped_in_a_row = place.skipped_in_a_row
    first, last = loop.loader.passed_over[-1]
    mix = None if loop.loader.mixture.is_plain else loop.loader.mixture.state()
    rewound = Rewound(first=first, last=last, spikes=(error.spike,), mix=mix)
    rewinds = with_another(rewinds_of(folder, ranks), step, rewound)
    if ranks.placement.is_main:
        write_rewinds(folder, rewinds)
    loop.record = open_record(
        folder, _another_attempt(folder, ranks), ranks, loop.progress, loop.loader
    )
    loop.record.metrics(
        step, "rewind", {"from_step": error.spike, "passed_over": [first, last], "why": error.why}
    )
    log.warning(
        "%s; samples %d to %d are passed over (rewind %d to this step)",
        error, first, last - 1, len(rewinds[step].spikes),
    )  # fmt: skip


def _another_attempt(folder: Path, ranks: Ranks) -> Path:
    """Make the folder of a start, with the config of the newest one. Collective."""
    made = ""
    if ranks.placement.is_main:
        attempt = new_attempt(folder)
        shutil.copyfile(folder / CONFIG, attempt / CONFIG)
        made = str(attempt)
    return Path(ranks.broadcast_text(made))
