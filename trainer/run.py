"""A run: all of its settings, and the checks that span more than one of them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models.heads import CausalLMSpec
from models.nn.init import SkipInit
from models.nn.preferences import PreferenceModel
from trainer.adapters.protocol import AdapterSpec, NoAdapter
from trainer.best import BestSpec
from trainer.callbacks.protocol import CallbackSpec
from trainer.checkpoint.checkpoints import CheckpointSpec
from trainer.data.protocol import DataSpec
from trainer.data.tokenizers import BPE
from trainer.engines.protocol import EngineSpec, Surroundings
from trainer.engines.topology_free import check_topology_free
from trainer.freeze import FreezeSpec
from trainer.loop import Plan
from trainer.mesh import Mesh, MeshSpec
from trainer.optim import OptimSpec
from trainer.precision import PRECISIONS
from trainer.schedule import Schedule
from trainer.tasks.preferences import check_reference
from trainer.tasks.protocol import Task
from trainer.weights import WeightSource, match_weights

AUTO, RANDOM = "auto", "random"
OFF, TOPOLOGY_FREE = "off", "topology_free"
DETERMINISTIC = (OFF, TOPOLOGY_FREE)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that `configs/train.yaml` says, checked."""

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
    name: str
    """Name of the run: its folder below `runs`."""
    runs: str
    """Parent folder of runs."""
    seed: int
    max_steps: int
    log_every: int
    """Steps between log points."""
    eval_every: int | None
    """Steps between evaluations; null: none."""
    save_every: int | None
    """Steps between checkpoints; null: the last step only."""
    deterministic: str
    """off; topology_free: the same bits on 1, 2, 4, .. data ranks, with or without FSDP2 (CPU)."""
    precision: str
    """fp32, bf16 (fp32 weights, bf16 compute), pure_bf16, or fp64."""
    tokenizer: str
    """`byte`, `bpe` (trained on the data, cached), a folder with tokenizer.json, or `auto`: that
    of model.path, where the model has one, else that of data=tokens, else bpe."""
    weights: str
    """`random`, a folder with safetensors files in Hugging Face layout, or `auto`: those of
    model.path, where the model has one, else random."""
    resume: str
    """`auto`: go on with an unfinished run of this name; `never`; or the folder of a run."""
    resume_step: int | None
    """Go back to this checkpoint; null: the newest that is intact."""
    resume_allow: list[str]
    """Config keys that may differ from the run that is resumed."""
    max_skipped_in_a_row: int
    """Steps with a non-finite gradient in a row before the run stops."""
    timeout_seconds: float
    """How long a rank waits for the others in one collective."""

    def __post_init__(self) -> None:
        counts = ("max_steps", "log_every", "eval_every", "save_every", "max_skipped_in_a_row")
        for name in (*counts, "timeout_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} is not positive; set it to 1 or more")
        if self.deterministic not in DETERMINISTIC:
            raise ValueError(
                f"deterministic={self.deterministic!r} is unknown; "
                f"set it to one of {', '.join(DETERMINISTIC)}"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r} is unknown; set it to one of {', '.join(PRECISIONS)}"
            )

    def check(self, world_size: int) -> None:
        """Raise ValueError for what cannot work on `world_size` processes, before any starts."""
        self.check_data()
        axes = self.chosen_mesh(world_size)[0].axes(world_size)
        dp_size = axes["dp_replicate"] * axes["dp_shard"]
        micro_batches = self.data.micro_batches(dp_size)
        self.check_sums(axes)
        if self.eval_every and not self.data.holds_out():
            raise ValueError(
                f"eval_every={self.eval_every} has nothing to evaluate on; set data.eval_path or "
                "data.eval_fraction (of tessera tokenize, for data=tokens), or eval_every=null"
            )
        self.best.check(self._metric_names(), self.eval_every)
        model = self.trained_model()
        self.engine.check(
            model, self.model.layout, axes, row_tokens=self.data.row_tokens,
            micro_batches=micro_batches, precision=PRECISIONS[self.precision],
        )  # fmt: skip
        self.weight_source(model)

    def _metric_names(self) -> tuple[str, ...]:
        """Return the numbers of an evaluation."""
        sources = [f"loss/{name}" for name in self.data.named_sources if name]
        return ("loss", *self.task.metric_names(self.data.labels), *sources)

    @property
    def is_topology_free(self) -> bool:
        return self.deterministic == TOPOLOGY_FREE

    def check_sums(self, axes: dict[str, int]) -> None:
        """Raise ValueError where `deterministic` asks for what this layout cannot promise."""
        if not self.is_topology_free:
            return
        if not self.engine.owns_sums:
            raise ValueError(
                "deterministic=topology_free needs every sum to be ours; "
                "set engine=native, or deterministic=off"
            )
        check_topology_free(
            axes,
            micro_rows=self.data.micro_rows,
            precision=PRECISIONS[self.precision],
            has_gpu=torch.cuda.is_available(),
        )

    def chosen_mesh(self, world_size: int) -> tuple[MeshSpec, str]:
        """Return the mesh for `world_size` processes, and why; all of them come to the same."""
        return self.mesh.chosen(
            num_parameters=sum(parameter.numel() for parameter in self.plan_model().parameters()),
            world_size=world_size,
            shards_itself=not self.engine.can_shard,
        )

    def surroundings(self, mesh: Mesh, device: torch.device) -> Surroundings:
        """Return what the engine is built from on a built mesh."""
        return Surroundings(
            layout=self.model.layout, mesh=mesh, precision=PRECISIONS[self.precision],
            device=device, optim=self.optim, schedule=self.schedule, seed=self.seed,
            max_steps=self.max_steps, lr_ratios=self.adapter.lr_ratios,
            undecayed=self.adapter.undecayed, is_topology_free=self.is_topology_free,
        )  # fmt: skip

    def check_data(self) -> None:
        """Raise ValueError where data, tokenizer, task and model do not fit each other."""
        self.data.check()
        self.task.check(self.model, self.data.labels)
        if self.data.row_tokens > self.model.max_position_embeddings:
            raise ValueError(
                f"data.row_tokens={self.data.row_tokens} is longer than "
                f"max_position_embeddings={self.model.max_position_embeddings}; "
                "lower data.row_tokens"
            )
        self._check_tokenizer()

    def _check_tokenizer(self) -> None:
        if self.tokenizer_setting == self.data.own_tokenizer == BPE:
            return  # trained to fit, on the data
        tokenizer = self.data.tokenizer(self.tokenizer_setting, self.model.vocab_size)
        if tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"tokenizer={self.tokenizer_setting} has {tokenizer.vocab_size} tokens, "
                f"model.vocab_size={self.model.vocab_size} has fewer rows; "
                f"set model.vocab_size to {tokenizer.vocab_size} or more, or take another tokenizer"
            )
        self.data.check_encoding(tokenizer)

    def plan_model(self) -> nn.Module:
        """Return the model on the meta device: shapes without memory."""
        labels = self.data.labels  # reads files: not on the meta device
        with torch.device("meta"), SkipInit():
            model = self.task.build_model(self.model, labels)
        return model.to(PRECISIONS[self.precision].master)

    def trained_model(self) -> nn.Module:
        """Return the planned model, frozen and with its adapters: what is laid out."""
        if self.freeze.frozen and not isinstance(self.adapter, NoAdapter):
            raise ValueError(
                f"freeze.frozen={list(self.freeze.frozen)} has no effect on a model with adapters, "
                "which freezes all else; set freeze=none"
            )
        model = self.plan_model()
        self.freeze.apply(model)
        self.adapter.apply(model, self.model.layout)
        if isinstance(model, PreferenceModel):
            check_reference(model)
        if not isinstance(self.adapter, NoAdapter):
            # No update ever needs more of them: each pass computes with these very numbers.
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(PRECISIONS[self.precision].compute)
        return model

    @property
    def tokenizer_setting(self) -> str:
        """`byte`, `bpe` or a folder: what `tokenizer` comes to."""
        if self.tokenizer != AUTO:
            return self.tokenizer
        return self._model_path or self.data.own_tokenizer

    @property
    def _model_path(self) -> str | None:
        return getattr(self.model, "path", None)

    def weight_source(self, model: nn.Module) -> WeightSource | None:
        """Match the weight files to the planned model; None: random. ValueError: no match."""
        folder = self.weights if self.weights != AUTO else self._model_path or RANDOM
        if folder == RANDOM:
            return None
        return match_weights(
            Path(folder).expanduser(),
            model,
            trunk_name=self.model.trunk_name,
            head_name=str(model.head_name),
            ignored=self.model.ignored_weights,
        )

    @property
    def plan(self) -> Plan:
        return Plan(
            max_steps=self.max_steps,
            log_every=self.log_every,
            eval_every=self.eval_every,
            save_every=self.save_every,
            max_skipped_in_a_row=self.max_skipped_in_a_row,
        )
