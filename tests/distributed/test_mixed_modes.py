"""Steps of text, of images and of both: computed in bf16, and by compiled blocks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_mixed_batches import (
    ALL_STEPS,
    IN_TURN,
    MixedRows,
    computed,
    laid_out,
    mixed,
    num_ranks,
)
from tests.ranks import run_ranks
from trainer import construct
from trainer.distributed import Placement
from trainer.run import Run
from trainer.verify.whole import Tensors

# torch imports a deprecated part of its own, and looks at gradients while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


def found_on(cache: Path, layout: str, trains: bool = True, **changes: Any) -> list[Tensors]:
    run, rows = mixed(cache, IN_TURN, trains=trains, **laid_out(layout) | changes)
    answers: list[list[Tensors]] = run_ranks(num_ranks(run), computed, run, rows)
    return answers[0]


@pytest.mark.parametrize(
    ("layout", "trains"),
    [
        ("fsdp", True),
        slow("fsdp", False),
        *(slow(layout, True) for layout in ("ddp", "hsdp", "pp", "zero 2", "zero 3")),
    ],
)
def test_in_bf16_many_ranks_differ_by_roundings_of_bf16_alone(
    cache: Path, layout: str, trains: bool
) -> None:
    """FSDP2 keeps gradients of bf16 in fp32 from one micro-batch to the next, but of the last."""
    one, many = (found_on(cache, each, trains, precision="bf16") for each in ("single", layout))
    for key, tolerance in (("loss", 2e-3), ("norm", 2e-2)):
        expected = [float(step[key]) for step in one]
        assert [float(step[key]) for step in many] == pytest.approx(expected, rel=tolerance, abs=0)


def computed_with_padding(placement: Placement, run: Run, rows: MixedRows) -> list[Tensors]:
    """As compiled blocks do: a product over another number of tokens is another sum."""
    construct.skip_padding = lambda *_, **__: None  # type: ignore[assignment]
    return computed(placement, run, rows, ALL_STEPS)


def computed_compiled(placement: Placement, run: Run, rows: MixedRows) -> list[Tensors]:
    compile_block = torch.nn.Module.compile

    def with_backend(module: torch.nn.Module, **options: Any) -> None:
        compile_block(module, backend="aot_eager", **options)

    torch.nn.Module.compile = with_backend  # type: ignore[method-assign]
    return computed(placement, run, rows, ALL_STEPS)


@pytest.mark.parametrize("layout", ["single", slow("fsdp"), slow("ddp")])
def test_compiled_blocks_give_the_same_bits(cache: Path, layout: str) -> None:
    run, rows = mixed(cache, IN_TURN, **laid_out(layout))
    plain = run_ranks(num_ranks(run), computed_with_padding, run, rows)[0]
    run = replace(run, engine=replace(run.engine, compile=True))
    compiled = run_ranks(num_ranks(run), computed_compiled, run, rows)[0]
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert (value == theirs[name]).all(), name
