"""What a run is planned as on a machine that could not train it."""

from dataclasses import replace
from typing import Any

from trainer.float8 import Float8
from trainer.precision import PRECISIONS
from trainer.run import Run


def without_float8(run: Run) -> Run:
    """Return the run with products in bf16: what it keeps for the backward pass is the same.

    Linears keep bf16 inputs and weights and round them again; only what one product works on is
    more, and that is gone before the next.
    """
    if not PRECISIONS[run.precision].is_float8:
        return run
    engine: Any = run.engine
    return replace(run, precision="bf16", engine=replace(engine, float8=Float8()))
