"""The loader on a corpus of 10 T tokens, and packing of 5 M documents (A22, A24).

The same figures, with targets and more of them: `python -m benchmarks.loader`.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import _packing, _virtual, open_loader, write_virtual
from tests.conftest import Figure
from trainer.data.eras import Eras
from trainer.data.order import permute_all, round_keys
from trainer.data.packing import best_fit
from trainer.data.sample_order import SampleOrder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_ten_trillion_tokens_are_read_at_once_from_any_place(
    tmp_path: Path, figure: Figure
) -> None:
    folder = tmp_path / "virtual"
    write_virtual(folder)
    for found in _virtual(folder):
        assert found.passes, found
        figure(f"A22 {found.name}", found.value, found.unit)
    loader = open_loader(folder, 5, 8, 8)
    state = len(json.dumps(loader.state(10**11)))
    assert state <= 1024
    figure("A22 state of the data", state, "bytes")
    loader.step(0)
    started = time.perf_counter()
    loader.step(10**12 // 8)
    seek = (time.perf_counter() - started) * 1000
    assert seek <= 50
    figure("A22 reading a step that begins with sample 1e12", seek, "ms")


def test_order_of_two_trillion_samples_is_found_at_four_million_tokens_a_second(
    figure: Figure,
) -> None:
    """Rows of 4,096 tokens: the order alone must not hold up a node."""
    count = 2 * 10**12
    started = time.process_time()
    for first in range(0, 10 * 512, 512):
        permute_all(np.arange(first, first + 512), count, round_keys("rows", 0, 0))
    rate = 10 * 512 * 4096 / (time.process_time() - started)
    assert rate >= 4e6
    figure("A22 order of 2e12 rows of 4,096 tokens, one core", rate, "tokens/s")
    order = SampleOrder(counts=(count,), eras=Eras.begun((1,), seed=0))
    assert order.locate(np.array([10**12]))[0] < count


def test_five_million_documents_are_packed_tightly_and_none_is_cut_without_need(
    figure: Figure,
) -> None:
    random = np.random.default_rng(0)
    lengths = random.lognormal(6.3, 1.16, 5_000_000).astype(np.int64).clip(1, 4096)
    started = time.process_time()
    rows = best_fit(lengths, 4096)  # whole documents: what fits a row is never cut
    seconds = time.process_time() - started
    used = np.bincount(rows, weights=lengths)
    assert used.max() <= 4096
    padding = 100 * float(1 - used.sum() / (len(used) * 4096))
    assert padding <= 0.01
    assert seconds < 2
    figure("A24 padding of 5 M documents in rows of 4,096", padding, "%")
    figure("A24 packing 5 M documents into rows of 4,096, one core", seconds, "s")
    for found in _packing():
        assert found.passes or "median" in found.name or "fastest" in found.name, found
        figure(f"A24 {found.name}", found.value, found.unit)
