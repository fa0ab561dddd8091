"""An adapter from a folder of peft's: adapter_config.json and adapter_model.safetensors."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.layout import Layout
from models.lora import adapter_names
from models.nn.prompt import prompt_rows
from trainer.adapters.files import CONFIG, PREFIX, PROMPT, PROMPT_PREFIX, WEIGHTS
from trainer.adapters.lora import IA3, LoRA
from trainer.adapters.nf4 import NONE
from trainer.adapters.prompt import INITS, PromptTuning
from trainer.checkpoint.contents import BASE
from trainer.checkpoint.tensor_file import Entry, read_elements, read_header
from trainer.files import read_keys
from trainer.parallel.materialise import Values

AUTO = "auto"
PEFT = "give a folder that peft saved"

# What changes the computation and is not done here, by key: peft's value for "off".
_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian"),  # others change the base's weights
    **dict.fromkeys(
        (
            "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias", "use_qalora",
            "trainable_token_indices", "target_parameters", "use_bdlora", "alora_invocation_tokens",
            "arrow_config", "ensure_weight_tying",
        ),
        (None, False, {}, []),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PretrainedAdapter:
    """Go on with an adapter that peft or a run of ours left."""

    path: str
    """Folder with adapter_config.json and adapter_model.safetensors."""
    dropout: float | None = None
    """On the adapter's input, in training; None: as its config says."""
    lr_ratio: float = 1.0
    """Learning rate of B over that of A."""
    quantize: str = AUTO
    """auto: the base is kept as it was in training; nf4: in 4 bits; none: as the base is."""

    def __post_init__(self) -> None:
        assert self.inner is not None  # reads the folder: what is wrong there is wrong here

    @property
    def folder(self) -> Path:
        return Path(self.path).expanduser()

    @property
    def base(self) -> Path:
        """The folder of the model that the adapter belongs to; ValueError where it is not here."""
        key = "base_model_name_or_path"
        named = read_keys(self.folder / CONFIG, PEFT).get(key)
        folder = Path(named).expanduser() if isinstance(named, str) else None
        if not named or folder is None or not folder.is_dir():
            raise ValueError(
                f"{self.folder / CONFIG}: {key}={named!r} is no folder here; write there where the "
                "base is (one that started from random weights is in no folder)"
            )
        return folder

    @cached_property
    def inner(self) -> LoRA | IA3 | PromptTuning:
        """The settings that the folder stands for, every target by its full name."""
        config = read_keys(self.folder / CONFIG, PEFT)
        kind = config.get("peft_type")
        if kind not in ("LORA", "IA3", "PROMPT_TUNING"):
            raise ValueError(
                f"{self.folder / CONFIG}: peft_type={kind!r}; give a LORA, IA3 or PROMPT_TUNING"
            )
        for key, neutral in _OFF.items():
            if key in config and config[key] not in neutral:
                raise ValueError(
                    f"{self.folder / CONFIG}: {key}={config[key]!r} is not supported; "
                    "merge the adapter with peft, and give the merged model as model.path"
                )
        if kind == "LORA":
            return self._lora(config)
        if self.dropout is not None or self.lr_ratio != 1.0 or self.quantize != AUTO:
            raise ValueError(
                "adapter.dropout, adapter.lr_ratio and adapter.quantize have no effect on "
                f"{kind}; take them out"
            )
        return self._ia3() if kind == "IA3" else self._prompt(config)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The tensors of the file, by the names of a model without peft."""
        path = self.folder / WEIGHTS
        if not path.is_file():
            raise ValueError(f"{self.folder} has no {WEIGHTS}; give a folder that peft saved")
        entries = read_header(path)
        prefix = PROMPT_PREFIX if PROMPT in entries else PREFIX
        for name in entries:
            if name != PROMPT and not name.startswith(prefix):
                raise ValueError(f"{path}: {name} does not begin with {prefix}; save it with peft")
        return {name.removeprefix(prefix): entry for name, entry in entries.items()}

    def given(self, model: nn.Module) -> dict[str, Entry]:
        """Return the tensors of the file by the names of the adapted model."""
        own = dict(zip((PROMPT,), prompt_rows(model), strict=False))  # the one, if any
        return {own.get(name, name): entry for name, entry in self.entries.items()}

    def _lora(self, config: dict[str, Any]) -> LoRA:
        dropout = config.get("lora_dropout", 0.0) if self.dropout is None else self.dropout
        targets = self._modules(".lora_A.weight")
        return LoRA(
            rank=config.get("r", 8), alpha=float(config.get("lora_alpha", 8)), dropout=dropout,
            use_rslora=bool(config.get("use_rslora")), use_dora=bool(config.get("use_dora")),
            targets=targets, modules_to_save=self._saved(targets), lr_ratio=self.lr_ratio,
            **self._packing(),
        )  # fmt: skip

    def _packing(self) -> dict[str, Any]:
        """Return how the base is kept: as `quantize` says, else as it was in training."""
        stated = self._stated.get("quantize", NONE)
        if self.quantize not in (AUTO, stated):
            return {"quantize": self.quantize}
        double = self._stated.get("use_double_quant", True)
        return {"quantize": stated, "use_double_quant": double}

    def _prompt(self, config: dict[str, Any]) -> PromptTuning:
        stated = config.get("num_virtual_tokens")
        found = self.entries[PROMPT].shape[0] if PROMPT in self.entries else 0
        if found != stated:
            raise ValueError(
                f"{self.folder / CONFIG}: num_virtual_tokens={stated}, and {WEIGHTS} has {found}; "
                "give an adapter of a decoder, as peft saved it"
            )
        is_random = config.get("prompt_tuning_init") == INITS["random"]
        return PromptTuning(
            num_virtual_tokens=found, init="random" if is_random else "vocab",
            modules_to_save=self._saved((PROMPT,)),
        )  # fmt: skip

    def _ia3(self) -> IA3:
        found = self._modules(".ia3_l")
        inputs = tuple(name for name in found if self.entries[f"{name}.ia3_l"].shape[0] == 1)
        return IA3(
            targets=tuple(name for name in found if name not in inputs),
            feedforward_targets=inputs, modules_to_save=self._saved(found),
        )  # fmt: skip

    def _modules(self, end: str) -> tuple[str, ...]:
        return tuple(name.removesuffix(end) for name in self.entries if name.endswith(end))

    def _saved(self, adapted: tuple[str, ...]) -> tuple[str, ...]:
        """Return the modules that are in the file as a whole."""
        prefixes = tuple(f"{name}." for name in adapted)
        others = (name for name in self.entries if not f"{name}.".startswith(prefixes))
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in others))

    @property
    def lr_ratios(self) -> dict[str, float]:
        return self.inner.lr_ratios

    @property
    def undecayed(self) -> tuple[str, ...]:
        return self.inner.undecayed

    @cached_property
    def _stated(self) -> dict[str, Any]:
        """What a run of ours says of the base; empty for an adapter of others."""
        path = self.folder / BASE
        return read_keys(path, PEFT) if path.is_file() else {}

    @property
    def base_hash(self) -> str | None:
        return str(self._stated["xxh3"]) if self._stated else None

    def apply(self, model: nn.Module, layout: Layout) -> None:
        targets = () if isinstance(self.inner, PromptTuning) else self.inner.targets
        missing = [name for name in targets if name not in dict(model.named_modules())]
        advice = "it belongs to another base: give that one as model.path"
        if missing:
            raise ValueError(f"adapter.path={self.path}: the model has no {missing[0]}; {advice}")
        self.inner.apply(model, layout)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        given = self.given(model)  # also what never trains, where no file of a base has it
        for name in sorted(wanted | given.keys()):
            found = given[name].shape if name in given else None
            if name in wanted and found is None and name not in adapter_names(model):
                continue  # a head that the adapter was not trained with starts anew
            if shapes.get(name) != found:
                shape = list(shapes[name]) if name in shapes else None
                raise ValueError(
                    f"adapter.path={self.path}: {name} has shape {found and list(found)}, "
                    f"the model needs {shape}; {advice}"
                )

    def values(self, model: nn.Module, values: Values) -> Values:
        given = self.given(model)

        def value(name: str, start: int, stop: int) -> Tensor:
            if name not in given:
                return values(name, start, stop)
            return read_elements(self.folder, given[name], start, stop, name)

        return value

    def peft_config(self, model: nn.Module) -> dict[str, Any] | None:
        return self.inner.peft_config(model)
