"""Did a run of several sources take each one's samples once? From what its starts wrote down."""

from dataclasses import replace
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from trainer.data.mixture import Mixture
from trainer.directory import MIX
from trainer.files import read_json
from trainer.ledger import Life, surviving
from trainer.ledger_proof import Proof


def prove_sources(proof: Proof, folder: Path, lives: list[Life], saved: dict[str, Any]) -> None:
    """Add to a proof what the data state of its last step's checkpoint says of several sources.

    Each place of the run is one sample of one source, by the eras of the checkpoint. So it is shown
    that every start followed these eras, that each goes on with every source where the one before
    left it, and that what the sources gave is what the ledger has.
    """
    mixture = Mixture.load(saved["mix"], saved["seed"])
    _check_eras(proof, mixture)
    _check_starts(proof, folder, lives, mixture)
    given_before = mixture.eras.exactly_done
    given = given_before(proof.end)
    for first, last in proof.passed_over:
        given = _minus(given, _minus(given_before(last), given_before(first)))
    proof.by_source = dict(zip(mixture.names, given, strict=False))
    proof.mixtures = len(mixture.eras.eras)
    if sum(given) != proof.samples:
        proof.findings.append(
            f"the sources gave {sum(given)} samples, the ledger has {proof.samples}"
        )


def _minus(more: list[int], less: list[int]) -> list[int]:
    return [a - b for a, b in zip_longest(more, less, fillvalue=0)]


def _check_eras(proof: Proof, mixture: Mixture) -> None:
    """Each era begins behind the one before, which is counted up to there."""
    all_eras = mixture.eras.eras
    for number, (before, era) in enumerate(pairwise(all_eras), 1):
        counted = replace(mixture.eras, eras=all_eras[:number]).exactly_done(era.first)
        if counted != list(era.done) or era.first <= before.first:
            proof.findings.append(
                f"sample {era.first}: the mixture that begins here says that {list(era.done)} "
                f"samples of its sources came before; the one before it gave {counted}"
            )


def _check_starts(proof: Proof, folder: Path, lives: list[Life], mixture: Mixture) -> None:
    """Compare the eras of each step's samples with those that its start wrote down."""
    found: dict[int, int] = {}
    for step, life in surviving(lives).items():
        end = max((stop for line in life.lines[step] for _, stop in line.samples), default=0)
        path = folder / "attempts" / f"{life.attempt:03d}" / MIX
        if step > proof.last_step or not path.exists():
            continue
        followed = Mixture.load(read_json(path), mixture.eras.seed)
        if followed.eras.until(end) != mixture.eras.until(end):
            found.setdefault(life.attempt, step)
    proof.findings += [
        f"step {step}: attempt {attempt} followed another mixture than the newest checkpoint says"
        for attempt, step in found.items()
    ]
