"""Out of memory is said in one line, with what was held and what makes it less."""

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.faults.test_wrong_numbers import execute
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.runs import tiny_run
from trainer.distributed import Placement, Ranks
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.out_of_memory import in_words
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.fully_sharded import FullySharded
from trainer.run import Run

FULL = ActivationCheckpointing(mode="full")
PLACE = {"step": 7, "phase": "train_step"}


def limited(placement: Placement, folder: Path, run: Run) -> int:
    """Train with little address space left; return the exit code."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 28), resource.RLIM_INFINITY))
    return execute(placement, folder, run)


def test_a_host_that_has_no_memory_left_ends_the_run_with_one_line(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # All logits of a step in one piece: half a GiB.
    run = tiny_run(cache, data_global_rows=8192, data_micro_rows=8192, data_row_tokens=64)
    run = replace(run, task=replace(run.task, chunk_tokens=1 << 24))
    assert run_ranks(1, limited, tmp_path, run) == [70]
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "out of memory on cpu (step 1, train_step): " in said
    assert (
        "more were needed, with micro-batches of 8192 rows x 64 tokens in precision=fp32; " in said
    )
    assert "lower data.micro_rows from 8192 to 4096; or set engine.activation_chec" in said


@pytest.mark.parametrize(
    ("changes", "world_size", "advice"),
    [
        ({"data_micro_rows": None}, 1, " in precision=fp32; set data.micro_rows=1 or a"),
        ({"data_micro_rows": 1}, 2, "mode=full; or set mesh=fsdp"),
        (
            {
                "data_micro_rows": 1, "mesh": MeshSpec(dp_shard=2),
                "engine": NativeEngine(
                    activation_checkpointing=FULL, fsdp=FullySharded(reshard_after="step")
                ),
            },
            2, "; set engine.fsdp.reshard_after=forward; or set engine.fsdp.gradient_sync=micro_ba",
        ),
        (
            {
                "data_micro_rows": 1, "mesh": MeshSpec(dp_shard=2),
                "engine": NativeEngine(
                    activation_checkpointing=FULL, fsdp=FullySharded(gradient_sync="micro_batch")
                ),
            },
            2, "; start more processes, or lower data.row_tokens",
        ),
    ],
)  # fmt: skip
def test_advice_names_what_the_run_does_not_do_yet(
    cache: Path, changes: dict[str, object], world_size: int, advice: str
) -> None:
    ranks = Ranks(Placement(), COLLECTIVE_SECONDS)
    ranks.placement = replace(ranks.placement, world_size=world_size)
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
    )
    said = str(in_words(error, tiny_run(cache, **changes), ranks, PLACE))
    assert "(step 7, train_step): " in said
    assert "20.00 GiB more were needed" in said
    assert advice in said
    ranks.placement = replace(ranks.placement, world_size=1)
    ranks.close()


def test_another_error_is_no_lack_of_memory(cache: Path) -> None:
    ranks = Ranks(Placement(), COLLECTIVE_SECONDS)
    assert in_words(RuntimeError("a shape"), tiny_run(cache), ranks, PLACE) is None
    ranks.close()
