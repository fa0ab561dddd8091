"""A start is short: no garbage is looked for, and what was compiled is kept."""

import gc
from pathlib import Path

import pytest

from launch.start_up import COMPILED, keep_compiled, resting_collector


def test_the_collector_rests_and_is_back_after_a_refusal() -> None:
    seen = []

    def refuse() -> None:
        with resting_collector():
            seen.append(gc.isenabled())
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        refuse()
    assert seen == [False]
    assert gc.isenabled()


def test_compiled_blocks_are_kept_with_the_other_caches() -> None:
    environ: dict[str, str] = {}
    keep_compiled({"compile": True}, environ)
    assert environ == {COMPILED: str(Path.home() / ".cache/tessera/compiled")}


def test_another_folder_for_compiled_blocks_stays_the_user_s() -> None:
    environ = {COMPILED: "/scratch"}
    keep_compiled({"compile": True}, environ)
    assert environ == {COMPILED: "/scratch"}


def test_nothing_is_set_where_nothing_is_compiled() -> None:
    environ: dict[str, str] = {}
    keep_compiled({"compile": False}, environ)
    keep_compiled({}, environ)  # an engine that has no such setting
    keep_compiled(None, environ)  # no engine, which is refused later
    assert environ == {}
