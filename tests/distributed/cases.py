"""The axes of the layout matrix, and sets of cases that meet every pair or triple of choices."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.parity.oracle import specs
from models import heads
from tests.runs import tiny_run
from tests.tasks import HeadTask
from trainer.adapters.lora import IA3, LoRA
from trainer.adapters.prompt import PromptTuning
from trainer.adapters.protocol import AdapterSpec, NoAdapter
from trainer.engines.accelerate import AccelerateEngine
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.native import NativeEngine
from trainer.engines.protocol import EngineSpec
from trainer.freeze import FreezeSpec
from trainer.mesh import MeshSpec
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.run import Run
from trainer.verify.compare import FP32, FP64, Standard
from trainer.verify.rows import MadeRows

LAYOUTS: dict[str, MeshSpec] = {
    "ddp": MeshSpec(dp_replicate=2),
    "fsdp": MeshSpec(dp_shard=2),
    "hsdp": MeshSpec(dp_replicate=2, dp_shard=2),
    "tp": MeshSpec(tp=2),
    "tp+sp": MeshSpec(tp=2),
    "cp": MeshSpec(cp=2),
    "pp": MeshSpec(pp=2),
    "fsdp x tp": MeshSpec(dp_shard=2, tp=2),
    "accelerate": MeshSpec(dp_replicate=2),
    "zero 1": MeshSpec(dp_replicate=2),
    "zero 2": MeshSpec(dp_replicate=2),
    "zero 3": MeshSpec(dp_replicate=2),
    "zero 2 x tp": MeshSpec(dp_replicate=2, tp=2),
    "zero 3 x cp": MeshSpec(cp=2),
}
ZERO = {"zero 1": 1, "zero 2": 2, "zero 3": 3, "zero 2 x tp": 2, "zero 3 x cp": 3}
RARE = ("zero 1", "zero 2 x tp", "zero 3 x cp")
"""The slow command's: every commit compares whole runs of these stages and splits instead."""
HEADS = (heads.CAUSAL_LM, heads.SEQUENCE, heads.TOKEN)
NEW_TOKENS = ("<a>", "<b>", "<c>")
OPTIONS = ("plain", "frozen", "accumulation", "one document", "checkpointing")
AXES: dict[str, tuple[Any, ...]] = {
    "layout": tuple(LAYOUTS),
    "family": tuple(specs()),
    "head": HEADS,
    "tied": (False, True),
    "option": OPTIONS,
}


@dataclass(frozen=True, order=True)
class Case:
    """One choice on every axis."""

    layout: str
    family: str
    head: str
    tied: bool
    option: str
    adapter: str = "none"

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        adapter = "" if self.adapter == "none" else f", {self.adapter}"
        return f"{self.layout}, {self.family}, {self.head}, {tied}, {self.option}{adapter}"

    @property
    def reference(self) -> "Case":
        """The same on one process."""
        return replace(self, layout="single")

    @property
    def mesh(self) -> MeshSpec:
        return LAYOUTS.get(self.layout, MeshSpec())

    @property
    def standard(self) -> Standard:
        """How exact this layout has to be."""
        return FP32 if self.layout in ZERO else FP64

    def engine(self) -> EngineSpec:
        is_recomputed = self.option == "checkpointing"
        recompute = ActivationCheckpointing(mode="full" if is_recomputed else "none")
        if self.layout == "accelerate":
            return AccelerateEngine(activation_checkpointing=recompute)
        if self.layout in ZERO:
            return DeepSpeedEngine(stage=ZERO[self.layout], activation_checkpointing=recompute)
        return NativeEngine(
            sequence_parallel=self.layout != "tp", activation_checkpointing=recompute
        )

    def run(self, cache: Path) -> Run:
        """Return the run of this case: in fp64, but for DeepSpeed."""
        return tiny_run(
            cache,
            model=self.spec,
            task=HeadTask(head=self.head),
            mesh=self.mesh,
            engine=self.engine(),
            freeze=FreezeSpec(
                frozen=FROZEN[self.family] if self.option == "frozen" else (),
                new_tokens=self.option == "new tokens" and self.adapter == "none",
            ),
            adapter=adapter_of(self.adapter, self.family),
            precision="fp32" if self.layout in ZERO else "fp64",
        )

    @property
    def spec(self) -> Any:
        spec = spec_of(self.family, self.tied)
        if "new tokens" not in self.option:
            return spec
        own = {"additional_vocab_size": 0} if self.family == "Idefics" else {}
        return replace(spec, additional_tokens=NEW_TOKENS, **own)

    def rows(self) -> MadeRows:
        spec = self.spec
        return MadeRows(
            vocab_size=spec.vocab_size
            + getattr(spec, "additional_vocab_size", 0)
            + len(spec.additional_tokens),
            micro_rows=1 if self.option == "accumulation" else 2,
            packed=self.option != "one document",
            virtual_ids=range(spec.vocab_size, spec.vocab_size + 3)
            if self.adapter == "prompt"
            else (),
            relabel=HeadTask(head=self.head).relabel,
            images=(2, 3, 12) if self.family == "Idefics" else None,
        )


_BIGCODE = ("transformer.wpe.*", "transformer.h.0.*", "*.attn.c_proj.*")
_DECODER = ("model.embed_tokens.*", "model.layers.0.*", "*.o_proj.*")
FROZEN = {
    "Llama": _DECODER,
    "Gemma": _DECODER,
    "GPT-BigCode (MQA)": _BIGCODE,
    "GPT-BigCode (MHA)": _BIGCODE,
    # What is decoupled stays open: the additional rows train, the others do not.
    "Idefics": ("model.vision_model.*", "model.embed_tokens.weight", "model.layers.*"),
}


def adapter_of(kind: str, family: str) -> AdapterSpec:
    """Return an adapter that acts from the first step on, on linears of every split."""
    if kind == "none":
        return NoAdapter()
    if kind == "ia3":
        is_bigcode = "BigCode" in family
        outputs = ("c_attn", "attn.c_proj") if is_bigcode else ("q_proj", "k_proj", "o_proj")
        inputs = ("c_fc", "mlp.c_proj") if is_bigcode else ("up_proj", "down_proj")
        return IA3(targets=outputs, feedforward_targets=inputs)
    if kind == "prompt":
        return PromptTuning(num_virtual_tokens=3)
    return LoRA(
        rank=3, alpha=6.0, init_lora_weights=False, use_dora=kind == "dora",
        use_rslora=kind == "rslora", quantize="nf4" if kind == "qlora" else "none",
    )  # fmt: skip


def spec_of(family: str, tied: bool) -> Any:
    """Return a tiny spec whose weights are large enough that every part matters."""
    return replace(specs()[family], tie_word_embeddings=tied, initializer_range=0.1)


def by_urgency(cases: list[Case], *layouts: str) -> list[Any]:
    """Return cases as parameters: every commit runs those of `layouts`, the slow command others."""
    return [
        pytest.param(case, marks=() if case.layout in layouts else pytest.mark.slow, id=str(case))
        for case in cases
    ]


def covering(strength: int, layouts: Iterable[str] = LAYOUTS) -> list[Case]:
    """Return cases that hold every combination of choices on any `strength` axes. Greedy."""
    axes = AXES | {"layout": tuple(layouts)}
    names = list(axes)
    left = {
        frozenset(zip(chosen, values, strict=True))
        for chosen in combinations(names, strength)
        for values in product(*(axes[name] for name in chosen))
    }
    everything = [dict(zip(names, values, strict=True)) for values in product(*axes.values())]
    cases = []
    while left:
        best = max(everything, key=lambda case: len(_met(case, strength) & left))
        left -= _met(best, strength)
        cases.append(Case(**best))
    return cases


def _met(case: dict[str, Any], strength: int) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(chosen) for chosen in combinations(case.items(), strength)}
