"""Attention over exchanged heads against attention in one process, and against DeepSpeed's."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.nn.backends import Backend
from models.nn.dense import Sdpa
from models.nn.segments import Segments
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from trainer.distributed import Placement, Ranks
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.parallel.context_parallel import own_tokens
from trainer.parallel.ulysses import Ulysses

import_deepspeed("cpu")  # once, not in every rank

BATCH, TOKENS, QUERIES, SIZE, SCALE = 2, 16, 4, 8, 0.3
SEGMENTS = torch.tensor([[1] * 5 + [2] * 8 + [0] * 3, [1] * 2 + [2] * 3 + [3] * 11])
TOLERANCE = 1e-13  # largest absolute difference of values and gradients of order 1, in fp64


def made(keys: int) -> list[Tensor]:
    """Return queries, keys, values and the gradient of the result, for whole rows."""
    random = torch.Generator().manual_seed(keys)
    return [
        torch.randn(BATCH, heads, TOKENS, SIZE, generator=random, dtype=torch.float64)
        for heads in (QUERIES, keys, keys, QUERIES)
    ]


def attended(backend: Backend, inputs: list[Tensor], segments_BT: Tensor) -> list[Tensor]:
    """Return values and the gradients of the three inputs."""
    *leaves, grad = [x.clone() for x in inputs]
    for leaf in leaves:
        leaf.requires_grad_()
    mask = backend.prepare(Segments.within(segments_BT))
    query, key, value = leaves
    result = backend.attend(query, key, value, mask, dropout=0.0, scale=SCALE)
    result.backward(grad)
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    assert len(found) == len(expected) == 4
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))


def own(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's tokens of (B, N, T, H)."""
    return own_tokens(x.transpose(1, 2), group).transpose(1, 2)


def ulysses_gap(placement: Placement, keys: int) -> float:
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    group = dist.group.WORLD
    assert group is not None
    expected = attended(Sdpa(), made(keys), SEGMENTS)
    shares = [own(x, group) for x in made(keys)]
    found = attended(Ulysses(Sdpa(), group), shares, own_tokens(SEGMENTS, group))
    ranks.barrier()
    return gap(found, [own(x, group) for x in expected])


@pytest.mark.parametrize(("ranks", "keys"), [(2, 4), (2, 2), (2, 1), (4, 4), (4, 2), (4, 1)])
def test_exchanged_heads_attend_as_whole_rows_do(ranks: int, keys: int) -> None:
    assert max(run_ranks(ranks, ulysses_gap, keys)) <= TOLERANCE


def deepspeed_gap(placement: Placement, keys: int) -> float:
    from deepspeed.sequence.layer import DistributedAttention

    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    import deepspeed

    deepspeed.init_distributed("gloo", dist_init_required=False)
    mask = Sdpa().prepare(Segments.within(SEGMENTS))

    def whole(*inputs_BTNH: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in inputs_BTNH)
        mixed = Sdpa().attend(query, key, value, mask, dropout=0.0, scale=SCALE)
        return mixed.transpose(1, 2)

    attention = DistributedAttention(whole, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    *leaves, grad = [
        x.transpose(1, 2).chunk(placement.world_size, 1)[placement.rank].clone()
        for x in made(keys)
    ]  # fmt: skip
    for leaf in leaves:
        leaf.requires_grad_()
    result = attention(*leaves, 0)
    result.backward(grad)
    found = [result.detach(), *(leaf.grad for leaf in leaves)]
    expected = [
        x.transpose(1, 2).chunk(placement.world_size, 1)[placement.rank]
        for x in attended(Sdpa(), made(keys), SEGMENTS)
    ]
    ranks.barrier()
    return gap(found, expected)


@pytest.mark.parametrize("keys", [4, 2])
def test_deepspeeds_own_attention_gives_the_same(keys: int) -> None:
    assert max(run_ranks(2, deepspeed_gap, keys)) <= TOLERANCE
