"""`tessera replay`: a step of a run once more, document by document."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.exit_codes import CHECK_FAILED, FINISHED
from launch.truth import truth
from launch.visible_text import visible
from launch.words import options_of

if TYPE_CHECKING:
    from trainer.replay import Document, Replayed

USAGE = """usage: tessera replay run=DIR step=N [json=true]

Trains step N of a run once more, in this process and without writing into the run's folder: from
the newest intact checkpoint before it, over the steps in between, with the data of the ledger.
Shows each document's loss and how it begins, the highest loss first, and compares the step's loss
with the recorded one: the same bits where the run was one process on such a machine, else by how
much it is off.

  run=runs/NAME    the run's folder
  step=N           from 1
  json=true        all documents as one JSON object, in the order of the rows
exit code: 0 reproduced, 1 not
"""
_ALONE: dict[str, Any] = {  # one process that only takes steps has no use for the rest
    "mesh": {"_target_": "trainer.mesh.MeshSpec"},
    "best": {"_target_": "trainer.best.BestSpec"},
    "validation": {"_target_": "trainer.validation.spec.ValidationSpec"},
    "callbacks": {},
    "eval_every": None,
    "check_replicas_every": None,
    "stop_at": None,
    "resume": "never",
    "resume_step": None,
}
_NATIVE = "trainer.engines.native.NativeEngine"
_KEPT = ("activation_checkpointing", "compile", "float8", "offload_optimizer")  # of an engine
MAX_ROWS, TEXT_WIDTH = 30, 48


def main(arguments: list[str]) -> int:
    """Run `tessera replay` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return FINISHED
    folder, step, is_json = _options(arguments)
    replayed = _replay(folder, step)
    if is_json:
        print(json.dumps(_numbers(replayed)))
    else:
        print("\n".join(_lines(folder, replayed)))
    return FINISHED if replayed.is_reproduced else CHECK_FAILED


def _options(arguments: list[str]) -> tuple[Path, int, bool]:
    needed, defaults = {"run": "DIR", "step": "N"}, {"json": "false"}
    given = options_of("replay", arguments, needed=needed, defaults=defaults)
    if not given["step"].isdecimal() or int(given["step"]) < 1:
        raise ValueError(f"step={given['step']} is no step; the first is step=1")
    is_json = truth("json", given["json"])
    folder = Path(given["run"]).expanduser()
    if not (folder / "ledger").is_dir():
        raise ValueError(f"run={folder} has no ledger; give the folder of a run, as in runs/NAME")
    return folder, int(given["step"]), is_json


def _replay(folder: Path, step: int) -> "Replayed":
    from launch.binding import bind_run
    from launch.determinism import hold
    from launch.terminal import configure_logging
    from trainer.replay import recorded_step, replay
    from trainer.stored_config import read_stored

    configure_logging(rank=0)
    recorded = recorded_step(folder, step)
    # Of the start that trained it: a later one may have had other settings.
    config = folder / "attempts" / f"{recorded.attempt:03d}" / "config.yaml"
    tree: dict[str, Any] = read_stored(config) | _ALONE
    hold(tree.get("deterministic"), os.environ)  # as in training, which needs it on a GPU
    engine = tree["engine"]
    tree["engine"] = {"_target_": _NATIVE, **{k: engine[k] for k in _KEPT if k in engine}}
    data = tree["data"]
    if data.get("micro_rows", 1) is None:  # all rows of a rank: of one of that many
        data["micro_rows"] = data["global_rows"] // recorded.num_shares
    run = bind_run(tree)
    run.check(1)
    return replay(run, folder, step)


def _lines(folder: Path, replayed: "Replayed") -> list[str]:
    """Return what a person reads."""
    again = replayed.step - 1 - replayed.start
    start = f"the checkpoint of step {replayed.start}" if replayed.start else "the beginning"
    first = f", {again} steps trained again first" if again else ""
    found = replayed.documents
    by_loss = sorted(found, key=_urgency, reverse=True)
    lines = [
        f"step {replayed.step} of {folder}, from {start}{first}",
        f"  loss {_mean(replayed.loss_sum, replayed.num_targets)} over "
        f"{replayed.num_targets:,} targets, gradient norm {replayed.grad_norm:.4f}"
        + _flags(replayed),
        f"  {_verdict(replayed)}",
        "",
        f"{'loss':>10} {'targets':>8} {'tokens':>8}  document and how it begins",
    ]
    lines += [_line(document) for document in by_loss[:MAX_ROWS]]
    if len(found) > MAX_ROWS:
        lines.append(f"  .. and {len(found) - MAX_ROWS} more with a lower loss; json=true has all")
    return lines


def _urgency(document: "Document") -> float:
    mean = document.loss_sum / max(1, document.num_targets)
    return math.inf if math.isnan(mean) else mean


def _mean(loss_sum: float, num_targets: int) -> str:
    return f"{loss_sum / max(1, num_targets):.4f}"


def _flags(replayed: "Replayed") -> str:
    from trainer.numerics.spike import words_of

    return f", found: {words_of(replayed.flags)}" if replayed.flags else ""


def _line(document: "Document") -> str:
    text = visible(document.text).replace("\n", "")
    return (
        f"{_mean(document.loss_sum, document.num_targets):>10} {document.num_targets:>8,} "
        f"{document.num_tokens:>8,}  {visible(document.place)}  {text[:TEXT_WIDTH]}"
    )


def _verdict(replayed: "Replayed") -> str:
    recorded = replayed.recorded
    if recorded.samples != list(replayed.samples):
        return (
            f"NOT the run's data: samples {replayed.samples.start} to {replayed.samples.stop - 1} "
            f"here, {recorded.samples[0]} to {recorded.samples[-1]} in the ledger"
        )
    if replayed.is_same_bits:
        return "reproduced: the recorded loss, in every bit"
    mean = _mean(recorded.loss_sum, recorded.num_targets)
    off = f"recorded {mean}, off by {replayed.difference:.1e} of it"
    if replayed.is_reproduced:
        return f"reproduced but for rounding: {off}"
    return f"NOT reproduced: {off}, more than {replayed.tolerance:.0e}"


def _numbers(replayed: "Replayed") -> dict[str, Any]:
    from trainer.numerics.spike import names_of
    from trainer.record import plain

    numbers = {
        "step": replayed.step, "start": replayed.start,
        "loss_sum": plain(replayed.loss_sum), "loss_sum_hex": replayed.loss_sum.hex(),
        "num_targets": replayed.num_targets, "grad_norm": plain(replayed.grad_norm),
        "flags": names_of(replayed.flags),
        "recorded_loss_sum_hex": replayed.recorded.loss_sum.hex(),
        "difference": plain(replayed.difference), "same_bits": replayed.is_same_bits,
        "reproduced": replayed.is_reproduced,
    }  # fmt: skip
    documents = [
        {key: plain(value) for key, value in asdict(document).items()}
        for document in replayed.documents
    ]
    return numbers | {"documents": documents}
