"""A save, with its retention, dies or fails at every call that changes the disk.

The victim is the real lock and commit code in a bare interpreter, without torch; its calls into the
operating system are counted in between. In process-isolated form: one forked child per call.
Run it alone with `pytest tests/faults/test_kill_sweep.py`.
"""

import builtins
import errno
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from trainer.checkpoint import commit
from trainer.checkpoint.lock import RunLock
from trainer.checkpoint.retention import collect_debris
from trainer.checkpoint.writer import Commit, Job, perform
from trainer.errors import StorageError

if TYPE_CHECKING:
    from tests.conftest import Figure  # the bare interpreter has no pytest

ROOT = Path(__file__).parents[2]
PACKAGES = Path(xxhash.__file__).parents[1]
KEEP = 2
NUMBERS = itertools.count(1)
MAX_WRITE = 300  # bytes per call, so that each file takes several: short writes, torn files
KILLED, UNHARMED, GAVE_UP, DEFECT = 9, 0, 74, 70
CHANGING = ("open", "close", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "ftruncate")


@dataclass
class Faults:
    """Counts the calls that change the disk; `strike` acts at call `at`, then on all if `lasts`."""

    at: int
    strike: Callable[[str], None]
    lasts: bool = False
    calls: list[str] = field(default_factory=list)
    plain_open: Callable[..., Any] = open

    def count(self, name: str) -> None:
        self.calls.append(name)
        number = len(self.calls)
        if number == self.at or (self.lasts and number > self.at):
            self.strike(name)

    def install(self) -> None:
        """Put the counter in front of this process's calls."""
        for name in CHANGING:
            setattr(os, name, self._counted(name, getattr(os, name)))
        pwrite = os.pwrite

        def short_pwrite(descriptor: int, data: memoryview, offset: int) -> int:
            self.count("pwrite")
            return pwrite(descriptor, data[:MAX_WRITE], offset)

        os.pwrite = short_pwrite  # type: ignore[assignment]
        builtins.open = self._open  # type: ignore[assignment]

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count(name)
            return call(*arguments, **options)

        return counted

    def _open(self, path: Any, mode: str = "r", **options: Any) -> Any:
        if mode not in ("w", "a"):
            return self.plain_open(path, mode, **options)
        self.count("open")
        file = ShortWrites(path, mode, self, options.pop("opener", None))
        return io.TextIOWrapper(io.BufferedWriter(file), **options)


class ShortWrites(io.FileIO):
    """A file that takes few bytes per call."""

    def __init__(self, path: Any, mode: str, faults: Faults, opener: Any) -> None:
        super().__init__(path, mode, opener=opener)
        self._faults = faults

    def write(self, data: Any) -> int:
        self._faults.count("write")
        return super().write(memoryview(data)[:MAX_WRITE])


def contents(step: int) -> dict[str, bytes]:
    generator = random.Random(step)
    return {
        "model/model.safetensors": generator.randbytes(1000),
        "state/optimizer.safetensors": generator.randbytes(500),
        "state/state.json": json.dumps({"step": step}).encode(),
    }


def save(run: Path, step: int, lock: RunLock) -> None:
    """Save as the writer process of rank 0 does; StorageError where only tidying up failed."""
    memory, ranges = b"", {}
    for name, data in contents(step).items():  # two ranges of each file, the second one first
        start, middle = len(memory), min(8, len(data))
        memory += data
        ranges[name] = [(middle, start + middle, len(memory)), (0, start, start + middle)]
    lead = Commit(
        sizes={name: len(data) for name, data in contents(step).items()},
        facts={}, num_others=0, run=str(run), generation=lock.generation, keep=KEEP, best_step=None,
    )  # fmt: skip
    job = Job(
        parent=str(run / "checkpoints"),
        staging=f"step_{step:08d}.tmp-{lock.generation}-{next(NUMBERS)}",
        step=step, rank=0, num_bytes=len(memory), ranges=ranges, appended=[str(run / "lock")],
        commit=lead,
    )  # fmt: skip
    if warning := perform(job, memoryview(memory)):
        raise StorageError(warning)


def start(run: Path) -> RunLock:
    """Start as `construct.fit` does."""
    lock = RunLock(run)
    collect_debris(run / "checkpoints")
    return lock


def save_next(run: Path, lock: RunLock) -> None:
    """Save the step after the newest."""
    save(run, max(commit.committed_steps(run / "checkpoints"), default=0) + 1, lock)


def start_and_save(run: Path) -> None:
    lock = start(run)
    save_next(run, lock)
    lock.release()


def in_a_child(work: Callable[[], int]) -> int:
    """Return the exit code of `work` in a forked process."""
    child = os.fork()
    if child == 0:
        code = DEFECT
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(_: str) -> None:
    os._exit(KILLED)


def fail_with(number: int) -> Callable[[str], None]:
    def fail(name: str) -> None:
        raise OSError(number, os.strerror(number), f"(injected in {name})")

    return fail


def killed_save(run: Path, at: int) -> int:
    def work() -> int:
        Faults(at, die).install()
        start_and_save(run)
        return UNHARMED

    return in_a_child(work)


def failing_save(run: Path, at: int, number: int) -> int:
    """Fail at call `at` and at all later ones: the process gives up, naming the reason."""

    def work() -> int:
        Faults(at, fail_with(number), lasts=True).install()
        try:
            start_and_save(run)
        except (OSError, StorageError) as error:
            return GAVE_UP if os.strerror(number) in str(error) else DEFECT
        return UNHARMED

    return in_a_child(work)


def retried_save(run: Path, at: int, number: int) -> int:
    """Fail at call `at` alone: the process goes on and saves again under the same lock."""

    def work() -> int:
        lock, faults = start(run), Faults(at, fail_with(number))
        faults.install()
        try:
            save_next(run, lock)
        except (OSError, StorageError) as error:
            if os.strerror(number) not in str(error):
                return DEFECT
            collect_debris(run / "checkpoints")
            save_next(run, lock)
            return GAVE_UP
        return UNHARMED if len(faults.calls) < at else GAVE_UP

    return in_a_child(work)


def view(run: Path) -> list[int]:
    """Return the steps that a loader sees, newest first, after checking every byte of each."""
    steps = commit.committed_steps(run / "checkpoints")
    for step in steps:
        folder = commit.step_folder(run / "checkpoints", step)
        commit.verify(folder, commit.read_manifest(folder), 0, 1)
        for name, data in contents(step).items():
            assert (folder / name).read_bytes() == data, (step, name)
    return steps


def check_aftermath(run: Path) -> int:
    """Check the loader's view, then save without faults; return the step that survived."""
    steps = view(run)
    start_and_save(run)
    newest = steps[0] + 1
    assert view(run) == [newest, newest - 1]
    found = sorted(os.listdir(run / "checkpoints"))
    expected = ["latest", f"step_{newest - 1:08d}", f"step_{newest:08d}"]
    assert found == expected, f"left behind: {set(found) - set(expected)}"
    return steps[0]


def sweep(base: Path, harmed_save: Callable[[Path, int], int]) -> dict[str, Any]:
    """Harm call 1, 2, .. of a save until one ends unharmed; return what was seen."""
    work, survivors, codes, complaints = base.with_name("work"), [], set(), []
    for at in range(1, 1000):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(base, work)
        code = harmed_save(work, at)
        codes.add(code)
        try:
            survivors.append(check_aftermath(work))
        except Exception as error:
            complaints.append(f"call {at}: {error!r}")
        if code == UNHARMED:
            break
    return {"survivors": survivors, "codes": sorted(codes), "complaints": complaints}


def soak(base: Path, kills: int) -> dict[str, Any]:
    """Kill one save after another in the same folder, without ever cleaning."""
    generator, newest, complaints, delivered = random.Random(42), 2, [], 0
    for number in range(kills):
        delivered += killed_save(base, generator.randrange(1, 90)) == KILLED
        try:
            steps = view(base)
            assert steps[0] >= newest
            newest = steps[0]
        except Exception as error:
            complaints.append(f"kill {number}: {error!r}")
    start_and_save(base)
    return {
        "delivered": delivered,
        "complaints": complaints,
        "newest": [newest, *view(base)],
        "left": sorted(os.listdir(base / "checkpoints")),
    }


def counted_calls(run: Path) -> list[str]:
    faults = Faults(0, die)
    reader, writer = os.pipe()

    def work() -> int:
        faults.install()
        start_and_save(run)
        os.write(writer, json.dumps(faults.calls).encode())
        return UNHARMED

    assert in_a_child(work) == UNHARMED
    calls: list[str] = json.loads(os.read(reader, 1 << 16))
    return calls


def main(folder: str, what: str) -> None:
    """Run one experiment in `folder` and print what was seen: what the child process does."""
    # Only processes die here: what they wrote stays in the page cache, so waiting for the disk
    # would change nothing but the time that this takes.
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    base = Path(folder) / "base"
    for _ in range(KEEP):
        start_and_save(base)
    experiments: dict[str, Callable[[], Any]] = {
        "calls": lambda: counted_calls(base),
        "kill": lambda: sweep(base, killed_save),
        "soak": lambda: soak(base, kills=100),
    }
    for number in (errno.ENOSPC, errno.EIO):
        for save_with_fault in (failing_save, retried_save):
            experiments[f"{save_with_fault.__name__} {errno.errorcode[number]}"] = (
                lambda work=save_with_fault, number=number: sweep(
                    base, lambda run, at: work(run, at, number)
                )
            )
    found = experiments[what]()
    assert not {"torch", "numpy", "hydra"} & sys.modules.keys()
    print(json.dumps(found))


def experiment(what: str) -> Any:
    """Return what `main` prints, from a bare interpreter, in memory where that can be had."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        code = (
            f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(PACKAGES)!r}]; "
            f"from tests.faults.test_kill_sweep import main; main({folder!r}, {what!r})"
        )
        found = subprocess.run(
            [sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, timeout=100
        )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    return json.loads(found.stdout)


def check_sweep(found: dict[str, Any], harmed_code: int, survivors: set[int]) -> int:
    """Return the number of calls that were harmed, each in a save of its own."""
    assert found["complaints"] == []
    assert set(found["codes"]) == {UNHARMED, harmed_code}
    assert len(found["survivors"]) >= 60
    assert set(found["survivors"]) == survivors
    return len(found["survivors"]) - 1  # the last one ended unharmed


def test_counter_sees_every_kind_of_call_of_a_save_and_its_retention() -> None:
    calls = experiment("calls")
    assert set(calls) == {*CHANGING, "pwrite", "write"}
    assert len(calls) >= 60


def test_save_killed_at_any_call_leaves_the_old_or_the_new_step_and_nothing_to_clean(
    figure: "Figure",
) -> None:
    points = check_sweep(experiment("kill"), KILLED, {2, 3})
    figure("A2 calls of Python at each of which a save was killed; no step lost", points, "")


def test_save_on_a_disk_that_fails_from_any_call_on_leaves_the_old_or_the_new_step(
    figure: "Figure",
) -> None:
    for reason in ("ENOSPC", "EIO"):
        points = check_sweep(experiment(f"failing_save {reason}"), GAVE_UP, {2, 3})
        figure(f"A3 calls of Python from each of which all failed with {reason}", points, "")


def test_process_whose_save_failed_at_any_call_saves_again_and_leaves_nothing_to_clean(
    figure: "Figure",
) -> None:
    for reason in ("ENOSPC", "EIO"):  # 4: what failed came after the commit of step 3
        points = check_sweep(experiment(f"retried_save {reason}"), GAVE_UP, {3, 4})
        figure(f"A3 calls of Python each of which failed once with {reason}", points, "")


def test_hundred_kills_in_a_row_lose_no_step_and_leave_nothing_to_clean() -> None:
    """A crash may meet the remains of another one: a sweep of single crashes cannot show that."""
    found = experiment("soak")
    assert found["complaints"] == []
    assert found["delivered"] >= 80
    last = found["newest"][0] + 1
    assert found["newest"][1:] == [last, last - 1]
    assert last >= 5  # some saves were killed after their commit, or not at all
    assert found["left"] == ["latest", f"step_{last - 1:08d}", f"step_{last:08d}"]
