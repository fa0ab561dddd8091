"""Two ways to start the same run again and again: as a user would, and forked from this process."""

import os
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path

from launch.binding import bind_run
from launch.compose import compose
from launch.request import Request
from trainer.ports import free_port

WORKER = b"launch.worker"
IMPORTED = (
    "rich.progress", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.pipelining",
    "trainer.construct", "tests.ranks",
)  # fmt: skip
"""What every rank imports, over seconds; the last one lists the standard library, too."""


class Commands:
    """`tessera train WORDS`: a supervisor and its workers."""

    def __init__(self, words: list[str], folder: Path, ranks: int) -> None:
        self.words = [*words, f"launch.processes={ranks}"]
        self.log = folder / "output.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.seen: set[int] = set()
        """Every worker that was ever looked up: a dead supervisor names none any more."""

    def start(self) -> None:
        self.end()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch", "train", *self.words], stdout=log, stderr=log
            )

    @property
    def code(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def workers(self) -> dict[int, int]:
        """Return {rank: process id}."""
        assert self.process is not None
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = {}
        for pid in map(int, path.read_text().split() if path.exists() else ()):
            try:
                is_worker = WORKER in Path(f"/proc/{pid}/cmdline").read_bytes()
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has just ended
            if is_worker:
                ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
                found[ranks[0]] = pid
        self.seen.update(found.values())
        return found

    def kill(self, victim: int) -> bool:
        assert self.process is not None
        workers = self.workers()
        if self.process.poll() is not None or not workers:
            return False
        return _kill(workers.get(victim, self.process.pid))

    def end(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pid in self.seen:  # each asked the kernel to die with its supervisor
            if WORKER in _command_line(pid):
                _kill(pid)
        self.seen.clear()


class Forks:
    """Ranks forked from this process: torch is imported, the config composed, once for all."""

    def __init__(self, words: list[str], folder: Path, ranks: int) -> None:
        for module in IMPORTED:
            import_module(module)
        tree = compose([*words, f"launch.processes={ranks}"]).tree
        self.request = Request(tree=tree, is_dry=False)
        self.run = bind_run(tree)
        self.ranks, self.log = ranks, folder / "output.log"
        self.children: dict[int, int] = {}
        """Process id of every rank that was not waited for yet."""
        self.codes: list[int] = []

    def start(self) -> None:
        self.end()
        self.codes = []
        port = free_port()
        for rank in range(self.ranks):
            child = os.fork()
            if child == 0:
                self._train(rank, port)
            self.children[rank] = child

    def _train(self, rank: int, port: int) -> None:
        """Be one rank, as launch.worker is."""
        code = 70
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = self._fit(rank, port)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _fit(self, rank: int, port: int) -> int:
        import torch

        from trainer.construct import Start, fit
        from trainer.control import StopRequest
        from trainer.distributed import Placement

        torch.set_num_threads(1)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        placement = Placement(
            rank=rank, world_size=self.ranks, local_rank=rank, is_distributed=self.ranks > 1
        )
        start = Start(placement=placement, locate=self.request.locate, request=StopRequest())
        return 0 if fit(self.run, start) else 75

    @property
    def code(self) -> int | None:
        """As a supervisor: once a rank has failed, the others are killed."""
        for rank, child in list(self.children.items()):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                del self.children[rank]
                self.codes.append(os.waitstatus_to_exitcode(status))
        if any(self.codes):
            self.end()
        if self.children:
            return None
        return next((code for code in self.codes if code), 0)

    def kill(self, victim: int) -> bool:
        if self.code is not None:
            return False
        if victim in self.children:
            return _kill(self.children[victim])
        return all([_kill(child) for child in self.children.values()])

    def end(self) -> None:
        for child in self.children.values():
            _kill(child)
            self.codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        self.children.clear()


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
