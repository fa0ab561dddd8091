"""Several pytest processes at once over the same tests: each takes the next file that none has.

Start `pytest --share=FOLDER` twice, with an empty folder: there they note the files they take.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest


def run_share(session: pytest.Session, folder: Path) -> bool:
    """As pytest's own loop, over the files that this process gets hold of."""
    items = taken(session.items, folder)
    item = next(items, None)
    while item is not None:
        following = next(items, None)  # by which pytest tells what to tear down
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True


def taken(items: list[pytest.Item], folder: Path) -> Iterator[pytest.Item]:
    """Yield the tests of every file that no other process has taken before this one."""
    for path, tests in groupby(items, key=lambda item: item.path):
        try:
            (folder / "-".join(path.parts[1:])).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield from tests
