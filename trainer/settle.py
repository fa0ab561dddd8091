"""What only the data can say about a run: the steps of `max_epochs`, the weights of classes."""

from dataclasses import replace

import numpy as np

from trainer.data.document_store import DocumentStore
from trainer.data.loader import StepLoader
from trainer.length import steps_of
from trainer.run import Run
from trainer.run_data import data_of
from trainer.start_up import wake_collector
from trainer.tasks.emphasis import BALANCED, Emphasised


def settle(run: Run) -> Run:
    """Return a checked run with numbers in place of `max_epochs` and `class_weights=balanced`.

    The same on every rank, whatever their number. Makes the data, or finds it in the cache.
    """
    task = run.task if getattr(run.task, "class_weights", None) == BALANCED else None
    if run.max_epochs is None and task is None:
        return run
    wake_collector()  # making the data may take hours
    _, loader, _ = data_of(run)
    if run.max_epochs is not None:
        max_steps = steps_of(run.max_epochs, loader)
        run.freeze.check(max_steps)
        run = replace(run, max_epochs=None, max_steps=max_steps)
    if task is not None:
        assert isinstance(task, Emphasised)
        labels = run.data.labels
        assert labels is not None
        targets = targets_of(loader, len(labels.names))
        return replace(run, task=task.balanced(labels, targets))
    return run


def targets_of(loader: StepLoader, num_classes: int) -> np.ndarray:
    """Return the (classes,) targets of an epoch; a source counts as often as it is gone through."""
    store = loader.rows.store
    assert isinstance(store, DocumentStore)
    passes = np.array(loader.weights, float) / np.array(loader.rows.counts)
    return passes / passes[0] @ store.num_targets(num_classes)
