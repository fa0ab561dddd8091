"""`launch=kubernetes`: a manifest for pods that run one launcher each, readable and complete."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launch.exit_codes import FINISHED, INTERNAL
from launch.manifest import JOBSET, KINDS, render
from launch.protocol import Job, Supervised

_QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|k|[KMGTPE]i?)?\Z")
_LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")
MAX_NAME = 40
"""Characters: names of pods end in -node-0-0 and a random part, and have 63 at most."""


@dataclass(frozen=True, kw_only=True)
class KubernetesSpec(Supervised):
    """Render a manifest, and start it where that is asked for."""

    kind: str = JOBSET
    """jobset (jobset.x-k8s.io), or trainjob (Kubeflow Trainer 2, which makes a JobSet of it)."""
    image: str | None = None
    """Container image with tessera-train installed."""
    nodes: int = 1
    """Pods, each with one launcher."""
    processes: int = 1
    """In each pod; with GPUs, one for each."""
    gpus: int = 0
    """Of each pod (nvidia.com/gpu)."""
    cpus: str | None = None
    """Of each pod, as Kubernetes writes it: 8 or 500m; null: what the cluster gives."""
    memory: str | None = None
    """Of each pod: 64Gi; null: what the cluster gives."""
    shared_memory: str = "16Gi"
    """/dev/shm of each pod, which counts as its memory; containers have 64 MB without."""
    namespace: str | None = None
    """null: kubectl's own."""
    claim: str | None = None
    """Persistent volume claim that all pods mount: runs and data lie there."""
    mount: str = "/runs"
    """Where it is mounted."""
    queue: str | None = None
    """Queue of Kueue; null: none."""
    grace_seconds: int = 300
    """Between the word to end and the end of a pod: enough for a save."""
    requeues: int = 20
    """How often all pods are started again, after exit code 75 or the loss of one."""
    output: str | None = None
    """File for the manifest; null: it is printed."""
    apply: bool = False
    """Whether kubectl applies it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"launch.kind={self.kind} is unknown; set it to {' or '.join(KINDS)}")
        for name, least in (("nodes", 1), ("processes", 1), ("gpus", 0), ("grace_seconds", 1),
                            ("requeues", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(
                    f"launch.{name}={getattr(self, name)} is too little; set it to {least} or more"
                )
        for name in ("cpus", "memory", "shared_memory"):
            value = getattr(self, name)
            if value is not None and not _QUANTITY.match(str(value)):
                raise ValueError(
                    f"launch.{name}={value} is no quantity of Kubernetes; write 8, 500m or 64Gi"
                )
        for name in ("namespace", "claim", "queue"):
            value = getattr(self, name)
            if value is not None and not _LABEL.match(value):
                raise ValueError(
                    f"launch.{name}={value} is no name in Kubernetes; use small letters, digits "
                    "and '-'"
                )
        if self.gpus and self.gpus != self.processes:
            raise ValueError(
                f"launch.processes={self.processes} with launch.gpus={self.gpus}: every process "
                f"has a GPU of its own; set launch.processes={self.gpus}"
            )

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    def check(self) -> None:
        """Raise ValueError for what is missing."""
        for name, example in (("image", "registry/tessera:1"), ("claim", "training")):
            if not getattr(self, name):
                raise ValueError(
                    f"launch.{name} is missing, which every pod needs; set launch.{name}={example}"
                )

    def preview(self, job: Job) -> str:
        return f"---\n{self.manifest(job)}"

    def manifest(self, job: Job) -> str:
        """Return the YAML of everything that is needed, or refuse a folder that pods do not see."""
        folder = PurePosixPath(job.tree["runs"])
        if not folder.is_relative_to(self.mount):
            raise ValueError(
                f"runs={folder} is a folder of this machine; set runs={self.mount}, where the pods "
                f"mount the volume claim {self.claim}"
            )
        name = re.sub(r"[^a-z0-9]+", "-", job.folder.name.lower())[:MAX_NAME].strip("-")
        return render(self, job, name if name[:1].isalpha() else f"run-{name}")

    def start(self, job: Job) -> int:
        """Print, write or apply the manifest; return 0 once that is done."""
        text = self.manifest(job)
        if self.output:
            Path(self.output).expanduser().write_text(text)
            print(f"tessera: wrote {self.output}; kubectl apply -f {self.output}", file=sys.stderr)
        elif not self.apply:
            print(text, end="")
        return self._apply(text) if self.apply else FINISHED

    @staticmethod
    def _apply(text: str) -> int:
        try:
            done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True)
        except FileNotFoundError:
            raise ValueError(
                "launch.apply=true needs kubectl, which is not on the path; install it, or set "
                "launch.output=FILE and apply that where kubectl is"
            ) from None
        return FINISHED if done.returncode == 0 else INTERNAL
