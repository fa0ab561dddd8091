"""What forked ranks must not get from the process of the tests."""

import gc
import os
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from tests.conftest import GPU_TESTS, pytest_configure
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from trainer.distributed import Placement, Ranks


def collect(placement: Placement) -> int:
    return gc.collect()


def test_ranks_do_not_collect_a_process_group_that_was_left_in_a_cycle() -> None:
    gc.disable()
    ranks = Ranks(Placement(), COLLECTIVE_SECONDS)
    cycle: list[object] = [ranks]
    cycle.append(cycle)
    ranks.close()
    del ranks, cycle
    try:
        run_ranks(2, collect, limit_seconds=30.0)
    finally:
        gc.enable()


def test_a_process_that_ends_with_the_lock_of_progress_bars_leaves_it_to_the_others() -> None:
    lock = tqdm.get_lock()
    child = os.fork()
    if child == 0:
        lock.acquire()
        os._exit(0)
    os.waitpid(child, 0)
    assert lock.acquire(timeout=30.0)
    lock.release()
    assert tqdm.monitor is None


@pytest.mark.parametrize(
    ("arguments", "visible"),
    [
        ([f"{GPU_TESTS}/test_levers.py::test_a_step"], "0,1"),
        ([str(GPU_TESTS)], "0,1"),
        ([str(GPU_TESTS.parent)], ""),
        ([str(GPU_TESTS), f"{GPU_TESTS.parent}/models"], ""),
    ],
)
def test_a_gpu_is_hidden_from_tests_that_may_fork(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], visible: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    config: Any = SimpleNamespace(args=arguments)
    pytest_configure(config)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
