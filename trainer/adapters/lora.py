"""Settings of the native adapters: LoRA with its variants, QLoRA among them, and IA3."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.layout import Layout
from models.lora import (
    MAGNITUDE,
    AdaptedLinear,
    DoRALinear,
    IA3InputLinear,
    IA3Linear,
    LoRALinear,
    PackedLoRALinear,
    adapt,
    adapter_names,
)
from models.nn.classifiers import SequenceClassifier, TokenClassifier
from models.nn.preferences import RewardHead
from trainer.adapters.nf4 import NONE, check_quantize, packing
from trainer.adapters.targets import ALL_LINEAR, find_saved, find_targets, short_names
from trainer.parallel.materialise import Values


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters; field names that peft has too mean the same there."""

    rank: int = 16
    """Rank of the products: r in peft."""
    alpha: float = 32.0
    """The product is scaled by alpha / rank."""
    dropout: float = 0.0
    """On the adapter's input, in training."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Names of linears or their ends (`q_proj`, `*` matches anything), or all-linear."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that train as a whole beside the adapters; a classification head always does."""
    lr_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, who advise 16)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    use_dora: bool = False
    """Train the length of each output row beside its direction."""
    init_lora_weights: bool = True
    """False: B starts at random, so that the adapter acts from the first step on: for tests."""
    quantize: str = NONE
    """nf4: the frozen weights of the targets are kept in 4 bits (QLoRA)."""
    use_double_quant: bool = True
    """With quantize: their scales are kept in 8 bits, for 4.13 bits per weight instead of 4.5."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"adapter.rank={self.rank} is not positive; set it to 8 or 16")
        if self.alpha <= 0:
            raise ValueError(f"adapter.alpha={self.alpha} is not positive; set it to twice rank")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"adapter.dropout={self.dropout} is no probability below 1; set 0.05")
        if self.lr_ratio <= 0:
            raise ValueError(f"adapter.lr_ratio={self.lr_ratio} is not positive; set it to 1")
        check_targets(self.targets)
        check_quantize(
            self.quantize, use_double_quant=self.use_double_quant, use_dora=self.use_dora
        )

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def lr_ratios(self) -> dict[str, float]:
        return {".lora_B.weight": self.lr_ratio}

    @property
    def undecayed(self) -> tuple[str, ...]:
        return ()

    @property
    def base_hash(self) -> str | None:
        return None

    def apply(self, model: nn.Module, layout: Layout) -> None:
        kind: Callable[..., LoRALinear] = DoRALinear if self.use_dora else LoRALinear
        if self.quantize != NONE:
            pack = packing(self.quantize, use_double_quant=self.use_double_quant)
            kind = partial(PackedLoRALinear, pack=pack)
        make = partial(
            kind, rank=self.rank, scale=self.scale, dropout=self.dropout,
            is_zero=self.init_lora_weights,
        )  # fmt: skip
        targets = find_targets(model, layout, self.targets)
        saved = find_saved(model, self.modules_to_save, targets)
        model.requires_grad_(False)
        adapt(model, targets, make)
        train_only(model, saved)

    def values(self, model: nn.Module, values: Values) -> Values:
        """Magnitudes start as the lengths of the base's rows."""
        linears = {
            f"{name}.{MAGNITUDE}": (f"{name}.weight", module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, DoRALinear)
        }

        def value(name: str, start: int, stop: int) -> Tensor:
            if name not in linears:
                return values(name, start, stop)
            base, width = linears[name]
            rows = values(base, start * width, stop * width).view(-1, width)
            return rows.to(torch.promote_types(rows.dtype, torch.float32)).norm(dim=1)

        return value

    def peft_config(self, model: nn.Module) -> dict[str, Any] | None:
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": self.init_lora_weights,
            **linear_config(model, self.modules_to_save),
        }


@dataclass(frozen=True, kw_only=True)
class IA3:
    """One factor for each feature: of the outputs of `targets`, of the inputs of others."""

    targets: tuple[str, ...] = ("k_proj", "v_proj")
    """Linears whose outputs are scaled: names or their ends, or all-linear."""
    feedforward_targets: tuple[str, ...] = ("down_proj",)
    """Linears whose inputs are scaled; may be empty."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that train as a whole beside the adapters; a classification head always does."""

    def __post_init__(self) -> None:
        check_targets(self.targets + self.feedforward_targets)

    @property
    def lr_ratios(self) -> dict[str, float]:
        return {}

    @property
    def undecayed(self) -> tuple[str, ...]:
        return (".ia3_l",)  # two-dimensional in peft's file, and no matrix

    @property
    def base_hash(self) -> str | None:
        return None

    def apply(self, model: nn.Module, layout: Layout) -> None:
        outputs = find_targets(model, layout, self.targets)
        inputs = find_targets(model, layout, self.feedforward_targets)
        if both := sorted(set(outputs) & set(inputs)):
            raise ValueError(
                f"adapter.targets and adapter.feedforward_targets both name {both[0]}; "
                "take it out of one of them"
            )
        saved = find_saved(model, self.modules_to_save, outputs + inputs)
        model.requires_grad_(False)
        adapt(model, outputs, IA3Linear)
        adapt(model, inputs, IA3InputLinear)
        train_only(model, saved)

    def values(self, model: nn.Module, values: Values) -> Values:
        return values

    def peft_config(self, model: nn.Module) -> dict[str, Any] | None:
        inputs = [n for n, m in model.named_modules() if isinstance(m, IA3InputLinear)]
        config = linear_config(model, self.modules_to_save)
        forward = short_names(model, inputs)
        if not set(forward) <= set(config["target_modules"]):  # short in one list only
            adapted = [n for n, m in model.named_modules() if isinstance(m, AdaptedLinear)]
            config["target_modules"], forward = sorted(adapted), sorted(inputs)
        return {
            "peft_type": "IA3",
            "feedforward_modules": forward,
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
            **config,
        }


def check_targets(targets: tuple[str, ...]) -> None:
    """Raise ValueError where nothing would be adapted."""
    if not targets:
        raise ValueError("adapter.targets=[] adapts nothing; set it to [all-linear]")


def train_only(model: nn.Module, saved: list[str]) -> None:
    """Let the adapters and the modules of these names train, but for what no gradient reaches."""
    for name in adapter_names(model):
        model.get_parameter(name).requires_grad_(True)
    for name in saved:
        model.get_submodule(name).requires_grad_(True)
    for module in model.modules():
        for name in getattr(module, "never_trains", ()):
            module.get_submodule(name).requires_grad_(False)


def linear_config(model: nn.Module, modules_to_save: tuple[str, ...]) -> dict[str, Any]:
    """Return the keys that peft's config has for every kind of adapter of linears."""
    adapted = [n for n, m in model.named_modules() if isinstance(m, AdaptedLinear)]
    saved = find_saved(model, modules_to_save, adapted)
    return {"target_modules": short_names(model, adapted), **common_config(model, saved)}


def common_config(model: nn.Module, saved: list[str]) -> dict[str, Any]:
    """Return the keys that peft's config has for every kind; modules `saved` train as a whole."""
    head = model.get_submodule(str(model.head_name))
    kinds = {
        SequenceClassifier: "SEQ_CLS",
        RewardHead: "SEQ_CLS",
        TokenClassifier: "TOKEN_CLS",
    }
    return {
        "modules_to_save": short_names(model, saved) or None,
        "task_type": kinds.get(type(head), "CAUSAL_LM"),
        "inference_mode": True,
    }
