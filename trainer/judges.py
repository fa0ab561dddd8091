"""Who judges a run's model on held-out data: by its losses, and by the answers it writes."""

from pathlib import Path

import torch

from trainer.data.document_store import DocumentStore
from trainer.data.documents import PackedDocuments
from trainer.data.eval_loader import EvalLoader
from trainer.data.tokenizers import Tokenizer
from trainer.data.tokens import TokenStore
from trainer.evaluate import Evaluator
from trainer.mesh import Mesh
from trainer.run import Run
from trainer.validation.validator import Validator, validator_of


def evaluator_of(
    run: Run, loader: EvalLoader | None, mesh: Mesh, device: torch.device
) -> Evaluator | None:
    """Return what finds the losses; None: nothing is held out."""
    if loader is None:
        return None
    return Evaluator(loader=loader, task=run.task, labels=run.data.labels, mesh=mesh, device=device)


def sample_of(run: Run, loader: EvalLoader | None) -> str:
    """Return in words that fit nothing else which held-out data `best.metric` is a number of."""
    if loader is None:
        return "nothing"
    asks = run.best.metric in run.validation.metric_names
    count = run.validation.max_documents if asks else loader.num_read
    return f"{count or 'all'} {loader.rows.unit} of {loader.rows.store.fingerprint}"


def answer_judge(
    run: Run,
    loader: EvalLoader | None,
    mesh: Mesh,
    device: torch.device,
    *,
    training: TokenStore | None,
    tokenizer: Tokenizer,
    page: Path | None,
) -> Validator | None:
    """Return what asks for answers and writes `page`; None: the run asks for none.

    `training`: the documents of training, where they are at hand.
    """
    if loader is None or run.validation.every is None:
        return None
    assert isinstance(loader.rows, PackedDocuments), "Run.check refuses other data"
    assert training is None or isinstance(training, DocumentStore), "of the same data"
    return validator_of(
        run.validation, loader.rows, training=training, tokenizer=tokenizer, mesh=mesh,
        device=device, max_positions=run.model.max_position_embeddings, page=page,
    )  # fmt: skip
