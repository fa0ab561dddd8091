"""One side of a case, in a process of its own: our engine's steps, or the Trainer's.

    python -m benchmarks.gpu.sides ours|theirs|theirs_compiled INPUTS OUTPUT THREADS

reads INPUTS/run.yaml, trains, and writes OUTPUT/curve.json.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import (
    OURS,
    THEIRS,
    THEIRS_COMPILED,
    TIMED,
    WARMUP,
    WATCHED,
    batch_of,
    ids_of,
    read_run,
    rows_of,
)  # fmt: skip
from trainer.adapters.lora import LoRA
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.flops import training_flops
from trainer.meter import peak_memory_gib
from trainer.parallel.materialise import Values, random_values
from trainer.parallel.pieces import unique_parameters
from trainer.run import Run


@dataclass(kw_only=True)
class Curve:
    """What a side did."""

    seconds: list[float] = field(default_factory=list)
    """Of each timed step, until the host had its loss."""
    losses: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    """Of tensors."""
    reserved_gib: float = 0.0
    """That torch took for them from the device; 0 on a CPU."""
    retries: int = 0
    """Of CUDA's allocator, in timed steps."""
    recompiles: int = 0
    """Graphs that were made behind the warm-up."""
    syncs: str = ""
    """The first operation of a step that made the host wait, in torch's words; empty: none."""
    is_watched: bool = False
    """Whether that was looked for: of our steps, on CUDA."""
    flops_per_token: int = 0
    """By trainer/flops.py."""
    published_flops: float = 0.0
    """6N + 12LdT per token: N without a table that only looks up."""


def ours(run: Run, output: Path) -> Curve:
    """Take whole steps of the engine that `tessera train` builds."""
    ranks = Ranks(Placement(), run.timeout_seconds)
    mesh = run.mesh.build(ranks=ranks)
    model = run.trained_model()
    curve = Curve(
        flops_per_token=training_flops(
            model, run.model.layout, run.model.attention_width, run.data.row_tokens
        ).per_token,
        published_flops=published_flops(run, model),
    )
    engine = build_engine(run, model, ranks, mesh, run.adapter.values(model, quick(run, model)))
    rows = rows_of(run)
    batches = [batch_of(ids) for ids in ids_of(run).split(rows)]
    tokens = rows * run.data.row_tokens

    def step(number: int) -> Any:
        return engine.train_step(number, [batches[number - 1]], tokens)

    for number in range(1, WARMUP + 1):
        float(step(number).loss_sum)
    before = _counts()
    for number in range(WARMUP + 1, WARMUP + TIMED + 1):
        start = time.perf_counter()
        result = step(number)
        loss = float(result.loss_sum)  # sync: as a log point does
        curve.seconds.append(time.perf_counter() - start)
        curve.losses.append(loss / (tokens - rows))
    curve.retries, curve.recompiles = (
        now - then for now, then in zip(_counts(), before, strict=True)
    )
    curve.peak_gib, curve.reserved_gib = peak_memory_gib(ranks.device), _reserved_gib()
    _watch(curve, partial(step, WARMUP + TIMED + 1), ranks.device)
    engine.close()
    ranks.close()
    return curve


def quick(run: Run, model: nn.Module) -> Values:
    """Return initial values of which long ones repeat themselves: no step is faster or slower for
    it, and to draw all of 8 B takes a CPU minutes."""
    values = random_values(model, run.model.initializer_range, run.seed)
    random = torch.Generator().manual_seed(run.seed)
    drawn = torch.randn(2**20 + 3, generator=random) * run.model.initializer_range

    def value(name: str, start: int, stop: int) -> Tensor:
        if stop - start <= len(drawn):
            return values(name, start, stop)
        times = -(-(stop - start) // len(drawn))
        return drawn.repeat(times)[: stop - start]

    return value


def _watch(curve: Curve, step: Callable[[], Any], device: torch.device) -> None:
    """Take steps that end where the host would wait for the GPU."""
    curve.is_watched = device.type == "cuda"
    with _sync_is_error(device):
        try:
            for _ in range(WATCHED):
                step()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            curve.syncs = str(error).splitlines()[0]


@contextmanager
def _sync_is_error(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _counts() -> tuple[int, int]:
    """Return the allocator's retries and the graphs that were compiled, since the start."""
    from torch._dynamo.utils import counters

    retries = torch.cuda.memory_stats().get("num_alloc_retries", 0) if _has_cuda() else 0
    return retries, counters["stats"]["unique_graphs"]


def _reserved_gib() -> float:
    return torch.cuda.max_memory_reserved() / 2**30 if _has_cuda() else 0.0


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def published_flops(run: Run, model: nn.Module) -> float:
    """Return 6N + 12LdT per token, as PaLM's appendix B and torchtitan count it.

    N: all weights but a table that only looks up (a tied one is the head); of LoRA as if all
    trained, which is not what is computed, but what is quoted.
    """
    table = model.get_submodule(run.model.layout.embedding).get_parameter("weight")
    head = model.get_submodule(str(model.head_name)).get_parameter("weight")
    weights = [weight for _, weight in unique_parameters(model)]
    count = sum(weight.numel() for weight in weights if weight is head or weight is not table)
    return 6.0 * count + 12.0 * run.model.attention_width * run.data.row_tokens


def theirs(run: Run, output: Path, *, is_compiled: bool = False) -> Curve:
    """Train by transformers.Trainer: bf16 autocast, sdpa, its fused AdamW, no attention mask."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )  # fmt: skip
    from transformers.trainer_callback import PrinterCallback

    curve, stamps = Curve(), [0.0]

    class Recorder(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:  # the summary at the end has none
                stamps.append(time.perf_counter())
                curve.losses.append(logs["loss"])

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            stamps[0] = stamps[0] or time.perf_counter()

    adapter = run.adapter if isinstance(run.adapter, LoRA) else None
    device = torch.device("cuda" if _has_cuda() else "cpu")
    with device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**run.model.hf_config()), attn_implementation="sdpa",
            dtype=torch.bfloat16 if adapter else torch.float32,  # a frozen base needs no master
        )  # fmt: skip
    if adapter is not None:
        model = _adapted(model, adapter)
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=WARMUP + TIMED, logging_steps=1, disable_tqdm=True,
        per_device_train_batch_size=run.data.micro_rows, bf16=True, use_cpu=device.type == "cpu",
        use_cache=False, torch_compile=is_compiled, optim="adamw_torch_fused",
        dataloader_pin_memory=device.type == "cuda", save_strategy="no", report_to="none",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids_of(run)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Recorder()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    curve.seconds = [b - a for a, b in pairwise(stamps)][WARMUP:]
    curve.losses = curve.losses[WARMUP:]
    curve.peak_gib, curve.reserved_gib = peak_memory_gib(device), _reserved_gib()
    return curve


def _adapted(model: nn.Module, adapter: LoRA) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules="all-linear")
    return get_peft_model(model, config)


SIDES: dict[str, Callable[[Run, Path], Curve]] = {
    OURS: ours,
    THEIRS: theirs,
    THEIRS_COMPILED: partial(theirs, is_compiled=True),
}


def main() -> None:
    """Train one side and leave its curve."""
    side, inputs, output, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    curve = SIDES[side](read_run(Path(inputs)), Path(output))
    (Path(output) / "curve.json").write_text(json.dumps(asdict(curve)))


if __name__ == "__main__":
    main()
