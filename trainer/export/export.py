"""Write a checkpoint as a Hugging Face folder, open it in transformers, and compare the logits."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.heads import CAUSAL_LM
from models.lora import merge
from models.nn.decoupled import merge_rows, new_rows
from models.nn.model import DecoderModel
from trainer.adapters.merged import load_as_trained
from trainer.data.tokenizer_config import CONFIG_FILE, read_tokenizer_config
from trainer.data.tokenizers import FileTokenizer
from trainer.errors import CheckError
from trainer.export import idefics
from trainer.export.card import write_card
from trainer.export.prompts import Prompt, prompts_of
from trainer.export.reloaded import check_tokenizer, reloaded_logits
from trainer.export.source import Source
from trainer.export.stops import FILE, generation_config
from trainer.files import fsync_folder, write_json
from trainer.parallel.pieces import unique_parameters
from trainer.pretrained import save_pretrained

AUTO = "auto"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the largest logit. The same numbers multiplied in the same type, added up in another order:
# measured 2e-6 over 30 layers of SmolLM2; a wrong weight, scale or switch moves far more.
WIDE_LIMIT = 1e-4
_STALE = ("torch_dtype", "transformers_version", "auto_map", "_name_or_path")


@dataclass(frozen=True, kw_only=True)
class Check:
    """How far transformers' logits lie from ours, both computed from the written weights."""

    dtype: str
    """In which transformers computes; ours are computed in fp32."""
    largest: float
    """Largest difference of two logits."""
    scale: float
    """Largest logit."""
    limit: float
    """Allowed, over the largest logit."""

    @property
    def passes(self) -> bool:
        return self.largest <= self.limit * self.scale  # not so for NaN


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written and how it compares."""

    output: Path
    dtype: str
    num_parameters: int
    num_bytes: int
    num_prompts: int
    num_tokens: int
    moved: float
    """How far merging and rounding to `dtype` moved a logit of ours, over the largest."""
    checks: tuple[Check, ...]


def export(
    source: Source,
    output: Path,
    *,
    dtype: str,
    prompts: tuple[str, ...],
    max_shard_gb: float,
    has_rows_apart: bool = False,
) -> Report:
    """Write `output`, complete or not at all; CheckError where transformers answers otherwise.

    `has_rows_apart`: new tokens stay `additional_*` beside the vocabulary of the base, whose
    tokenizer is written: transformers reads the base alone. ValueError where there are none.

    Needs 4 bytes of memory per parameter: our model is gone before transformers reads its own.
    """
    chosen = source.stored_dtype if dtype == AUTO else DTYPES[dtype]
    wide = torch.promote_types(source.stored_dtype, torch.float32)
    model = load_as_trained(source.folder, dtype=wide, device=torch.device("cpu"))
    apart = frozenset(new_rows(model)) if has_rows_apart else frozenset()
    if has_rows_apart and not apart:
        raise ValueError(f"new_tokens=apart has no effect: {source.folder} has none; leave it out")
    tokenizer = FileTokenizer(source.base) if apart else source.tokenizer
    config = written_config(source, model, has_rows_apart=bool(apart))
    longest = int(config.get("max_position_embeddings") or config.get("n_positions") or 1 << 30)
    asked = prompts_of(tokenizer, prompts, longest, idefics.num_logits(config))
    width = idefics.num_logits(config) if source.head == CAUSAL_LM else None
    exact = _logits(model, config, asked, width)
    merge(model)
    if not apart:
        merge_rows(model)
    config = idefics.spread_heads(model, config)
    with _staging(output) as staging:
        _cast(model, chosen)
        save_pretrained(staging, model, config, max_file_gb=max_shard_gb)
        _write_companions(staging, source, tokenizer, config)
        _cast(model, wide)
        ours = _logits(model, config, asked, width)
        num_parameters = sum(p.numel() for _, p in unique_parameters(model))
        del model  # before transformers reads its own
        check_tokenizer(staging, FileTokenizer(staging), asked)
        checks = tuple(_checks(staging, source, asked, ours, (wide, chosen), apart))
        report = Report(
            output=output, dtype=_name(chosen), num_parameters=num_parameters,
            num_bytes=sum(path.stat().st_size for path in staging.glob("*.safetensors")),
            num_prompts=len(asked), num_tokens=sum(len(prompt.ids) for prompt in asked),
            moved=_difference(ours, exact) / _scale(exact), checks=checks,
        )  # fmt: skip
        refuse_differences(report)
        write_card(staging, source, report)
    return report


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """Yield a folder that becomes `output` when all is well, and is gone when it is not."""
    staging = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in staging.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(staging)
        os.rename(staging, output)  # onto nothing, or onto an empty folder
        fsync_folder(output.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def written_config(
    source: Source, model: DecoderModel, *, has_rows_apart: bool = False
) -> dict[str, Any]:
    """Return config.json without what would be untrue of the export."""
    kept = {key: value for key, value in source.config.items() if key not in _STALE}
    if not has_rows_apart:
        rows = [model.get_parameter(name).shape[0] for name in new_rows(model)]
        kept["vocab_size"] += rows[0] if rows else 0
    pad = source.tokenizer.pad_token_id
    return {"pad_token_id": pad, **kept} if kept.get("pad_token_id") is None else kept


def _write_companions(
    staging: Path, source: Source, tokenizer: FileTokenizer, config: dict[str, Any]
) -> None:
    tokenizer.save(staging)
    idefics.copy_image_settings(source.folder, staging)
    if source.origins:
        write_json(staging / FILE, generation_config(tokenizer, config, source.origins))
        return
    keys = read_tokenizer_config(staging)
    pad = tokenizer.special_ids.get(config["pad_token_id"])
    if not keys.get("pad_token") and pad:  # classifiers are asked in batches
        write_json(staging / CONFIG_FILE, keys | {"pad_token": pad})


def _cast(model: DecoderModel, dtype: torch.dtype) -> None:
    """Give the weights another type in place, one at a time; buffers stay as they were computed."""
    for _, parameter in unique_parameters(model):
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def _logits(
    model: DecoderModel, config: dict[str, Any], prompts: list[Prompt], width: int | None
) -> list[Tensor]:
    """Return the first `width` of ours (None: all) of every prompt, flat."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        images = idefics.images_beside(config, ids.shape[1])
        logits = model(ids, torch.arange(ids.shape[1])[None], torch.ones_like(ids), **images)
        assert isinstance(logits, Tensor)
        found.append(logits[..., :width].flatten())
    return found


def _checks(
    folder: Path,
    source: Source,
    prompts: list[Prompt],
    ours: list[Tensor],
    dtypes: tuple[torch.dtype, ...],
    apart: frozenset[str],
) -> Iterator[Check]:
    for number, dtype in enumerate(dict.fromkeys(dtypes)):
        theirs, num_layers = reloaded_logits(folder, source, prompts, dtype, apart)
        yield Check(
            dtype=_name(dtype), largest=_difference(theirs, ours), scale=_scale(ours),
            limit=WIDE_LIMIT if number == 0 else rounding_limit(dtype, num_layers),
        )  # fmt: skip


def rounding_limit(dtype: torch.dtype, num_layers: int) -> float:
    """Return how far computing in `dtype` may move a logit, over the largest.

    Each layer rounds its two sums by half an eps at most. Roundings add up as a random walk does;
    4 times that, since the operands of the sums were rounded as well.
    """
    return 4 * torch.finfo(dtype).eps / 2 * float((2 * num_layers) ** 0.5)


def refuse_differences(report: Report) -> None:
    """Raise CheckError where weights or transformers answer otherwise than the checkpoint."""
    if not report.moved <= (allowed := report.checks[-1].limit):  # so NaN is refused too
        raise CheckError(
            f"merging and writing in {report.dtype} moved a logit by {report.moved:.1e} of the "
            f"largest, allowed {allowed:.1e}; nothing was kept; {_advice(report.dtype)}"
        )
    for check in report.checks:
        if not check.passes:
            raise CheckError(
                f"in {check.dtype} a logit of transformers differs from ours by "
                f"{check.largest:.3g}, allowed {check.limit * check.scale:.3g} (largest logit "
                f"{check.scale:.3g}); nothing was kept; {_advice(check.dtype)}"
            )


def _advice(dtype: str) -> str:
    if dtype in ("float16", "bfloat16"):
        return "this model needs dtype=fp32"
    return "transformers computes this model otherwise: please report it"


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest; NaN where one is, or where shapes differ."""
    if any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return float("nan")
    return float((torch.cat(found) - torch.cat(expected)).abs().max())


def _scale(logits: list[Tensor]) -> float:
    return float(torch.cat(logits).abs().max())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
