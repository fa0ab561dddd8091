"""Reading ahead: the same items, errors in their place, no thread left."""

import threading
import time
from collections.abc import Iterator

import pytest

from tests.token_folders import store_of
from trainer.data.loader import StepLoader
from trainer.data.prefetch import Ahead
from trainer.data.rows import PackedRows


def threads() -> int:
    return sum(thread.name == "read ahead" for thread in threading.enumerate())


def test_items_come_in_order_and_the_thread_ends_with_them() -> None:
    assert list(Ahead(iter(range(50)))) == list(range(50))
    assert threads() == 0


def test_an_error_is_raised_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("the third")

    reader = Ahead(items())
    assert [next(reader), next(reader)] == [1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(reader)
    assert threads() == 0


def test_whoever_stops_early_leaves_no_thread() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    reader = Ahead(items(), depth=2)
    assert next(reader) == 0
    time.sleep(0.1)
    assert len(made) <= 4  # one taken, two ready, one in the hand
    reader.close()
    assert threads() == 0


def test_steps_read_ahead_are_the_steps_by_number(tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = PackedRows(store_of(tmp_path_factory.mktemp("s"), [40] * 30, shard_tokens=200), 16)
    loader = StepLoader(rows=rows, seed=1, global_samples=8, micro_rows=2, rank=1, num_ranks=2)
    steps = loader.steps(3)
    for number in range(3, 30):
        found, expected = next(steps), loader.step(number)
        assert found.ranges == expected.ranges
        for mine, other in zip(found.micro_batches, expected.micro_batches, strict=True):
            assert mine.input_ids.equal(other.input_ids)
            assert mine.provenance == other.provenance
    steps.close()


def test_whoever_waits_for_an_item_learns_whether_it_is_there_and_whether_another_is() -> None:
    may_go_on = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        may_go_on.wait(20.0)
        yield from (1, 2)

    reader = Ahead(items())
    assert reader.wait(20.0)
    assert not reader.has_spare
    assert next(reader) == 0
    assert not reader.wait(0.05)
    may_go_on.set()
    assert reader.wait(20.0)
    assert next(reader) == 1
    reader.close()


def test_reader_of_a_source_that_hangs_is_closed_without_waiting_for_it() -> None:
    may_end = threading.Event()

    def items() -> Iterator[int]:
        may_end.wait()
        yield 0

    reader = Ahead(items())
    reader.close()
    assert threads() == 1
    may_end.set()
    while threads():
        time.sleep(0.01)
