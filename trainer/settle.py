"""What only the data can say about a run: how many steps `max_epochs` are."""

from dataclasses import replace

from trainer.length import steps_of
from trainer.run import Run


def settle(run: Run) -> Run:
    """Return a checked run with `max_steps` in place of `max_epochs`.

    The same on every rank, whatever their number. Makes the data, or finds it in the cache.
    """
    if run.max_epochs is None:
        return run
    tokenizer = run.data.tokenizer(run.tokenizer_setting, run.model.vocab_size)
    loader, _ = run.data.build(tokenizer=tokenizer, seed=run.seed, rank=0, num_ranks=1)
    return replace(run, max_epochs=None, max_steps=steps_of(run.max_epochs, loader))
