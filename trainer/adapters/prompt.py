"""Prompt tuning: virtual tokens before every document, whose embeddings train; the base is frozen.

Source: Lester et al. 2021.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor, nn

from models.layout import Layout
from models.nn.prompt import PromptEmbedding, add_prompt, prompt_rows
from trainer.adapters.lora import common_config, train_only
from trainer.adapters.protocol import AdapterSpec
from trainer.adapters.targets import find_saved
from trainer.parallel.materialise import Values

INITS = {"vocab": "SAMPLE_VOCAB", "random": "RANDOM"}  # what peft calls them


@dataclass(frozen=True, kw_only=True)
class PromptTuning:
    """Virtual tokens; field names that peft has too mean the same there."""

    num_virtual_tokens: int = 20
    """Tokens before every document; each takes one of data.row_tokens."""
    init: Literal["vocab", "random"] = "vocab"
    """They start as rows of the embedding, drawn by the run's seed; or at random."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that train as a whole beside them; a classification head always does."""

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ValueError(
                f"adapter.num_virtual_tokens={self.num_virtual_tokens} is not positive; "
                "set it to 20 or 100"
            )

    @property
    def lr_ratios(self) -> dict[str, float]:
        return {}

    @property
    def undecayed(self) -> tuple[str, ...]:
        return ()  # an embedding's additional rows are spared already

    @property
    def base_hash(self) -> str | None:
        return None

    def apply(self, model: nn.Module, layout: Layout) -> None:
        saved = find_saved(model, self.modules_to_save, [])
        for name in saved:
            if f"{layout.embedding}.".startswith(f"{name}."):
                raise ValueError(
                    f"adapter.modules_to_save={list(self.modules_to_save)}: {name} holds the "
                    "embedding, and peft would go on with its old rows; take it out"
                )
        add_prompt(model, layout.embedding, self.num_virtual_tokens)
        model.requires_grad_(False)
        train_only(model, saved)

    def values(self, model: nn.Module, values: Values) -> Values:
        """Virtual tokens start as rows of the vocabulary; the run's seed says which ones."""
        if self.init == "random":
            return values
        (own,) = prompt_rows(model)
        place = own.partition(".additional_embedding")[0]
        embedding = model.get_submodule(place)
        assert isinstance(embedding, PromptEmbedding)
        vocab_size, width = embedding.weight.shape
        scale = embedding.scale or 1.0  # peft copies what the embedding computes

        @cache
        def rows() -> Tensor:
            # What they would be at random depends on the seed, and on nothing else.
            noise = values(own, 0, self.num_virtual_tokens * width).numpy().tobytes()
            random = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(noise) >> 1)
            drawn = torch.randint(vocab_size, (self.num_virtual_tokens,), generator=random)
            found = [values(f"{place}.weight", n * width, (n + 1) * width) for n in drawn.tolist()]
            whole = torch.cat(found)
            return whole.to(torch.promote_types(whole.dtype, torch.float32)) * scale

        def value(name: str, start: int, stop: int) -> Tensor:
            return rows()[start:stop] if name == own else values(name, start, stop)

        return value

    def peft_config(self, model: nn.Module) -> dict[str, Any] | None:
        (rows,) = prompt_rows(model)
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": model.get_parameter(rows).shape[1],
            "num_transformer_submodules": 1,
            # peft reads these two from the base's config.json, and prompt tuning uses neither.
            "num_layers": None,
            "num_attention_heads": None,
            "prompt_tuning_init": INITS[self.init],
            **common_config(model, find_saved(model, self.modules_to_save, [])),
        }


def prompt_of(adapter: AdapterSpec) -> PromptTuning | None:
    """Return the settings of virtual tokens, also where they come from a folder; None: no such."""
    inner: Any = getattr(adapter, "inner", adapter)
    return inner if isinstance(inner, PromptTuning) else None
