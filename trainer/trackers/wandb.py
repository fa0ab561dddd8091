"""Weights & Biases, by its own library: the home of wandb.

The server is asked which step it has last, and only later ones are sent: a run that is continued,
a connection that broke and a second `tessera sync` leave each point there once.
"""

import uuid
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainer.directory import CONFIG, read_rewind
from trainer.files import read_json, write_json
from trainer.numerics.rewinds import REWINDS
from trainer.redaction import redact_tree
from trainer.stored_config import read_stored
from trainer.trackers.protocol import FOLDER, Row

if TYPE_CHECKING:
    from wandb import Run, Settings

INIT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class WandbTracker:
    """Curves on a wandb server. Key and address come from wandb's own variables or login."""

    kind: ClassVar[str] = "wandb"

    project: str = "tessera"
    """Project on the server; it is made where there is none."""
    entity: str | None = None
    """User or team; null: the default of the account."""
    name: str | None = None
    """As shown there; null: the name of the run."""
    group: str | None = None
    """Runs of one name are shown as one group, those of a sweep for example; null: none."""
    tags: tuple[str, ...] = ()
    """Words to find runs by."""
    mode: Literal["online", "offline"] = "online"
    """offline: nothing is sent while the run goes on; `tessera sync run=DIR` sends it later."""

    def __post_init__(self) -> None:
        if not self.project:
            raise ValueError(
                "tracker.wandb.project is empty; set it to a name, for example tessera"
            )

    def check(self) -> None:
        """Raise ValueError where wandb is not installed."""
        if find_spec("wandb") is None:
            raise ValueError(
                "tracker=wandb needs the package wandb, and it is not installed; run pip install "
                "wandb, or set tracker=none"
            )

    @property
    def is_live(self) -> bool:
        return self.mode == "online"

    def describe(self, folder: Path) -> str:
        """Say where the curves are to be seen."""
        place = f"project {self.project}, run {self.name or folder.name}"
        if self.is_live:
            return f"{place}; what it says stands in {folder / FOLDER / 'wandb.log'}"
        return f"{place}, offline: `tessera sync run={folder}` sends the curves"

    def open(self, folder: Path) -> "WandbSink":
        """Connect the run; raises whatever wandb does."""
        import wandb

        identity = _identity(folder)
        series = identity["series"]
        name = self.name or folder.name
        run = wandb.init(
            project=self.project, entity=self.entity, group=self.group,
            tags=list(self.tags) or None,
            name=name if series == 1 else f"{name}-r{series}",
            id=identity["id"] if series == 1 else f"{identity['id']}-r{series}",
            resume="allow", dir=str(folder / FOLDER), settings=_settings(),
            config=redact_tree(read_stored(folder / CONFIG)),
        )  # fmt: skip
        if run.offline or run.disabled:
            run.finish()
            raise ConnectionError("WANDB_MODE keeps it offline; unset it to send anything")
        return WandbSink(run)


class WandbSink:
    """A run on the server; wandb's step is ours."""

    def __init__(self, run: "Run") -> None:
        self._run = run
        self.next_step = run.starting_step  # behind the last one that the server has

    def push(self, row: Row) -> None:
        self._run.log({**row.values, "_timestamp": row.time}, step=row.step, commit=True)

    def close(self) -> None:
        self._run.finish()


def _settings() -> "Settings":
    """Return settings by which nothing leaves the machine but numbers and the config."""
    import wandb

    return wandb.Settings(
        init_timeout=INIT_SECONDS,
        silent=True,
        console="off",  # no copy of what is printed
        program="tessera",
        save_code=False,
        disable_code=True,
        disable_git=True,  # a remote's address may hold a password
        x_disable_meta=True,  # command line, paths, user, host
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def _identity(folder: Path) -> dict[str, Any]:
    """Return the id of this run for the server, made once; a new series after each rewind.

    A server takes no step twice. After `resume_step=..`, or a spike from which the run went back,
    the curve is another one from there on: it is sent whole, as a second run beside the first.
    """
    path = folder / FOLDER / "wandb.json"
    rewinds = read_json(folder / REWINDS) if (folder / REWINDS).exists() else {}
    history = {"rewound_to": read_rewind(folder), "rewinds": rewinds}
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:16], "series": 1, "history": history})
    identity: dict[str, Any] = read_json(path)
    if identity["history"] != history:
        identity |= {"series": identity["series"] + 1, "history": history}
        write_json(path, identity)
    return identity
