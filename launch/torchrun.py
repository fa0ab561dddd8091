"""`launch=torchrun`: torch's own launcher starts the ranks, on one node or on several."""

import json
import os
import shlex
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

from launch.deadline import note_end
from launch.group import safe_paths
from launch.protocol import Job
from launch.signals import STOP_SIGNALS
from launch.watchdog import WatchdogSpec

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""With torchrun's default, SIGUSR1 ends it at once and leaves its ranks running."""
SHUTDOWN_SECONDS = 600
"""For the ranks to save after a signal; torchrun's default is 30."""
PORT = 29400
OWN_STORES = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Set to 1: else a node that replaces another one waits in vain for MASTER_ADDR, which torch 2.13
tells only those that were there in the first round (dynamic_rendezvous.py, next_rendezvous)."""


@dataclass(frozen=True, kw_only=True)
class TorchrunSpec:
    """Start this node's ranks through torchrun; the same command runs on every node."""

    nodes: int = 1
    """How many machines there are at least."""
    max_nodes: int | None = None
    """How many there may be: the run starts again from its newest checkpoint, on all that are
    there, when one comes or goes; null: as many as `nodes`."""
    processes: int = 1
    """On each node; on nodes with GPUs, one for each."""
    restarts: int = 3
    """How often torchrun starts all ranks again, whether that brings the run on or not."""
    endpoint: str | None = None
    """HOST or HOST:PORT of one of the nodes, where all meet; null: this machine is the only one."""
    watchdog: WatchdogSpec | None = field(default_factory=WatchdogSpec)
    """When a rank counts as hanging, whose node's ranks are killed then; null: never."""
    address: str | None = None
    """Of this node, by which the others reach it; null: its name."""

    def __post_init__(self) -> None:
        for name in ("nodes", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"launch.{name}={getattr(self, name)} starts nothing; set it to 1 or more"
                )
        if self.restarts < 0:
            raise ValueError(f"launch.restarts={self.restarts} is negative; set it to 0 or more")
        if self.most < self.nodes:
            raise ValueError(
                f"launch.max_nodes={self.max_nodes} is less than launch.nodes={self.nodes}; set it "
                "to as many or more, or to null"
            )
        if self.most > 1 and not self.endpoint:
            raise ValueError(
                f"{self.most} nodes have to meet somewhere; set launch.endpoint=HOST:{PORT} to one "
                "of them, the same on all"
            )

    @property
    def most(self) -> int:
        """How many nodes there may be."""
        return self.max_nodes or self.nodes

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    def check(self) -> None:
        """Refuse nothing: other nodes may have other GPUs, and torchrun looks at this one's."""

    def preview(self, job: Job) -> str:
        self._check_job(job)
        where = f"each of {self.most} nodes" if self.most > 1 else "this machine"
        own = ", each with its own --local-addr" if self.most > 1 and self.address else ""
        words = [shlex.quote(word) for word in self.arguments(job)]
        module = words.index("-m")
        rows = [f"{OWN_STORES}=1 torchrun", *words[:module], " ".join(words[module:])]
        return f"# on {where}{own}:\n" + " \\\n  ".join(rows) + "\n"

    def arguments(self, job: Job) -> list[str]:
        """Return what torchrun is given."""
        found = [f"--nnodes={self.nodes}" + (f":{self.most}" if self.most > self.nodes else "")]
        found += [f"--nproc-per-node={self.processes}", f"--max-restarts={self.restarts}"]
        if self.endpoint:
            host, _, port = self.endpoint.partition(":")
            found += ["--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port or PORT}"]
            found += [f"--rdzv-id={job.folder.name}"]
            if self.address:  # torchrun knows as its own only what the machine's name leads to
                found += [f"--rdzv-conf=is_host={int(self.address == host)}"]
        else:
            found += ["--standalone"]
        if self.address:
            found += [f"--local-addr={self.address}"]
        found += [f"--signals-to-handle={SIGNALS}", f"--shutdown-timeout={SHUTDOWN_SECONDS}"]
        ours = [word for word in job.words if not word.startswith(("launch=", "launch."))]
        return [*found, "-m", "launch", "train", *ours, "launch=local"]

    def start(self, job: Job) -> int:
        """Become the process that watches torchrun; its exit code is that of the run."""
        self._check_job(job)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until a handler can say so
        note_end(job.end)
        os.environ |= safe_paths(os.environ) | {OWN_STORES: "1"}
        sys.stdout.flush()
        limits = json.dumps(self.watchdog and vars(self.watchdog))
        folder = str(Path(job.folder).absolute())
        words = [folder, str(self.processes), limits, *self.arguments(job)]
        os.execv(sys.executable, [sys.executable, "-m", "launch.agent", *words])

    def _check_job(self, job: Job) -> None:
        """Raise ValueError for what would go wrong at a restart, or on another number of nodes."""
        if job.tree["resume"] == "never" and (self.restarts or self.most > self.nodes):
            raise ValueError(
                "resume=never would start another run at each restart of torchrun; leave it out, "
                "or set launch.restarts=0 and launch.max_nodes=null"
            )
        for nodes in range(self.nodes + 1, self.most + 1):
            job.run.check(nodes * self.processes)
