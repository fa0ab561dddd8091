"""What several pytest processes make of one list of tests."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.sharing import taken


def test_two_processes_run_every_test_once_and_a_file_in_one_of_them(tmp_path: Path) -> None:
    files = [Path("/tests/launch/test_a.py"), Path("/tests/models/test_a.py"), Path("/tests/b.py")]
    items: list[Any] = [SimpleNamespace(path=path, number=n) for path in files for n in range(3)]
    first, second = taken(items, tmp_path), taken(items, tmp_path)
    found: list[list[Any]] = [[next(first)], [next(second)]]
    found[1] += second  # goes on to the third file while the first process is in its own
    found[0] += first
    assert found == [items[:3], items[3:]]
