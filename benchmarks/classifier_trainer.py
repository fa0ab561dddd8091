"""The Hugging Face Trainer's side of the classifier comparison, under torchrun or alone.

    python -m benchmarks.classifier_trainer INPUTS OUTPUT ACCUMULATION

reads what classifier_inputs wrote, trains, and writes the losses and norms that it logs.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.classifier_inputs import FACTS, ROWS, WEIGHTS
from benchmarks.train_step_sides import our_optimizer
from trainer.optim import AdamW


def train(inputs: Path, output: Path, accumulation: int) -> list[dict[str, float]]:
    """Return `loss` and `grad_norm` of each step, as the Trainer logs them."""
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    facts = json.loads((inputs / FACTS).read_text())
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    model = AutoModelForSequenceClassification.from_pretrained(
        inputs / WEIGHTS, dtype=torch.float32, attn_implementation="sdpa"
    )
    optim = AdamW(**facts["optim"] | {"betas": tuple(facts["optim"]["betas"])})
    optimizer = our_optimizer(optim, model, facts["embedding"])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output), max_steps=facts["steps"], logging_steps=1, use_cpu=True,
            per_device_train_batch_size=facts["global_documents"] // accumulation // num_ranks,
            gradient_accumulation_steps=accumulation, max_grad_norm=optim.max_grad_norm,
            train_sampling_strategy="sequential", logging_nan_inf_filter=False, disable_tqdm=True,
            dataloader_pin_memory=False, save_strategy="no", report_to="none",
        ),
        data_collator=lambda rows: _padded(rows, model.config.pad_token_id),
        train_dataset=torch.load(inputs / ROWS),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history
    return [{k: float(log[k]) for k in ("loss", "grad_norm")} for log in logs if "loss" in log]


def _padded(rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Pad on the right with the id by which the model finds the last token of a text."""
    ids = [row["input_ids"] for row in rows]
    assert all(row[-1] != pad for row in ids), "a text ends with the pad token"
    lengths = torch.tensor([len(row) for row in ids])
    padded = pad_sequence(ids, batch_first=True, padding_value=pad)
    return {
        "input_ids": padded,
        "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def main() -> None:
    """Train, and let rank 0 leave the curve."""
    torch.set_num_threads(1)
    inputs, output, accumulation = sys.argv[1:]
    curve = train(Path(inputs), Path(output), int(accumulation))
    if os.environ.get("RANK", "0") == "0":
        Path(output).mkdir(exist_ok=True)
        (Path(output) / "curve.json").write_text(json.dumps(curve))


if __name__ == "__main__":
    main()
