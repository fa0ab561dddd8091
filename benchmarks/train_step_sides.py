"""One side of the train-step comparison, in a process of its own: our loop, or Trainer's.

    python -m benchmarks.train_step_sides SIDE INPUTS OUTPUT THREADS

SIDE is ours or theirs, or one of them with `_compiled` behind it: under torch.compile. It reads
what train_step_inputs wrote to INPUTS, trains, and writes OUTPUT/curve.json.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.starts import start_in
from benchmarks.train_step_inputs import ROWS, WEIGHTS, load_run
from trainer.callbacks.protocol import Callback, RunView
from trainer.construct import fit
from trainer.engines.native import NativeEngine
from trainer.meter import host_bytes
from trainer.optim import AdamW
from trainer.progress import Progress
from trainer.run import Run


@dataclass(kw_only=True)
class Curve:
    """What one side did: filled while it trains."""

    losses: list[float] = field(default_factory=list)
    """Mean loss of each step, in nats per target."""
    stamps: list[float] = field(default_factory=list)
    """When the host had read each loss, in seconds of the monotonic clock."""
    cpu_stamps: list[float] = field(default_factory=list)
    """The same moments in seconds of CPU time, over all threads."""
    held_gib: float = 0.0
    """Memory just before step 1."""
    peak_gib: float = 0.0

    def start(self) -> None:
        self.held_gib = memory_gib("VmRSS")

    def add(self, loss: float) -> None:
        self.stamps.append(time.monotonic())
        self.cpu_stamps.append(time.process_time())
        self.losses.append(loss)
        self.peak_gib = memory_gib("VmHWM")


def memory_gib(key: Literal["VmHWM", "VmRSS"]) -> float:
    """Return the resident memory (VmRSS) or its high-water mark; on CUDA the allocator's."""
    if torch.cuda.is_available():
        is_peak = key == "VmHWM"
        read = torch.cuda.max_memory_allocated if is_peak else torch.cuda.memory_allocated
        return read() / 2**30
    return host_bytes(key) / 2**30


@dataclass(frozen=True, kw_only=True)
class RecorderSpec:
    """Makes the callback that writes into `curve`."""

    curve: Curve

    def build(self) -> Callback:
        return _Recorder(self.curve)


class _Recorder(Callback):
    def __init__(self, curve: Curve) -> None:
        self.curve = curve

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.curve.start()

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        self.curve.add(metrics["loss"])


def ours(run: Run, inputs: Path, output: Path, curve: Curve) -> None:
    """Train by the function that `tessera train` ends in: data, steps, logs, last checkpoint."""
    run = replace(run, callbacks={"recorder": RecorderSpec(curve=curve)})
    fit(run, start_in(output / "ours"))


def ours_compiled(run: Run, inputs: Path, output: Path, curve: Curve) -> None:
    """The same with engine.compile=true."""
    assert isinstance(run.engine, NativeEngine)
    ours(replace(run, engine=replace(run.engine, compile=True)), inputs, output, curve)


def theirs(
    run: Run, inputs: Path, output: Path, curve: Curve, *, is_compiled: bool = False
) -> None:
    """Train by transformers.Trainer, at its fastest settings for rows without padding.

    No attention mask, so that sdpa takes its causal path; no cache; no worker processes, as the
    rows lie in memory already; nothing saved. Trainer's own grouping decays the embedding too, and
    its schedules start from rate 0: optimizer and schedule are passed in, equal to ours.
    """
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    class Recorder(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            curve.start()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:  # the summary at the end has none
                curve.add(logs["loss"])

    model = AutoModelForCausalLM.from_pretrained(
        inputs / WEIGHTS, dtype=torch.float32, attn_implementation="sdpa"
    )
    assert isinstance(run.optim, AdamW)
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=run.num_steps, logging_steps=1, disable_tqdm=True,
        per_device_train_batch_size=run.data.micro_rows, train_sampling_strategy="sequential",
        bf16=run.precision == "bf16", use_cpu=not torch.cuda.is_available(), use_cache=False,
        torch_compile=is_compiled,
        dataloader_num_workers=0, dataloader_pin_memory=torch.cuda.is_available(),
        max_grad_norm=run.optim.max_grad_norm or 0.0, logging_nan_inf_filter=False,
        save_strategy="no", eval_strategy="no", report_to="none",
    )  # fmt: skip
    rows = torch.load(inputs / ROWS)
    optimizer = our_optimizer(run.optim, model, run.model.layout.embedding)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: run.schedule.factor(done + 1, run.num_steps)
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizers=(optimizer, schedule),
        callbacks=[Recorder()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def our_optimizer(optim: AdamW, model: nn.Module, embedding: str) -> torch.optim.Optimizer:
    """Return the fused AdamW of the Trainer's default, with our groups: only matrices decay."""
    parameters = list(model.named_parameters())
    is_decayed = {name: p.ndim >= 2 and name != f"{embedding}.weight" for name, p in parameters}
    groups = [
        {"params": [p for n, p in parameters if is_decayed[n]], "weight_decay": optim.weight_decay},
        {"params": [p for n, p in parameters if not is_decayed[n]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


SIDES: dict[str, Callable[[Run, Path, Path, Curve], None]] = {
    "ours": ours,
    "theirs": theirs,
    "ours_compiled": ours_compiled,
    "theirs_compiled": partial(theirs, is_compiled=True),
}


def main() -> None:
    """Train one side and leave its curve."""
    side, inputs, output, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    curve = Curve()
    SIDES[side](load_run(Path(inputs)), Path(inputs), Path(output), curve)
    (Path(output) / "curve.json").write_text(json.dumps(asdict(curve)))


if __name__ == "__main__":
    main()
