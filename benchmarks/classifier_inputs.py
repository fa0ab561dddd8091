"""What both sides of the classifier comparison start from: a folder with a head, rows in order."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from launch.binding import bind
from launch.compose import compose
from trainer.data.document_data import DocumentData
from trainer.files import write_json
from trainer.optim import AdamW
from trainer.run import Run

ROWS, WEIGHTS, FACTS = "rows.pt", "weights", "facts.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared."""

    model: str
    """Hugging Face folder of a pretrained language model."""
    data: str
    """File of jsonl with `text` and `label`."""
    steps: int = 20
    global_documents: int = 16
    row_tokens: int = 128
    """Where a text is cut."""
    lr: float = 2.0e-5
    seed: int = 0

    @property
    def overrides(self) -> list[str]:
        """The command line of `tessera train`, but for the layout."""
        return [
            "experiment=sequence_classification",
            f"data.path={self.data}", "data.eval_fraction=0", "data.too_long=cut",
            f"data.row_tokens={self.row_tokens}", f"data.global_documents={self.global_documents}",
            f"max_steps={self.steps}", "max_epochs=null", "eval_every=null", "save_every=null",
            "log_every=1", f"optim.lr={self.lr}", "schedule=constant",
            "schedule.warmup_steps=0", "precision=fp32", "callbacks={}",
            f"seed={self.seed}", "name=ours",
        ]  # fmt: skip


def prepare(folder: Path, settings: Settings) -> list[str]:
    """Write weights with a new head, and the rows in our order; return our command's overrides."""
    from transformers import AutoModelForSequenceClassification

    labels = _run([*settings.overrides, f"model.path={settings.model}"]).data.labels
    assert labels is not None
    torch.manual_seed(settings.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=len(labels.names), dtype=torch.float32
    )
    model.save_pretrained(folder / WEIGHTS)
    for file in Path(settings.model).glob("*token*"):
        (folder / WEIGHTS / file.name).write_bytes(file.read_bytes())
    overrides = [*settings.overrides, f"model.path={folder / WEIGHTS}", f"runs={folder / 'runs'}"]
    run = _run(overrides)
    assert isinstance(run.data, DocumentData)
    assert isinstance(run.optim, AdamW)
    data = replace(run.data, packing="off", micro_rows=1)
    tokenizer = data.tokenizer(run.tokenizer_setting, run.model.vocab_size)
    loader, _ = data.build(tokenizer=tokenizer, seed=run.seed, rank=0, num_ranks=1)
    batches = [b for step in range(settings.steps) for b in loader.step(step).micro_batches]
    rows = [
        {"input_ids": b.input_ids[b.segment_ids > 0], "labels": int(b.class_labels[0, 0])}
        for b in batches
        if b.class_labels is not None
    ]
    torch.save(rows, folder / ROWS)
    write_json(folder / FACTS, {
        "global_documents": settings.global_documents, "steps": settings.steps,
        "optim": {"lr": run.optim.lr, "betas": list(run.optim.betas), "eps": run.optim.eps,
                  "weight_decay": run.optim.weight_decay, "max_grad_norm": run.optim.max_grad_norm},
        "embedding": run.model.layout.embedding,
    })  # fmt: skip
    return overrides


def _run(overrides: list[str]) -> Run:
    tree = compose(overrides).tree
    tree.pop("launch")
    run: Run = bind(tree)
    return run
