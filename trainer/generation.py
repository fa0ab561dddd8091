"""Sampling from a model in training, without a cache: the same text on every rank."""

from collections.abc import Sequence

import torch

from models.nn.head import IGNORED
from trainer.batch import Batch
from trainer.decoding import choose
from trainer.protocols import Engine


def sample(
    engine: Engine,
    prompt: list[int],
    *,
    num_tokens: int,
    temperature: float,
    max_context: int,
    stop_token_id: int | None,
    seed: int,
    virtual_ids: Sequence[int] = (),
) -> list[int]:
    """Return `prompt` and up to `num_tokens` more ids; temperature 0 takes the likeliest one.

    `virtual_ids` stand before what the model still sees of them. Collective: every rank must call
    this with the same arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, room = list(prompt), max_context - len(virtual_ids)
    for _ in range(num_tokens):
        logits_BV = engine.logits(_batch([*virtual_ids, *ids[-room:]]))[:, -1].double().cpu()
        ids += choose(logits_BV, [generator], temperature=temperature)
        if ids[-1] == stop_token_id:
            break
    return ids


def _batch(ids: list[int]) -> Batch:
    input_ids = torch.tensor([ids])
    return Batch(
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORED),
        position_ids=torch.arange(len(ids))[None],
        segment_ids=torch.ones_like(input_ids),
        provenance=("prompt",),
    )
