"""A run: all of its settings, and the checks that span more than one of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.heads import CAUSAL_LM
from models.nn.decoupled import add_rows
from models.nn.init import SkipInit
from trainer.adapters.prompt import prompt_of
from trainer.adapters.protocol import NoAdapter
from trainer.callbacks.protocol import CheckedSpec
from trainer.checkpoint.contents import check_contents
from trainer.data.chat import ChatEncoder
from trainer.determinism import check_repeatable
from trainer.engines.protocol import Surroundings
from trainer.engines.topology_free import check_topology_free
from trainer.length import check_epochs
from trainer.mesh import Mesh, MeshSpec
from trainer.numerics.guard import Guard
from trainer.optimizers.matrices import block_matrices
from trainer.optimizers.place import Work
from trainer.optimizers.rules import Rules
from trainer.plan import Plan
from trainer.precision import PRECISIONS
from trainer.replicas import check_copies
from trainer.run_tokenizer import check_tokenizer
from trainer.settings import AUTO, RANDOM, RUN, TOPOLOGY_FREE, Settings
from trainer.trainable import make_trainable
from trainer.weights import WeightSource, match_weights


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """Everything that `configs/train.yaml` says, checked."""

    def check(self, world_size: int) -> None:
        """Raise ValueError for what cannot work on `world_size` processes, before any starts."""
        for tracker in self.tracker.values():
            if tracker is not None:
                tracker.check()
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
        self.validation.check(self.data, self.eval_every)
        self.checkpoint.check(self.save_every)
        self.spike.check(self.save_every, self.checkpoint.keep)
        self.best.check(self._metric_names(), self.eval_every)
        for callback in self.callbacks.values():
            if isinstance(callback, CheckedSpec):
                callback.check(self)
        if self.max_steps is not None:  # of max_epochs they are counted later
            self.freeze.check(self.max_steps)
        model = self.trained_model()
        self.engine.check(
            model, self.model.layout, axes, row_tokens=self.data.row_tokens,
            micro_batches=micro_batches, precision=PRECISIONS[self.precision],
        )  # fmt: skip
        last = self.freeze.last_phase
        last_model = model if last == 1 else self.trained_model(last)
        self.check_optimizer(last_model, axes)
        check_contents(
            last_model, self.checkpoint.contents,
            new_tokens=self.freeze.new_tokens, has_adapter=not isinstance(self.adapter, NoAdapter),
        )  # fmt: skip
        self.weight_source(model)

    def _metric_names(self) -> tuple[str, ...]:
        """Return the numbers of an evaluation."""
        sources = [f"loss/{name}" for name in self.data.named_sources if name]
        own = (*self.task.metric_names(self.data.labels), *self.validation.metric_names)
        return ("loss", *own, *sources)

    @property
    def is_topology_free(self) -> bool:
        return self.deterministic == TOPOLOGY_FREE

    @property
    def is_repeatable(self) -> bool:
        return self.deterministic == RUN

    def check_sums(self, axes: dict[str, int]) -> None:
        """Raise ValueError where `deterministic` asks for what this layout cannot promise."""
        check_copies(self.check_replicas_every, axes, shards=not self.engine.can_shard)
        if self.is_repeatable:
            check_repeatable(self, axes)
        if self.is_topology_free:
            check_topology_free(
                axes, owns_sums=self.engine.owns_sums, micro_rows=self.data.micro_rows,
                precision=PRECISIONS[self.precision], has_gpu=torch.cuda.is_available(),
                sharding=getattr(self.engine, "fsdp", None),
            )  # fmt: skip

    def check_optimizer(self, model: nn.Module, axes: dict[str, int]) -> None:
        """Raise ValueError where the optimizer cannot update the planned model."""
        work = Work(
            model=model, layout=self.model.layout, axes=axes, rules=self.rules(model),
            owns_update=self.engine.owns_update, is_offloaded=self.engine.offload_optimizer,
        )  # fmt: skip
        self.optim.check(work)

    def chosen_mesh(self, world_size: int) -> tuple[MeshSpec, str]:
        """Return the mesh for `world_size` processes, and why; all of them come to the same."""
        return self.mesh.chosen(
            num_parameters=sum(parameter.numel() for parameter in self.plan_model().parameters()),
            world_size=world_size,
            shards_itself=not self.engine.can_shard,
        )

    def surroundings(
        self, model: nn.Module, mesh: Mesh, device: torch.device, guard: Guard | None = None
    ) -> Surroundings:
        """Return what the engine of a planned model is built from on a built mesh; a `guard` that
        other engines of the run share goes on."""
        return Surroundings(
            layout=self.model.layout, mesh=mesh, precision=PRECISIONS[self.precision],
            device=device, optim=self.optim, schedule=self.schedule, seed=self.seed,
            max_steps=self.num_steps, rules=self.rules(model),
            is_topology_free=self.is_topology_free, is_repeatable=self.is_repeatable,
            guard=guard or Guard(self.spike),
        )  # fmt: skip

    def rules(self, model: nn.Module) -> Rules:
        """Return how the weights of the planned model are updated; ValueError: without effect."""
        embedding = self.model.layout.embedding
        rows = (f"{embedding}.weight", f"{embedding}.additional_embedding.weight")
        no_decay = (*rows, *self.adapter.undecayed)
        rules = self.freeze.rules(model, no_decay, self.adapter.lr_ratios)
        return replace(rules, matrices=block_matrices(model, self.model.layout))

    def check_data(self) -> None:
        """Raise ValueError where data, tokenizer, task and model do not fit each other."""
        self.data.check()
        check_epochs(self.max_epochs, self.data.named_sources)
        self.task.check(self.model, self.data.labels)
        if self.data.row_tokens > self.model.max_position_embeddings:
            raise ValueError(
                f"data.row_tokens={self.data.row_tokens} is longer than "
                f"max_position_embeddings={self.model.max_position_embeddings}; "
                "lower data.row_tokens"
            )
        check_tokenizer(self.data, self.tokenizer_setting, self.model)
        self.data.check_virtual(self.virtual_ids)

    @property
    def virtual_ids(self) -> range:
        """Ids of the virtual tokens that stand before every document; mostly there are none."""
        prompt, first = prompt_of(self.adapter), self.model.vocab_size
        return range(first, first + (prompt.num_virtual_tokens if prompt else 0))

    def plan_model(self) -> nn.Module:
        """Return the model on the meta device: shapes without memory."""
        labels = self.data.labels  # reads files: not on the meta device
        spec: Any = self.model
        if self.precision == "fp64" and getattr(spec, "attn_implementation", "") == AUTO:
            spec = replace(spec, attn_implementation="sdpa")  # flex adds up in fp32 on CUDA
        with torch.device("meta"), SkipInit():
            model = self.task.build_model(spec, labels)
            if self.model.additional_tokens:
                add_rows(model, self.model.layout.embedding, len(self.model.additional_tokens))
        return model.to(PRECISIONS[self.precision].master)

    def trained_model(self, step: int = 1) -> nn.Module:
        """Return the planned model with its adapters, frozen as optimizer step `step` needs it:
        what is laid out."""
        model = self.plan_model()
        make_trainable(
            model, self.adapter, self.freeze, layout=self.model.layout,
            compute=PRECISIONS[self.precision].compute, step=step,
        )  # fmt: skip
        return model

    @property
    def tokenizer_setting(self) -> str:
        """`byte`, `bpe` or a folder: what `tokenizer` comes to."""
        if self.tokenizer != AUTO:
            return self.tokenizer
        return getattr(self.model, "path", None) or self.data.own_tokenizer

    def weight_source(self, model: nn.Module) -> WeightSource | None:
        """Match the weight files to the planned model; None: random. ValueError: no match."""
        if self.weights == AUTO and hasattr(self.model, "own_weights"):  # of several folders
            return self.model.own_weights(model)
        path = getattr(self.model, "path", None)
        folder = self.weights if self.weights != AUTO else path or RANDOM
        if folder == RANDOM:
            return None
        return match_weights(
            Path(folder).expanduser(), model, trunk_name=self.model.trunk_name,
            head_name=str(model.head_name), ignored=self.model.ignored_weights,
        )  # fmt: skip

    @property
    def asks(self) -> str:
        """How `tessera generate` asks its model something; empty: it writes no text."""
        if self.task.head != CAUSAL_LM:
            return ""
        if self.data.image_size is not None:
            return 'image=FILE prompt="..."'
        is_chat = isinstance(getattr(self.data, "encoder", None), ChatEncoder)
        return 'chat="..."' if is_chat else 'prompt="..."'

    @property
    def num_steps(self) -> int:
        """`max_steps`; of `max_epochs`, after `settle`."""
        assert self.max_steps is not None
        return self.max_steps

    @property
    def plan(self) -> Plan:
        return Plan(
            max_steps=self.num_steps, log_every=self.log_every, eval_every=self.eval_every,
            validate_every=self.validation.every, save_every=self.save_every,
        )  # fmt: skip
