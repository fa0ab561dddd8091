"""An evaluation without training: the held-out data of a run's settings, on its weights."""

from pathlib import Path
from typing import Any

import torch

from trainer.adapters.contents import contents_of
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.engines.topology_free import NUM_THREADS
from trainer.judges import answer_judge, evaluator_of
from trainer.run import Run
from trainer.run_data import eval_data_of, training_at_hand


def evaluate_run(run: Run, page: Path | None = None) -> dict[str, Any]:
    """Return what an evaluation of `run` says before any step, in this process alone.

    `page`: the HTML file of answers, where the run asks for some; None: none is written.
    """
    if run.is_topology_free:
        torch.set_num_threads(NUM_THREADS)
    ranks = Ranks(Placement(), run.timeout_seconds)
    mesh = run.chosen_mesh(1)[0].build(ranks=ranks)
    contents_of(run, ranks)  # refuses another base than that of what was trained
    engine = build_engine(run, run.trained_model(), ranks, mesh)
    tokenizer, loader = eval_data_of(run)
    evaluator = evaluator_of(run, loader, mesh, ranks.device)
    validator = answer_judge(
        run, loader, mesh, ranks.device, training=training_at_hand(run, tokenizer),
        tokenizer=tokenizer, page=page,
    )  # fmt: skip
    assert evaluator is not None
    found = evaluator.evaluate(engine)
    if validator is not None:
        found |= validator.validate(engine, run.name)
    ranks.close()
    return found
