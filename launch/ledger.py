"""`tessera ledger`: prove that a run trained on every sample exactly once, whatever befell it."""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.exit_codes import CHECK_FAILED, FINISHED
from launch.truth import truth
from launch.words import options_of

if TYPE_CHECKING:
    from trainer.ledger import Life
    from trainer.ledger_proof import Proof

USAGE = """usage: tessera ledger run=DIR [step=N] [json=true]

Reads what every rank of every start wrote down, and proves of steps 1 to N: each sample was trained
on exactly once, in order; steps that were executed again, after a crash, had the same samples and,
where the config promises it (deterministic), the same loss to the last bit. Of named sources: how
many samples of each, by the mixtures of the newest checkpoint, which all starts must have followed.
Exit code 1: not so; says which samples, step and start.

  run=DIR     the run's folder
  step=N      the last step that counts; default: that of the newest checkpoint
  json=true   everything as one JSON object
"""
SHOWN = 20  # findings; all of them with json=true
# What changes no number of a step.
_IDLE = (
    "name", "runs", "resume", "resume_step", "resume_allow", "launch.", "log_every", "eval_every",
    "eval_share", "save_every", "checkpoint.", "callbacks.", "timeout_seconds", "validation.",
    "data.cache", "tracker.", "stop_at", "check_replicas_every",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run `tessera ledger` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return FINISHED
    needed, defaults = {"run": "DIR"}, {"json": "false"}
    options = options_of("ledger", arguments, needed=needed, defaults=defaults, optional=["step"])
    is_json = truth("json", options["json"])
    proof, attempts = proved(Path(options["run"]).expanduser(), options.get("step"))
    if is_json:
        print(json.dumps(asdict(proof) | {"attempts": attempts, "holds": proof.holds}))
    else:
        print("\n".join(_said(proof, attempts)))
    return FINISHED if proof.holds else CHECK_FAILED


def proved(folder: Path, step: str | None = None) -> tuple["Proof", int]:
    """Return the proof of a run's ledgers, and how many starts wrote them."""
    from trainer.checkpoint.commit import committed_steps, step_folder
    from trainer.directory import CHECKPOINTS
    from trainer.files import read_json
    from trainer.ledger import read_lives
    from trainer.ledger_proof import prove

    lives = read_lives(folder)
    if not lives:
        raise ValueError(f"{folder} holds no ledger; give the folder of a run")
    newest = max(committed_steps(folder / CHECKPOINTS), default=None)
    last_step = _last_step(folder, step, newest)
    saved = None
    if last_step == newest:
        saved = read_json(step_folder(folder / CHECKPOINTS, newest) / "state/state.json")["data"]
    proof = prove(
        lives, last_step, end=saved and saved["global_sample"], agreement=_agreement_in(folder)
    )
    if saved is not None:
        proof.check_passed_over(saved.get("passed_over", []))
    if saved is not None and "mix" in saved:
        from trainer.ledger_sources import prove_sources

        prove_sources(proof, folder, lives, saved)
    return proof, len({life.attempt for life in lives})


def _last_step(folder: Path, step: str | None, newest: int | None) -> int:
    if step is not None:
        if not step.isdigit() or step == "0":
            raise ValueError(f"step={step} is no step; set it to 1 or more")
        return int(step)
    if newest is None:
        raise ValueError(
            f"{folder} has no checkpoint, so no step of it survives; "
            "say with step=N up to where its ledger shall be proved"
        )
    return newest


def _agreement_in(folder: Path) -> Any:
    """Return what says on what two starts of a run agree: their configs tell."""
    from trainer.directory import CONFIG, MIX
    from trainer.drift import difference, fits
    from trainer.files import read_json
    from trainer.ledger_proof import NUMBERS, SAMPLES
    from trainer.stored_config import read_stored

    @cache
    def config(attempt: int) -> dict[str, Any] | None:
        path = folder / "attempts" / f"{attempt:03d}" / CONFIG
        return read_stored(path) if path.exists() else None

    @cache
    def eras(attempt: int) -> Any:
        path = folder / "attempts" / f"{attempt:03d}" / MIX
        return read_json(path)["eras"] if path.exists() else None

    def agreement(earlier: "Life", later: "Life") -> tuple[str, ...]:
        old, new = config(earlier.attempt), config(later.attempt)
        if old is None or new is None:
            return ()
        changed = {key for key in difference(old, new) if not fits(key, _IDLE)}
        if {key for key in changed if not fits(key, ("mesh.",))}:
            return ()
        if eras(earlier.attempt) != eras(later.attempt):  # other data at the same places
            return (SAMPLES,)
        mode = new.get("deterministic", "off")
        is_same_layout = not changed and earlier.ranks == later.ranks
        if mode == "topology_free" or (mode != "off" and is_same_layout):
            return SAMPLES, NUMBERS
        return (SAMPLES,)

    return agreement


def _said(proof: "Proof", attempts: int) -> list[str]:
    """Return the proof in words."""
    passed_over = sum(last - first for first, last in proof.passed_over)
    left_out = f", {passed_over:,} left out by rewinds" if passed_over else ""
    lines = [
        f"steps 1 to {proof.last_step:,} of {attempts} start(s): {proof.samples:,} samples, "
        f"{proof.lost} lost, {proof.doubled} doubled{left_out}",
        f"{proof.reexecuted:,} steps executed again, {proof.compared:,} of them compared in every "
        f"bit, {proof.mismatched} with other numbers or samples",
        *proof.findings[:SHOWN],
    ]
    if proof.by_source:
        each = ", ".join(f"{name} {count:,}" for name, count in proof.by_source.items())
        lines.insert(1, f"by source, over {proof.mixtures} mixture(s): {each}")
    if len(proof.findings) > SHOWN:
        lines.append(f".. and {len(proof.findings) - SHOWN:,} more; see all with json=true")
    lines.append("every sample exactly once" if proof.holds else "NOT exactly once")
    return lines
