"""What is exported: a folder of Hugging Face or of peft, and what is known of its run."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from models.heads import CAUSAL_LM
from trainer.adapters.files import CONFIG
from trainer.adapters.merged import base_folder, config_of
from trainer.adapters.nf4 import NONE
from trainer.checkpoint.contents import BASE
from trainer.data.tokenizers import FileTokenizer
from trainer.export.idefics import check_idefics
from trainer.files import read_json
from trainer.planned import head_of
from trainer.weights import weight_entries


@dataclass(frozen=True, kw_only=True)
class History:
    """The run that made a checkpoint."""

    name: str
    step: int
    config: dict[str, Any]
    """Its resolved config."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Objects of metrics.jsonl."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions and commit: environment.json."""

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The last evaluation up to the step that is exported."""
        found = [m for m in self.metrics if m["split"] == "eval" and m["step"] <= self.step]
        return found[-1] if found else None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's or an adapter's folder; ValueError in one line for what cannot be exported."""

    folder: Path
    history: History | None = None

    def __post_init__(self) -> None:
        check_idefics(self.folder, self.config)
        if self.adapter.get("peft_type") == "PROMPT_TUNING":
            raise ValueError(
                f"{self.folder} holds virtual tokens, which are no weights of the model and cannot "
                "be merged; open it as it is: PeftModel.from_pretrained(model, DIR) of peft"
            )
        is_bare = self.is_adapter and not (self.folder / "config.json").is_file()
        if is_bare and self.adapter.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
            raise ValueError(
                f"{self.folder} is a classifier's adapter without the config.json that names its "
                "labels; save it there: model.config.save_pretrained(..)"
            )

    @cached_property
    def base(self) -> Path:
        return base_folder(self.folder)

    @property
    def is_adapter(self) -> bool:
        return (self.folder / CONFIG).is_file()

    @cached_property
    def adapter(self) -> dict[str, Any]:
        """adapter_config.json; empty for a whole model."""
        keys: dict[str, Any] = read_json(self.folder / CONFIG) if self.is_adapter else {}
        return keys

    @cached_property
    def quantize(self) -> str:
        """How an adapter's base was kept in training: merged weights are rounded as it was."""
        path = self.folder / BASE
        return str(read_json(path).get("quantize", NONE)) if path.is_file() else NONE

    @cached_property
    def config(self) -> dict[str, Any]:
        return config_of(self.folder)

    @property
    def head(self) -> str:
        return head_of(self.config)

    @cached_property
    def tokenizer(self) -> FileTokenizer:
        has_own = (self.folder / "tokenizer.json").is_file()
        return FileTokenizer(self.folder if has_own else self.base)

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The widest type of the weights: of a run its masters, of an adapter its base."""
        widest = torch.float16
        kinds = {entry.dtype for entry in weight_entries(self.base).values()}
        floats = [kind for kind in kinds if kind.is_floating_point]
        for number, kind in enumerate(floats):
            widest = torch.promote_types(widest, kind) if number else kind
        return widest

    @property
    def origins(self) -> list[Path]:
        """Where a generation_config.json may be: here, or where training began."""
        model = self.history.config.get("model", {}) if self.history else {}
        begun = [Path(model["path"]).expanduser()] if model.get("path") else []
        return [self.folder, self.base, *begun] if self.head == CAUSAL_LM else []
