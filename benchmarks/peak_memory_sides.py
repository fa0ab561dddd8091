"""One side of the comparison of peak memory, in a process of its own: our run, or the Trainer's.

    python -m benchmarks.peak_memory_sides ours|theirs INPUTS OUTPUT THREADS

reads what `prepare` left in INPUTS, trains, and writes OUTPUT/curve.json.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from benchmarks.roofline.cases import CASES
from benchmarks.train_step_inputs import WEIGHTS, write_weights
from benchmarks.train_step_sides import Curve
from benchmarks.train_step_sides import ours as train_ours
from models.heads import CAUSAL_LM, SEQUENCE
from models.nn.head import IGNORED
from trainer.adapters.lora import LoRA
from trainer.batch import Batch
from trainer.data.document_data import DocumentData
from trainer.run import Run
from trainer.run_images import fitted
from trainer.run_tokenizer import tokenizer_of

CASE, FOLDER = "case.json", "data"
PAD = 0  # no text of bytes has it
MICRO = 8  # rows or documents of a forward pass, on both sides
Row = dict[str, torch.Tensor]


def prepare(inputs: Path) -> None:
    """Write the data's cache and the weights of the case that INPUTS/case.json names."""
    run = _run(inputs)
    _loader(run).step(0)
    labels = run.data.labels
    more = {} if labels is None else {"num_labels": len(labels.names), "pad_token_id": PAD}
    write_weights(run, inputs / WEIGHTS, run.model.hf_config(_head(run)) | more)


def _run(inputs: Path) -> Run:
    found = json.loads((inputs / CASE).read_text())
    return CASES[found["name"]].run(inputs / FOLDER, found["steps"], precision="bf16")


def _loader(run: Run) -> Any:
    tokenizer = tokenizer_of(run.data, run.tokenizer_setting, run.model)
    loader, _ = fitted(run.data, run.model).build(
        tokenizer=tokenizer, seed=run.seed, rank=0, num_ranks=1
    )
    return loader


def _head(run: Run) -> str:
    return SEQUENCE if run.data.labels is not None else CAUSAL_LM


def ours(inputs: Path, output: Path, curve: Curve) -> None:
    """Train by the function that `tessera train` ends in."""
    run = replace(_run(inputs), weights=str(inputs / WEIGHTS))
    train_ours(run, inputs, output, curve)


def theirs(inputs: Path, output: Path, curve: Curve) -> None:
    """Train by transformers.Trainer: bf16=True, its own AdamW, adapters by peft."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    run = _run(inputs)
    is_classifier = _head(run) == SEQUENCE
    rows = Rows(run, whole_rows=not is_classifier)
    accumulation = rows.per_step // MICRO
    # It adds up a classifier's losses over micro-batches (transformers 5.23), where it means them.
    summed = accumulation if is_classifier else 1

    class Recorder(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            curve.start()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:  # the summary at the end has none
                curve.add(logs["loss"] / summed)

    trainer = Trainer(
        model=_model(run, inputs),
        args=TrainingArguments(
            output_dir=str(output), max_steps=run.num_steps, logging_steps=1, disable_tqdm=True,
            per_device_train_batch_size=MICRO, gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential", bf16=True, use_cpu=True, use_cache=False,
            dataloader_num_workers=0, dataloader_pin_memory=False, remove_unused_columns=False,
            save_strategy="no", report_to="none",
        ),
        data_collator=collated,
        train_dataset=rows,
        compute_loss_func=_loss if run.data.image_size is not None else None,
        callbacks=[Recorder()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """Return its loss over all logits: Idefics' own forgets its additional tokens, and fails."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    size, count = outputs.logits.shape[-1], num_items_in_batch
    return ForCausalLMLoss(outputs.logits, labels, size, num_items_in_batch=count)


def _model(run: Run, inputs: Path) -> Any:
    """Return their model of the same weights; a base that is frozen in 16 bits."""
    import transformers

    (architecture,) = run.model.hf_config(_head(run))["architectures"]
    adapter = run.adapter if isinstance(run.adapter, LoRA) else None
    model = getattr(transformers, architecture).from_pretrained(
        inputs / WEIGHTS, dtype=torch.bfloat16 if adapter else torch.float32,
        attn_implementation="sdpa",
    )  # fmt: skip
    if adapter is None:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules="all-linear")
    return get_peft_model(model, config)


class Rows(Dataset[Row]):
    """What our loader hands out, made when it is asked for: whole rows, or their documents."""

    def __init__(self, run: Run, *, whole_rows: bool) -> None:
        self.loader = _loader(run)
        self.split: Callable[[Batch], list[Row]] = rows_of if whole_rows else documents_of
        self.per_step = MICRO
        if not whole_rows:
            assert isinstance(run.data, DocumentData)
            self.per_step = run.data.global_documents
        self.steps, self.number, self.rows = run.num_steps, -1, list[Row]()

    def __len__(self) -> int:
        return self.steps * self.per_step

    def __getitem__(self, index: int) -> Row:
        number, place = divmod(index, self.per_step)
        if number != self.number:
            batches = self.loader.step(number).micro_batches
            self.number, self.rows = number, [row for b in batches for row in self.split(b)]
            assert len(self.rows) == self.per_step
        return self.rows[place]


def rows_of(batch: Batch) -> list[Row]:
    """Return each row with our targets, at their own tokens as transformers wants them."""
    is_text = batch.segment_ids > 0
    tensors = {"input_ids": batch.input_ids, **batch.images}
    if not bool(is_text.all()):  # a mask for every row costs sdpa its causal path
        tensors["attention_mask"] = is_text.long()
    tensors["labels"] = F.pad(batch.labels[:, :-1], (1, 0), value=IGNORED)
    return [{key: value[n] for key, value in tensors.items()} for n in range(batch.num_rows)]


def documents_of(batch: Batch) -> list[Row]:
    """Return each document with its label."""
    assert batch.class_labels is not None
    found: list[Row] = []
    for ids, segments, labels in zip(
        batch.input_ids, batch.segment_ids, batch.class_labels, strict=True
    ):
        for number in range(1, int(segments.max()) + 1):
            found.append({"input_ids": ids[segments == number], "labels": labels[number - 1]})
    return found


def collated(rows: list[Row]) -> Row:
    """Stack rows, or pad documents on the right; nothing is longer than its longest text."""
    if "attention_mask" in rows[0]:
        longest = max(int(row["attention_mask"].sum()) for row in rows)
        tokens = ("input_ids", "attention_mask", "labels", "image_attention_mask")
        rows = [{k: v[:longest] if k in tokens else v for k, v in row.items()} for row in rows]
    if len({len(row["input_ids"]) for row in rows}) == 1:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    ids = [row["input_ids"] for row in rows]
    padded = pad_sequence(ids, batch_first=True, padding_value=PAD)
    lengths = torch.tensor([len(row) for row in ids])
    return {
        "input_ids": padded,
        "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


SIDES: dict[str, Callable[[Path, Path, Curve], None]] = {"ours": ours, "theirs": theirs}


def main() -> None:
    """Train one side and leave its curve."""
    side, inputs, output, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    curve = Curve()
    SIDES[side](Path(inputs), Path(output), curve)
    (Path(output) / "curve.json").write_text(json.dumps(asdict(curve)))


if __name__ == "__main__":
    main()
