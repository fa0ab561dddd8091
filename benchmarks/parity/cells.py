"""The cells of the table: each returns the largest relative difference that it found."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.parity.oracle import (
    built,
    has_oracle,
    inputs,
    relative,
    their_inputs,
    theirs,
)
from models import heads
from models.nn.cache import Cache, GrowingCache, StaticCache
from trainer.pretrained import load_causal_lm, save_pretrained


def load(spec: Any) -> float:
    """transformers saves, we load."""
    other = theirs(spec, built(spec))
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        model = load_causal_lm(
            Path(folder),
            dtype=torch.float32,
            device=torch.device("cpu"),
            attn_implementation="eager",
        )
    batch = inputs(spec)
    return relative(model(**batch), other(**their_inputs(batch)).logits)


def save(spec: Any) -> float:
    """We save in several files, transformers loads: nothing missing, nothing unexpected."""
    import transformers

    model = built(spec)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Path(folder), model, spec.hf_config(), max_file_gb=2e-5)
        assert (Path(folder) / "model.safetensors.index.json").exists()
        (name,) = spec.hf_config()["architectures"]
        other, info = getattr(transformers, name).from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager"
        )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    batch = inputs(spec)
    return relative(other(**their_inputs(batch)).logits, model(**batch))


def logits(spec: Any) -> float:
    model, batch = built(spec), inputs(spec)
    return relative(model(**batch), theirs(spec, model)(**their_inputs(batch)).logits)


def gradients(spec: Any) -> float:
    """The loss is computed outside of both models; the worst parameter counts."""
    model, batch = built(spec), inputs(spec)
    other = theirs(spec, model)
    for result in (model(**batch), other(**their_inputs(batch)).logits):
        weights = torch.linspace(-1, 1, result.numel()).view(result.shape)
        (result * weights).sum().backward()
    expected = dict(other.named_parameters())
    worst = 0.0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or expected[name].grad is None:
            continue
        assert parameter.grad is not None, name
        if "vision_model" in name and name.endswith("k_proj.bias"):
            # Softmax does not see what all keys share: this gradient is zero but for rounding.
            assert parameter.grad.abs().max() < 1e-5
            continue
        worst = max(worst, relative(parameter.grad, expected[name].grad))
    return worst


def sequence_head(spec: Any) -> float:
    """Rows padded on the right and on the left; without an oracle, the linear written out."""
    model, batch = built(spec, heads.SEQUENCE), _padded(inputs(spec))
    found = model(**batch)[:, 0]
    if has_oracle(spec, heads.SEQUENCE):
        other = theirs(spec, model, heads.SEQUENCE)
        return relative(found, other(**their_inputs(batch)).logits)
    hidden = model.trunk(**batch)
    last = [int(row.nonzero().max()) for row in batch["segment_ids"]]
    rows = torch.stack([hidden[index, position] for index, position in enumerate(last)])
    return relative(found, rows @ model.head.weight.T)


def token_head(spec: Any) -> float:
    model, batch = built(spec, heads.TOKEN), _padded(inputs(spec))
    is_real = batch["segment_ids"] > 0
    found = model(**batch)[is_real]
    if has_oracle(spec, heads.TOKEN):
        other = theirs(spec, model, heads.TOKEN)
        return relative(found, other(**their_inputs(batch)).logits[is_real])
    return relative(found, F.linear(model.trunk(**batch), *model.head.parameters())[is_real])


def cache(spec: Any) -> float:
    """Prefill of 5 positions, then one by one, through both caches, against the full forward."""
    model, batch = built(spec), inputs(spec)
    full, length = model(**batch), batch["input_ids"].shape[1]
    layers = model.trunk.num_cached_layers
    caches: list[Cache] = [GrowingCache(layers), StaticCache(layers, length + 3)]
    worst = 0.0
    for store in caches:
        edges = [0, 5, *range(6, length + 1)]
        parts = [
            model(**_slice(batch, start, stop), cache=store) for start, stop in pairwise(edges)
        ]
        worst = max(worst, relative(torch.cat(parts, dim=1), full))
    return worst


def _slice(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {k: v if k == "pixel_values" else v[:, start:stop] for k, v in batch.items()}


def generate(spec: Any) -> float:
    """Greedy, 12 tokens after a left-padded batch of prompts; the share of tokens that differ."""
    from trainer.decoding import GenerationSpec
    from trainer.decoding import generate as ours

    if spec.model_type == "idefics":
        spec = replace(spec, additional_vocab_size=0)
    model, batch = built(spec), inputs(spec, length=7)
    prompts = [batch["input_ids"][0].tolist(), batch["input_ids"][1, 3:].tolist()]
    found = ours(model, prompts, GenerationSpec(max_new_tokens=12))
    return _share_of_differences(spec, model, prompts, found)


def _share_of_differences(
    spec: Any, model: Any, prompts: list[list[int]], found: list[list[int]]
) -> float:
    """Compare with the full forward of transformers, token by token, without any cache."""
    other, wrong, total = theirs(spec, model), 0, 0
    for prompt, result in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in result:
            batch: dict[str, Any] = {"input_ids": torch.tensor([ids]), "use_cache": False}
            if spec.model_type == "idefics":  # text only: one empty image that nobody looks at
                size = spec.vision_config.image_size
                batch["pixel_values"] = torch.zeros(1, 1, 3, size, size)
                batch["image_attention_mask"] = torch.zeros(1, len(ids), 1, dtype=torch.int64)
            expected = int(other(**batch).logits[0, -1].argmax())
            wrong, total = wrong + (token != expected), total + 1
            ids.append(expected)
    return wrong / total


def padded(spec: Any) -> float:
    """A row padded on the right and one padded on the left, real tokens only."""
    model, batch = built(spec), _padded(inputs(spec))
    is_real = batch["segment_ids"] > 0
    expected = theirs(spec, model)(**their_inputs(batch)).logits
    return relative(model(**batch)[is_real], expected[is_real])


def _padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    segments = batch["segment_ids"].clone()
    segments[0, -5:], segments[1, :4] = 0, 0
    positions = (segments.cumsum(1) - 1).clamp(min=0)
    ids = batch["input_ids"].where(segments > 0, 0)  # transformers finds the last token by its id
    return {**batch, "input_ids": ids, "segment_ids": segments, "position_ids": positions}


def packed(spec: Any) -> float:
    """Two documents in one row, in fp64, against transformers on each of them alone."""
    model = built(spec).double()
    other = theirs(spec, model).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in inputs(spec).items()}
    together = dict(batch)
    length = batch["input_ids"].shape[1]
    cut = length // 3
    segments = torch.ones_like(batch["segment_ids"])
    segments[:, cut:] = 2
    together["segment_ids"] = segments
    together["position_ids"] = torch.cat((torch.arange(cut), torch.arange(length - cut))).expand(
        2, -1
    )
    found, worst = model(**together), 0.0
    for start, stop in ((0, cut), (cut, length)):
        alone = _slice(batch, start, stop)
        alone["position_ids"] = torch.arange(stop - start).expand(2, -1)
        expected = other(**their_inputs(alone)).logits
        worst = max(worst, relative(found[:, start:stop], expected))
    return worst


CELLS: dict[str, tuple[Callable[[Any], float], float]] = {
    "load": (load, 1e-5),
    "save": (save, 1e-5),
    "logits": (logits, 1e-5),
    "gradients": (gradients, 1e-4),
    "sequence head": (sequence_head, 1e-5),
    "token head": (token_head, 1e-5),
    "cache": (cache, 1e-5),
    "generate": (generate, 0.0),
    "padded": (padded, 1e-5),
    "packed": (packed, 1e-5),
}
"""Column: (measurement, largest value that passes)."""
