"""Every back-end under every mask against eager, and eager against a loop over queries."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from models.nn.backends import NAMES, Backend, automatic, backend
from models.nn.cache import Cache, GrowingCache, StaticCache
from models.nn.dense import Eager, Sdpa
from models.nn.flex import Flex
from models.nn.segments import Segments, dense_mask

HEADS = [(4, 4), (4, 2), (4, 1)]  # MHA, GQA, MQA
SIZE, SCALE = 8, 0.3
# Largest absolute differences of values and gradients of order 1: < 100 units in the last place.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-5}


def within(*rows: list[int], causal: bool = True) -> Segments:
    return Segments.within(torch.tensor(rows), causal=causal)


def cross(query: list[list[int]], key: list[list[int]]) -> Segments:
    slots = torch.zeros(len(query[0]), dtype=torch.int64)
    return Segments(query=torch.tensor(query), key=torch.tensor(key), causal=False, slots=slots)


def at_slots(query: list[list[int]], key: list[list[int]], start: int) -> Segments:
    slots = torch.arange(start, start + len(query[0]))
    return Segments(query=torch.tensor(query), key=torch.tensor(key), causal=True, slots=slots)


def extended(cache: Cache, *lengths: int) -> Segments:
    """Return the segments of the last of several calls: left-padded, and a row that is finished."""
    ids = torch.tensor([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0]])
    for end, length in zip(torch.tensor(lengths).cumsum(0).tolist(), lengths, strict=True):
        segments = cache.extend(ids[:, end - length : end])
    return segments


CASES: dict[str, Callable[[], Segments]] = {
    "causal": lambda: within([1] * 6, [1] * 6),
    "packed": lambda: within([1, 1, 1, 2, 2, 3, 3, 3], [4, 5, 5, 5, 5, 5, 0, 0]),
    "packed both ways": lambda: within([1, 1, 2, 2, 2], [1, 2, 2, 0, 0], causal=False),
    "left padded": lambda: within([0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]),
    "right padded": lambda: within([1, 1, 1, 0, 0], [1, 0, 0, 0, 0]),
    "padded on both sides": lambda: within([0, 1, 1, 0, 0], [0, 0, 1, 2, 0]),
    "key mask": lambda: cross([[1] * 5, [1] * 5], [[1, 1, 1, 0, 0, 0], [1] * 6]),
    "left padded keys": lambda: cross([[1, 1, 0], [0, 1, 1]], [[0, 0, 1, 1], [1, 1, 1, 0]]),
    "queries without keys": lambda: cross(
        [[7, 7, 1, 8, 2, 9], [1, 1, 1, 1, 1, 1]], [[1, 1, 5, 6, 6, 2, 2], [0, 0, 0, 2, 2, 2, 2]]
    ),
    "causal queries without keys": lambda: at_slots([[9, 1, 1]], [[3, 3, 2, 1, 1]], 2),
    "queries before later keys": lambda: at_slots(
        [[1, 1, 2], [3, 3, 3]], [[1, 1, 1, 2, 2, 2], [3, 3, 3, 3, 3, 3]], 1
    ),
    "growing cache, first call": lambda: extended(GrowingCache(1), 4),
    "growing cache, chunk": lambda: extended(GrowingCache(1), 3, 4),
    "growing cache, token": lambda: extended(GrowingCache(1), 4, 1, 1),
    "static cache, first call": lambda: extended(StaticCache(1, 11), 4),
    "static cache, chunk": lambda: extended(StaticCache(1, 11), 3, 4),
    "static cache, token": lambda: extended(StaticCache(1, 11), 4, 1, 1),
}


def inputs(
    segments: Segments,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of order 1."""
    generator = torch.Generator().manual_seed(seed)
    (batch, length), width = segments.query.shape, segments.key.shape[1]
    shapes = [(heads[0], length), (heads[1], width), (heads[1], width)]
    return tuple(
        torch.randn(batch, *shape, SIZE, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    )  # type: ignore[return-value]


def attended(chosen: Backend, segments: Segments, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return chosen.attend(*qkv, chosen.prepare(segments), dropout=0.0, scale=SCALE)


def with_gradients(
    attend: Callable[[tuple[Tensor, Tensor, Tensor]], Tensor],
    qkv: tuple[Tensor, Tensor, Tensor],
    is_read_BT: Tensor | None = None,
) -> list[Tensor]:
    """Return the output and the gradients of query, key and value; those of unread queries 0."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in qkv)
    out = attend(leaves)  # type: ignore[arg-type]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    if is_read_BT is not None:
        weight = weight * is_read_BT[:, None, :, None]
        out = out * is_read_BT[:, None, :, None]
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, ours, theirs in zip(
        ("output", "query", "key", "value"), found, expected, strict=False
    ):
        assert ours.dtype == theirs.dtype
        assert ours.isfinite().all(), name
        difference = float((ours - theirs).abs().max())
        assert difference <= tolerance, f"{name}: {difference}"


def loop(qkv: tuple[Tensor, Tensor, Tensor], mask_BTS: Tensor) -> Tensor:
    """The definition: one query at a time over the keys it may look at; zeros without any."""
    query, key, value = qkv
    groups = query.shape[1] // key.shape[1]
    out = []
    for row, head, position in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        seen = mask_BTS[row, position]
        scores = key[row, head // groups, seen] @ query[row, head, position] * SCALE
        exps = (scores - scores.max()).exp() if seen.any() else scores
        weights = exps / exps.sum()
        out.append(weights @ value[row, head // groups, seen])
    return torch.stack(out).view(query.shape)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    """Each test compiles its own shapes: together they are more than torch keeps."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_eager_equals_a_loop_over_queries(case: str, heads: tuple[int, int]) -> None:
    segments = CASES[case]()
    qkv, mask_BTS = inputs(segments, heads), dense_mask(segments)[:, 0]
    expected = with_gradients(lambda x: loop(x, mask_BTS), qkv)
    assert_equal(with_gradients(lambda x: attended(Eager(), segments, x), qkv), expected, 1e-14)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_sdpa_equals_eager(case: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    segments = CASES[case]()
    qkv, is_read_BT = inputs(segments, heads, dtype), segments.query > 0
    expected = with_gradients(lambda x: attended(Eager(), segments, x), qkv, is_read_BT)
    found = with_gradients(lambda x: attended(Sdpa(), segments, x), qkv, is_read_BT)
    assert_equal(found, expected, TOLERANCES[dtype])


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("case", CASES)
def test_flex_equals_eager_forward(case: str) -> None:
    segments = CASES[case]()
    qkv = inputs(segments)
    assert_equal([attended(Flex(), segments, qkv)], [attended(Eager(), segments, qkv)], 1e-14)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("heads", [HEADS[0], HEADS[2]])
def test_flex_equals_eager_for_other_heads_and_fp32(heads: tuple[int, int]) -> None:
    segments = CASES["packed"]()
    qkv = inputs(segments, heads, torch.float32)
    assert_equal([attended(Flex(), segments, qkv)], [attended(Eager(), segments, qkv)], 1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_flex_compiles_once_for_many_masks_of_one_shape() -> None:
    flex, eager = Flex(), Eager()
    first, second = within([1, 1, 2, 2]), within([0, 3, 3, 3])
    attended(flex, first, inputs(first))
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = attended(flex, second, inputs(second))
    assert_equal([found], [attended(eager, second, inputs(second))], 1e-14)


@pytest.mark.usefixtures("_fresh_compiler")
def test_flex_decodes_with_a_growing_cache_on_few_graphs() -> None:
    flex, cache = Flex(), GrowingCache(1)
    for step in range(14):  # more lengths than torch compiles a function for
        segments = cache.extend(torch.ones(2, 5 if step == 0 else 1, dtype=torch.int64))
        qkv = inputs(segments)
        assert_equal([attended(flex, segments, qkv)], [attended(Eager(), segments, qkv)], 1e-14)


@pytest.mark.usefixtures("_fresh_compiler")
def test_flex_serves_training_evaluation_and_generation_in_one_process() -> None:
    flex = Flex()
    shapes = [(4, 9, 9), (2, 5, 5), (1, 6, 6), (1, 200, 200), (3, 200, 200), (1, 1, 7), (2, 1, 7)]
    for causal in (True, False):
        for batch, length, width in shapes:
            key = torch.ones(batch, width, dtype=torch.int64)
            slots = torch.arange(width - length, width)
            segments = Segments(query=key[:, :length], key=key, causal=causal, slots=slots)
            qkv = inputs(segments)
            assert_equal([attended(flex, segments, qkv)], [attended(Eager(), segments, qkv)], 1e-14)


@pytest.mark.usefixtures("_fresh_compiler")
def test_flex_stands_inside_a_compiled_block() -> None:
    flex, segments = Flex(), CASES["packed"]()
    mask = flex.prepare(segments)

    @torch.compile(backend="eager", fullgraph=True)
    def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flex.attend(query, key, value, mask, dropout=0.0, scale=SCALE) * 2

    qkv = inputs(segments)
    assert_equal([block(*qkv)], [attended(Eager(), segments, qkv) * 2], 1e-14)


@pytest.mark.parametrize("leaf", range(3))
def test_flex_on_the_cpu_refuses_gradients(leaf: int) -> None:
    segments = CASES["causal"]()
    qkv = inputs(segments)
    qkv[leaf].requires_grad_()
    with pytest.raises(ValueError, match=r"no backward pass.*set attn_implementation to sdpa"):
        attended(Flex(), segments, qkv)


def test_flex_refuses_dropout() -> None:
    segments = CASES["causal"]()
    flex = Flex()
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1; set it to 0"):
        flex.attend(*inputs(segments), flex.prepare(segments), dropout=0.1, scale=SCALE)


@pytest.mark.parametrize("chosen", [Eager(), Sdpa(has_dropout=True)])
def test_dropout_zeroes_its_share_of_weights_and_scales_the_others(chosen: Backend) -> None:
    torch.manual_seed(0)
    length, dropout = 128, 0.25
    query = key = torch.zeros(2, 2, length, length, dtype=torch.float64)
    value = torch.eye(length, dtype=torch.float64).expand(2, 2, -1, -1)  # shows the weights
    segments = Segments.within(torch.ones(2, length, dtype=torch.int64), causal=False)
    mask = chosen.prepare(segments)
    weights = chosen.attend(query, key, value, mask, dropout=dropout, scale=1.0)
    kept = weights != 0
    torch.testing.assert_close(
        weights[kept] * length, torch.full_like(weights[kept], 1 / (1 - dropout))
    )
    sigma = math.sqrt(dropout * (1 - dropout) / weights.numel())
    assert abs(1 - float(kept.double().mean()) - dropout) < 4 * sigma
    again = chosen.attend(query, key, value, mask, dropout=dropout, scale=1.0)
    assert not torch.equal(weights, again)


def test_auto_is_sdpa_on_the_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: tests/gpu says what auto picks")
    assert automatic() == "sdpa"
    assert isinstance(backend("auto"), Sdpa)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"'fast' is unknown.*{', '.join(NAMES)}"):
        backend("fast")


def test_flex_refuses_float64_where_kernels_add_up_in_float32() -> None:
    qkv = [x.to("meta") for x in inputs(CASES["causal"]())]
    mask: Any = None
    with pytest.raises(ValueError, match=r"got torch.float64.*set attn_implementation to sdpa"):
        Flex().attend(*qkv, mask, dropout=0.0, scale=SCALE)


@pytest.mark.usefixtures("_fresh_compiler")
def test_flex_is_compiled_where_blocks_are_not() -> None:
    """As for logits of a run with engine.compile=true."""
    segments = CASES["packed"]()
    qkv = inputs(segments)
    counters.clear()
    with torch.compiler.set_stance("force_eager"):
        found = attended(Flex(), segments, qkv)
    assert counters["stats"]["unique_graphs"] == 1
    assert_equal([found], [attended(Eager(), segments, qkv)], 1e-14)
