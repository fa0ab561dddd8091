"""One contender of the fine-tuning comparison, in a process of its own.

    python -m benchmarks.finetune_sides CONTENDER INPUTS OUTPUT THREADS

reads what finetune_inputs wrote to INPUTS, trains an epoch, and writes OUTPUT/curve.json.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune_inputs import DOCUMENTS, FACTS, TOKENIZER
from benchmarks.train_step_inputs import WEIGHTS, load_run
from benchmarks.train_step_sides import Curve, our_optimizer
from benchmarks.train_step_sides import ours as train_ours
from models.nn.head import IGNORED
from models.nn.unpadded import num_computed
from trainer.optim import AdamW
from trainer.precision import PRECISIONS
from trainer.run import Run


@dataclass(kw_only=True)
class Epoch(Curve):
    """What one contender did; the counts are of each optimizer step."""

    targets: list[int] = field(default_factory=list)
    """Tokens that were trained on."""
    tokens: list[int] = field(default_factory=list)
    """Tokens of documents, padding left out."""
    positions: list[int] = field(default_factory=list)
    """Tokens and padding: what was computed."""
    leakage: float | None = None
    """Largest change of a packed document's logits when another one of its row changes."""
    packing: float | None = None
    """Largest difference between a packed document's logits and those that it has alone."""


def ours(run: Run, inputs: Path, output: Path, epoch: Epoch) -> None:
    """Train by the function that `tessera train` ends in, logging each step."""
    train_ours(run, inputs, output, epoch)
    tokenizer = run.data.tokenizer(run.tokenizer, run.model.vocab_size)
    loader, _ = run.data.build(tokenizer=tokenizer, seed=run.seed, rank=0, num_ranks=1)
    dtype = PRECISIONS[run.precision].compute
    for number in range(run.num_steps):  # what was trained on, read again
        step = loader.step(number)
        epoch.tokens.append(step.num_tokens)
        epoch.positions.append(
            sum(num_computed(batch.segment_ids, dtype) for batch in step.micro_batches)
        )
        epoch.targets.append(sum(int((b.labels != IGNORED).sum()) for b in step.micro_batches))


def padded(run: Run, inputs: Path, output: Path, epoch: Epoch) -> None:
    """Train by transformers.Trainer as most do: each micro-batch padded to its longest document.

    In our order, so that every step sees the same documents.
    """
    _trainer(run, inputs, output, epoch, "sequential")


def grouped(run: Run, inputs: Path, output: Path, epoch: Epoch) -> None:
    """Train by transformers.Trainer at its best: documents of like length together."""
    _trainer(run, inputs, output, epoch, "group_by_length")


def flattened(run: Run, inputs: Path, output: Path, epoch: Epoch) -> None:
    """Train by transformers.Trainer's own best packed mode: a micro-batch is one row, no padding.

    DataCollatorWithFlattening, whose position ids tell sdpa's mask where documents begin. In our
    order, so that every step sees the same documents.
    """
    _trainer(run, inputs, output, epoch, "sequential", is_flat=True)


def trl(run: Run, inputs: Path, output: Path, epoch: Epoch) -> None:
    """Train by TRL's SFTTrainer with best-fit packing of the whole epoch.

    Its steps hold as many rows as hold `global_documents` on average.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    settings = json.loads((inputs / "settings.json").read_text())
    tokens = json.loads((inputs / FACTS).read_text())["tokens"]
    micro_tokens = settings["micro_rows"] * settings["max_tokens"]
    accumulation = max(1, round(tokens / run.num_steps / micro_tokens))
    model = AutoModelForCausalLM.from_pretrained(
        inputs / WEIGHTS, dtype=torch.float32, attn_implementation="sdpa"
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **_arguments(run, output), packing=True, max_length=settings["max_tokens"],
            per_device_train_batch_size=settings["micro_rows"],
            gradient_accumulation_steps=accumulation, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(
            [{"input_ids": ids} for ids in torch.load(inputs / DOCUMENTS)]
        ),
        processing_class=PreTrainedTokenizerFast.from_pretrained(inputs / TOKENIZER),
        optimizers=_optimizers(run, model),
    )  # fmt: skip
    first = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    epoch.leakage, epoch.packing = _leakage(model, first)
    _run_trainer(trainer, epoch, accumulation)


def _trainer(
    run: Run, inputs: Path, output: Path, epoch: Epoch, sampling: str, *, is_flat: bool = False
) -> None:
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForLanguageModeling,
        DataCollatorWithFlattening,
        PreTrainedTokenizerFast,
        Trainer,
        TrainingArguments,
    )

    settings = json.loads((inputs / "settings.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(
        inputs / WEIGHTS, dtype=torch.float32, attn_implementation="sdpa"
    )
    # Its own token: the collator takes every pad token out of the labels.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(inputs / TOKENIZER, pad_token="<pad>")
    padding = _inside_vocabulary(DataCollatorForLanguageModeling(tokenizer, mlm=False))
    documents = [{"input_ids": ids} for ids in torch.load(inputs / DOCUMENTS)]
    accumulation = settings["global_documents"] // settings["micro_documents"]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **_arguments(run, output), train_sampling_strategy=sampling,
            per_device_train_batch_size=settings["micro_documents"],
            gradient_accumulation_steps=accumulation,
        ),
        data_collator=DataCollatorWithFlattening() if is_flat else padding,
        train_dataset=documents,
        optimizers=_optimizers(run, model),
    )  # fmt: skip
    if is_flat:
        first = trainer.data_collator(documents[: settings["micro_documents"]])
        epoch.leakage, epoch.packing = _leakage(model, first)
    _run_trainer(trainer, epoch, accumulation)


def _inside_vocabulary(collate: Callable[..., Any]) -> Callable[..., Any]:
    """Give padding the id 0: the model has no row for the pad token, and nothing looks at it."""

    def collated(documents: list[dict[str, Any]]) -> Any:
        batch = collate(documents)
        batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
        return batch

    return collated


def _arguments(run: Run, output: Path) -> dict[str, Any]:
    assert isinstance(run.optim, AdamW)
    return {
        "output_dir": str(output), "num_train_epochs": 1, "logging_steps": 1, "disable_tqdm": True,
        "bf16": run.precision == "bf16", "use_cpu": True, "use_cache": False,
        "dataloader_pin_memory": False,
        "max_grad_norm": run.optim.max_grad_norm or 0.0, "logging_nan_inf_filter": False,
        "save_strategy": "no", "eval_strategy": "no", "report_to": "none",
    }  # fmt: skip


def _optimizers(run: Run, model: nn.Module) -> tuple[Any, Any]:
    assert isinstance(run.optim, AdamW)
    optimizer = our_optimizer(run.optim, model, run.model.layout.embedding)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: run.schedule.factor(done + 1, run.num_steps)
    )
    return optimizer, schedule


def _run_trainer(trainer: Any, epoch: Epoch, accumulation: int) -> None:
    """Train, and count in each step what its micro-batches held."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    class Recorder(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            epoch.start()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:  # the summary at the end has none
                epoch.add(logs["loss"])

    counts: list[tuple[int, int, int]] = []
    collate = trainer.data_collator

    def counted(documents: list[Any]) -> Any:
        batch = collate(documents)
        positions = batch["input_ids"].numel()
        is_token = batch.get("attention_mask", torch.tensor(positions))
        targets = int((batch["labels"][:, 1:] != IGNORED).sum())
        counts.append((targets, int(is_token.sum()), positions))
        return batch

    trainer.data_collator = counted
    trainer.add_callback(Recorder())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    for first in range(0, len(counts), accumulation):
        sums = map(sum, zip(*counts[first : first + accumulation], strict=True))
        for column, value in zip((epoch.targets, epoch.tokens, epoch.positions), sums, strict=True):
            column.append(value)


@torch.no_grad()
def _leakage(model: nn.Module, batch: dict[str, Any]) -> tuple[float, float]:
    """Change a row's first document: return how far the others' logits move, and from alone."""
    before = model(**batch).logits
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), before.shape[1]]
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, : starts[1]] = changed["input_ids"][0, : starts[1]].flip(0)
    moved = (model(**changed).logits - before)[0, starts[1] :].abs().max()
    alone = [
        (model(ids).logits - before[:, first:last]).abs().max()
        for first, last, ids in _documents(starts, batch["input_ids"])
    ]
    return float(moved), float(max(alone))


def _documents(starts: list[int], input_ids: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    for first, last in pairwise(starts):
        yield first, last, input_ids[:, first:last]


CONTENDERS: dict[str, Callable[[Run, Path, Path, Epoch], None]] = {
    "ours": ours, "padded": padded, "grouped": grouped, "flattened": flattened,
}  # fmt: skip
if find_spec("trl"):
    CONTENDERS["trl"] = trl


def main() -> None:
    """Train one contender and leave its curve."""
    side, inputs, output, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    epoch = Epoch()
    CONTENDERS[side](load_run(Path(inputs)), Path(inputs), Path(output), epoch)
    (Path(output) / "curve.json").write_text(json.dumps(asdict(epoch)))


if __name__ == "__main__":
    main()
