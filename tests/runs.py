"""A tiny run for tests, built without Hydra: the same specs, real code paths."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from launch.binding import bind_run
from launch.compose import compose
from tests.conftest import tiny_spec
from tests.texts import texts_in
from trainer.adapters.protocol import NoAdapter
from trainer.best import BestSpec
from trainer.callbacks.protocol import Callback
from trainer.checkpoint.spec import CheckpointSpec
from trainer.construct import Start, fit
from trainer.control import StopRequest
from trainer.data.pretraining import PretrainingData
from trainer.directory import CONFIG, new_attempt
from trainer.distributed import Placement
from trainer.engines.native import NativeEngine
from trainer.freeze import FreezeSpec
from trainer.mesh import MeshSpec
from trainer.optim import AdamW
from trainer.progress import Progress
from trainer.run import Run
from trainer.schedule import Constant
from trainer.tasks.causal_lm import CausalLMTask


def tiny_run(cache: Path | None, **changes: Any) -> Run:
    """Ten steps of a two-layer Llama on ten short programs, logged at every step.

    Keys with a `data_` prefix change the data spec; all others are fields of Run. It waits for its
    checkpoints: whoever kills it then knows what is on disk. Without `cache` it can be looked at,
    and not be trained.
    """
    data = PretrainingData(
        path=str(texts_in(cache)) if cache else "stdlib", row_tokens=32, global_rows=8,
        micro_rows=2, max_documents=10, cache=str(cache or "unused"),
    )  # fmt: skip
    data_changes = {k.removeprefix("data_"): v for k, v in changes.items() if k.startswith("data_")}
    settings: dict[str, Any] = {
        "model": tiny_spec(),
        "task": CausalLMTask(chunk_tokens=24),
        "data": replace(data, **data_changes),
        "engine": NativeEngine(),
        "mesh": MeshSpec(dp_replicate=-1),
        "optim": AdamW(lr=1e-2),
        "schedule": Constant(),
        "freeze": FreezeSpec(),
        "adapter": NoAdapter(),
        "checkpoint": CheckpointSpec(background=False),
        "best": BestSpec(),
        "callbacks": {},
        "name": "tiny",
        "runs": "runs",
        "seed": 0,
        "max_steps": 10,
        "max_epochs": None,
        "log_every": 1,
        "eval_every": None,
        "save_every": None,
        "deterministic": "off",
        "precision": "fp32",
        "tokenizer": "byte",
        "weights": "random",
        "resume": "auto",
        "resume_step": None,
        "resume_allow": [],
        "max_skipped_in_a_row": 3,
        "timeout_seconds": 60.0,
    }
    settings |= {k: v for k, v in changes.items() if not k.startswith("data_")}
    return Run(**settings)


def start_in(folder: Path, placement: Placement, request: StopRequest | None = None) -> Start:
    """Return a Start whose attempt lies in `folder`."""

    def locate(_: int) -> Path:
        attempt = new_attempt(folder)
        (attempt / CONFIG).write_text(yaml.safe_dump({"made": "by a test"}))
        return attempt

    return Start(placement=placement, locate=locate, request=request or StopRequest())


def train(placement: Placement, folder: Path, run: Run) -> bool:
    """Train one rank in `folder`: what `run_ranks` calls."""
    return fit(run, start_in(folder, placement))


def train_words(placement: Placement, folder: Path, words: list[str]) -> bool:
    """Train one rank of a command line in `folder`, which gets its resolved config."""
    tree = compose(words).tree | {"name": folder.name}
    run: Run = bind_run(tree)

    def locate(_: int) -> Path:
        attempt = new_attempt(folder)
        (attempt / CONFIG).write_text(yaml.safe_dump(tree))
        return attempt

    return fit(run, Start(placement=placement, locate=locate, request=StopRequest()))


class DieAt(Callback):
    """Ends every rank at a log point, as `kill -9` would: its own spec and callback."""

    def __init__(self, step: int) -> None:
        self.step = step

    def build(self) -> "DieAt":
        return self

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        if progress.step == self.step:
            os._exit(9)
