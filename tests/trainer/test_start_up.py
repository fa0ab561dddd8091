"""The collector rests until training is built, and the compiler is asked once what it knows."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trainer.start_up import note_of_instructions, remember_instructions, wake_collector


@pytest.fixture
def collector() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def test_a_resting_collector_wakes_without_what_imports_have_left(collector: None) -> None:
    gc.disable()
    wake_collector()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000


def test_a_collector_that_is_awake_keeps_looking_at_all(collector: None) -> None:
    frozen = gc.get_freeze_count()
    wake_collector()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


@pytest.fixture
def inductor_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing said of instructions."""
    from torch._inductor import config

    if torch.cuda.is_available():
        pytest.skip("compiled blocks run on the GPU here")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with config.patch({"cpp.vec_isa_ok": None}):
        yield tmp_path


def flags() -> set[str]:
    from torch._inductor.cpu_vec_isa import x86_isa_checker

    return set(x86_isa_checker())


def is_trusted() -> bool | None:
    from torch._inductor import config

    found: bool | None = config.cpp.vec_isa_ok
    return found


def compiler_that_cannot(folder: Path) -> Path:
    """Return a compiler that tells its version and compiles nothing."""
    script = folder / "c++"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "g++ 13.2.0" && exit 0\nexit 1\n')
    script.chmod(0o755)
    return script


def test_what_was_found_once_is_not_asked_again(inductor_folder: Path) -> None:
    note_of_instructions(flags()).touch()
    remember_instructions()
    assert is_trusted() is True


def test_nothing_is_remembered_of_a_compiler_that_cannot(
    inductor_folder: Path, tmp_path: Path
) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, str(compiler_that_cannot(tmp_path)))}):
        remember_instructions()
        assert is_trusted() is None
        assert not note_of_instructions(flags()).exists()


def test_another_compiler_is_asked_anew(inductor_folder: Path, tmp_path: Path) -> None:
    from torch._inductor import config

    before = note_of_instructions(flags())
    with config.patch({"cpp.cxx": (None, str(compiler_that_cannot(tmp_path)))}):
        assert note_of_instructions(flags()) != before
    assert note_of_instructions(flags() | {"avx1024"}) != note_of_instructions(flags())


def test_what_the_user_said_of_instructions_stays(
    inductor_folder: Path,
) -> None:
    from torch._inductor import config

    note_of_instructions(flags()).touch()
    with config.patch({"cpp.vec_isa_ok": False}):
        remember_instructions()
        assert is_trusted() is False


ASKS_AHEAD = """
import sys
from threading import Thread

import torch
from torch import _dynamo

from trainer import start_up


class Noting(Thread):
    def start(self):
        self.modules = set(sys.modules)
        super().start()


def counted(*given):
    hashed.append(given)
    return hash_of(*given)


from torch._inductor import codecache, cpu_vec_isa

hashed, hash_of = [], codecache.build_code_hash
codecache.build_code_hash = counted
start_up.Thread = Noting
thread = start_up.ask_ahead()
thread.join()
asked = cpu_vec_isa.valid_vec_isa_list, codecache._precompile_header
num_hashed = len(hashed)
print("imported", *sorted(set(sys.modules) - thread.modules))
print("before", *(each.cache_info().misses for each in asked))
values = torch.arange(100.0)
print("right", torch.compile(lambda x: x.sin() * 2)(values).allclose(values.sin() * 2))
print("behind", *(each.cache_info().misses for each in asked))
print("asked", *(each.cache_info().hits > 0 for each in asked))
print("hashed", num_hashed > 100, len(hashed) == num_hashed)
"""


def test_what_is_asked_ahead_is_what_the_compiler_asks(inductor_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASKS_AHEAD], capture_output=True, text=True, check=True
    )
    found = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    assert found == {
        "imported": "",  # two threads that import can get half a module
        "before": "1 1",
        "right": "True",
        "behind": "1 1",
        "asked": "True True",
        "hashed": "True True",
    }
