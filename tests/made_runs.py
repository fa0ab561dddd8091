"""Folders of runs that nobody trained: what a run leaves behind, made up for pages and tables."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from trainer.files import write_json
from trainer.notes import ABOUT, BASELINES, SAMPLE, write_note

CONFIG: dict[str, Any] = {
    "_target_": "trainer.run.Run",
    "max_steps": 40,
    "name": "made",
    "runs": "runs",
    "model": {"_target_": "models.llama.LlamaSpec", "hidden_size": 64},
    "task": {"_target_": "trainer.tasks.causal_lm.CausalLMTask"},
    "data": {"path": "docs", "sources": {"web": {"weight": 3}, "code": {"weight": 1}}},
    "optim": {"lr": 0.003},
}
TARGETS = 100


def loss_of(step: int) -> float:
    """Return the loss of a step, which falls."""
    return 2.0 + 3.0 * math.exp(-step / 10)


def made_run(
    folder: Path,
    *,
    steps: int = 40,
    log_every: int = 1,
    loss: Callable[[int], float] = loss_of,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a run that has finished, of one start, and return its folder."""
    attempt = folder / "attempts/001"
    attempt.mkdir(parents=True)
    (folder / "ledger").mkdir()
    text = yaml.safe_dump(CONFIG | (config or {}))
    for parent in (folder, attempt):
        (parent / "config.yaml").write_text(text)
    words = ["experiment=demo", "optim.lr=0.003"]
    write_json(attempt / "command.json", {"words": words})
    left = {"code": 0, "reason": "finished", "time": 1.0}
    (attempt / "exit.00000.json").write_text(json.dumps(left))
    write_json(folder / "environment.json", {"git_commit": "abc", "packages": {"torch": "2.13"}})
    points = []
    for step in range(log_every, steps + 1, log_every):
        points.append(train_point(step, loss(step)))
        if step % 20 == 0:
            points.append(
                {"step": step, "split": "eval", "loss": loss(step) + 0.1, "num_targets": 500,
                 "bits_per_byte": loss(step) / 2, "time": 1000.0 + step}
            )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in points))
    append_steps(folder, range(1, steps + 1), attempt=1, loss=loss)
    write_note(folder, ABOUT, {
        "parameters": 606_912, "trained_parameters": 606_912, "documents": 199, "tokens": 31_620,
        "held_out_documents": 1, "max_steps": steps, "epochs": {"": 0.5}, "fingerprint": "f00d",
        "banner": {"layout": "one process on cpu, precision fp32"},
    })  # fmt: skip
    write_note(folder, BASELINES, {"metric": "bits_per_byte", "values": {"unigram": 7.0}})
    said = {"step": steps, "temperature": 0.8, "prompt": "def ", "text": "def main():"}
    write_note(folder, SAMPLE, said)
    return folder


def train_point(step: int, loss: float | str) -> dict[str, Any]:
    return {
        "step": step, "split": "train", "loss": loss, "num_targets": TARGETS, "loss/web": loss,
        "num_targets/web": 75, "loss/code": loss, "num_targets/code": 25, "tokens": step * TARGETS,
        "grad_norm": 1.0 / step, "lr": 0.003, "skipped_steps": 0, "tokens_per_second": 1000.0,
        "data_wait_fraction": 0.01, "mfu": None, "memory_gib": 0.5, "time": 1000.0 + step,
    }  # fmt: skip


def append_steps(
    folder: Path,
    steps: range,
    *,
    attempt: int,
    loss: Callable[[int], float] = loss_of,
    skipped: tuple[int, ...] = (),
) -> None:
    """Append executed steps to the ledger of rank 0."""
    with open(folder / "ledger/rank00000.jsonl", "a") as file:
        for step in steps:
            line = {
                "attempt": attempt, "step": step, "data_rank": 0, "samples": [[step, step + 1]],
                "loss_sum": (loss(step) * TARGETS).hex(), "num_targets": TARGETS,
                "skipped": step in skipped,
                **({"flags": ["gradient_not_finite"]} if step in skipped else {}),
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")


def add_start(folder: Path, number: int, **files: dict[str, Any]) -> None:
    """Add the folder of another start with the files named, `exit` or `verdict`."""
    attempt = folder / f"attempts/{number:03d}"
    attempt.mkdir()
    (attempt / "config.yaml").write_text((folder / "config.yaml").read_text())
    for name, values in files.items():
        file = attempt / f"{'exit.00000' if name == 'exit' else name}.json"
        file.write_text(json.dumps(values))
