"""An evaluation without training: the held-out data of a run's settings, on its weights."""

from typing import Any

import torch

from trainer.adapters.contents import contents_of
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.engines.topology_free import NUM_THREADS
from trainer.evaluate import Evaluator
from trainer.run import Run
from trainer.run_data import eval_data_of


def evaluate_run(run: Run) -> dict[str, Any]:
    """Return what an evaluation of `run` says before any step, in this process alone."""
    if run.is_topology_free:
        torch.set_num_threads(NUM_THREADS)
    ranks = Ranks(Placement(), run.timeout_seconds)
    mesh = run.chosen_mesh(1)[0].build(ranks=ranks)
    contents_of(run, ranks)  # refuses another base than that of what was trained
    engine = build_engine(run, run.trained_model(), ranks, mesh)
    loader = eval_data_of(run)
    evaluator = Evaluator(
        loader=loader, task=run.task, labels=run.data.labels, mesh=mesh, device=ranks.device
    )
    found = evaluator.evaluate(engine)
    ranks.close()
    return found
