"""The settings of a run, one field each, and the checks that need no other setting."""

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime

from models.heads import CausalLMSpec
from trainer.adapters.protocol import AdapterSpec
from trainer.best import BestSpec
from trainer.callbacks.protocol import CallbackSpec
from trainer.checkpoint.spec import CheckpointSpec
from trainer.data.protocol import DataSpec
from trainer.drift import ALLOWABLE
from trainer.engines.protocol import EngineSpec
from trainer.freeze import FreezeSpec
from trainer.length import check_length
from trainer.mesh import MeshSpec
from trainer.numerics.spike import SpikeSpec
from trainer.optim import OptimSpec
from trainer.precision import PRECISIONS
from trainer.schedule import Schedule
from trainer.tasks.protocol import Task
from trainer.time_limit import end_of
from trainer.trackers.protocol import TrackerSpec
from trainer.validation.spec import ValidationSpec

AUTO, RANDOM = "auto", "random"
POSITIVE = {
    "max_steps": "1 or more", "log_every": "1 or more", "eval_every": "1 or more, or null for none",
    "save_every": "1 or more, or null for the last step only", "max_skipped_in_a_row": "1 or more",
    "check_replicas_every": "1 or more, or null for none", "max_epochs": "a number above 0, as 0.5",
    "eval_share": "0.01, or null for all", "timeout_seconds": "60 or more",
}  # fmt: skip
"""What a number above 0 is best set to where it is none."""
MAX_TIMEOUT_SECONDS = 1e9  # 31 years; nanoseconds of 64 bits end after 292
DETERMINISTIC = OFF, RUN, TOPOLOGY_FREE = "off", "run", "topology_free"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that `configs/train.yaml` says, each setting checked by itself."""

    model: CausalLMSpec
    task: Task
    data: DataSpec
    engine: EngineSpec
    mesh: MeshSpec
    optim: OptimSpec
    schedule: Schedule
    freeze: FreezeSpec
    adapter: AdapterSpec
    checkpoint: CheckpointSpec
    best: BestSpec
    callbacks: dict[str, CallbackSpec | None]
    """Listeners by name; null switches one off."""
    tracker: dict[str, TrackerSpec | None] = field(default_factory=dict)
    """Where the curves go beside metrics.jsonl, by name; null switches one off."""
    name: str
    """Name of the run: its folder below `runs`."""
    runs: str
    """Parent folder of runs."""
    seed: int
    """Of initial weights, the order of the data and dropout."""
    max_steps: int | None
    """Optimizer steps; null: as many as `max_epochs` needs."""
    max_epochs: float | None = None
    """How often the data is gone through, instead of `max_steps`; see `settle`."""
    log_every: int
    """Steps between log points."""
    eval_every: int | None
    """Steps between evaluations; null: none."""
    eval_share: float | None = None
    """What an evaluation may cost, as a share of the time of the steps since the one before, where
    a forward pass takes a third of a step: so many held-out rows are read, evenly spaced and the
    same ones each time (at least 64 rows, or 256 documents); null: all of them."""
    save_every: int | None
    """Steps between checkpoints; null: the last step only."""
    deterministic: str
    """off; run: the same bits on the same layout, whenever it was stopped and resumed;
    topology_free: the same on 1, 2, 4, .. data ranks, with or without FSDP2 (CPU)."""
    precision: str
    """fp32, bf16 (fp32 weights, bf16 compute), fp8 (as bf16, but products of trained linears in
    float8), pure_bf16, or fp64."""
    tokenizer: str
    """`byte`, `bpe` (trained on the data, cached), a folder with tokenizer.json, or `auto`: that
    of model.path or model.text, where the model has one, else that of data=tokens, else bpe."""
    weights: str
    """`random`, a folder with safetensors files in Hugging Face layout, or `auto`: those of
    model.path, or of model.text and model.vision, where the model has one, else random."""
    resume: str
    """`auto`: go on with an unfinished run of this name; `never`; or the folder of a run."""
    resume_step: int | None
    """Go back to this checkpoint; null: the newest that is intact."""
    resume_allow: list[str]
    """What may differ from the run that is resumed: data.global_rows, data.global_documents,
    data.mix (the sources of the data and their shares), deterministic (what decides bits)."""
    resume_strict: bool = False
    """Stop where the newest checkpoint is damaged, instead of going on from the one before."""
    max_skipped_in_a_row: int
    """Steps in a row without an update before the run stops, or rewinds."""
    check_replicas_every: int | None = None
    """Steps between comparisons of the copies of the weights, bit for bit; null: none."""
    spike: SpikeSpec = field(default_factory=SpikeSpec)
    """What is done about a loss or a gradient norm far above the usual one."""
    validation: ValidationSpec = field(default_factory=ValidationSpec)
    """When the model answers held-out questions, and by what its answers are judged."""
    stop_at: str | None = None
    """When the run is to have stopped, with its last step saved: `+90s`, `+12h` or `+2d` from the
    start of the command, or a time like 2030-12-31T08:00; null: at no time of its own."""
    timeout_seconds: float
    """How long a rank waits for the others in one collective."""

    def __post_init__(self) -> None:
        for name, better in POSITIVE.items():
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} is not positive; set it to {better}")
        if self.timeout_seconds > MAX_TIMEOUT_SECONDS:
            raise ValueError(
                f"timeout_seconds={self.timeout_seconds} is longer than clocks count; set it to "
                f"{MAX_TIMEOUT_SECONDS:.0f} or less"
            )
        check_length(self.max_steps, self.max_epochs)
        if self.stop_at is not None:
            end_of(self.stop_at, datetime.now().astimezone())
        known: dict[str, Collection[str]] = {
            "deterministic": DETERMINISTIC, "precision": PRECISIONS, "resume_allow": ALLOWABLE
        }  # fmt: skip
        for name, names in known.items():
            given = getattr(self, name)
            for value in given if isinstance(given, list) else [given]:
                if value not in names:
                    raise ValueError(
                        f"{name}={value!r} is unknown; set it to one of {', '.join(names)}"
                    )
