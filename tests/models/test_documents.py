"""Attention by document on a CPU against eager with its dense mask, over random segmentations."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.nn.blocked_attention import BLOCK, blocked_gradients, blocked_mixture
from models.nn.dense import Eager, Sdpa
from models.nn.document_attention import OPERATION
from models.nn.documents import TILE, Documents, Layout, documents_of, padded_lengths
from models.nn.segments import Segments
from tests.models.test_attention import (
    HEADS,
    SCALE,
    assert_equal,
    at_slots,
    attended,
    cross,
    inputs,
    with_gradients,
    within,
)

# Largest absolute differences of values and gradients of order 1: < 100 units in the last place.
EXACT = 1e-13
# Relative, of norms. fp32 keeps a score of 30 to 2e-6. bf16 has 8 bits: each result and each weight
# is rounded by up to 0.4 %; torch's own gradients of keys and values are off by 0.5 %.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 1.2e-2}


def rows(*documents: list[int], length: int) -> Tensor:
    """Return (B, length) segments: in each row documents of these lengths, then padding.

    A negative length is padding.
    """
    found = torch.zeros(len(documents), length, dtype=torch.int64)
    for row, lengths in zip(found, documents, strict=True):
        start = 0
        for number, size in enumerate(lengths, start=1):
            row[start : start + abs(size)] = number if size > 0 else 0
            start += abs(size)
    return found


@st.composite
def segmentations(draw: st.DrawFn) -> Tensor:
    """Rows of documents and padding anywhere, of one token and more, up to two tiles and a half."""
    length = draw(st.integers(1, TILE * 5 // 2))
    sizes = st.lists(
        st.one_of(st.integers(1, 4), st.integers(-6, -1), st.integers(1, length)), max_size=8
    )
    return rows(*draw(st.lists(sizes, min_size=1, max_size=3)), length=length)


def both(
    segments: Segments, qkv: tuple[Tensor, Tensor, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return values and gradients by document, and those of eager in fp64."""
    is_read, sdpa = segments.query > 0, Sdpa()
    assert isinstance(sdpa.prepare(segments), Documents)
    wide = tuple(x.double() for x in qkv)
    expected = with_gradients(lambda x: attended(Eager(), segments, x), wide, is_read)  # type: ignore[arg-type]
    return with_gradients(lambda x: attended(sdpa, segments, x), qkv, is_read), expected


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, ours, theirs in zip(
        ("output", "query", "key", "value"), found, expected, strict=True
    ):
        difference = (ours.double() - theirs).norm()
        assert difference <= tolerance * theirs.norm(), f"{name}: {difference / theirs.norm()}"


@settings(max_examples=150, deadline=None)
@given(
    segments_BT=segmentations(), causal=st.booleans(), heads=st.sampled_from(HEADS),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_random_documents_equal_eager(
    segments_BT: Tensor, causal: bool, heads: tuple[int, int], seed: int
) -> None:
    segments = Segments.within(segments_BT, causal=causal)
    found, expected = both(segments, inputs(segments, heads, seed=seed))
    assert_equal(found, expected, EXACT)


LONG = rows([200, 1, 33, 129, 128], [17] * 30, [512], [], [-5, 300, -100, 64, 32], length=512)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_long_and_short_documents_are_near_eager(
    dtype: torch.dtype, causal: bool, heads: tuple[int, int], spread: float
) -> None:
    segments = Segments.within(LONG, causal=causal)
    query, key, value = inputs(segments, heads, dtype)
    found, expected = both(segments, (query * spread, key * spread, value))
    assert_near(found, expected, TOLERANCES[dtype])


def test_whole_rows_in_bf16_are_near_eager_beyond_what_is_blocked() -> None:
    for length in (3 * BLOCK, 2048):
        segments = Segments.within(torch.ones(2, length, dtype=torch.int64))
        found, expected = both(segments, inputs(segments, dtype=torch.bfloat16))
        assert_near(found, expected, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_products_give_what_eager_gives(length: int, causal: bool, heads: tuple[int, int]) -> None:
    segments = Segments.within(torch.ones(3, length, dtype=torch.int64), causal=causal)
    qkv = inputs(segments, heads)
    expected = with_gradients(lambda x: attended(Eager(), segments, x), qkv)
    gradient = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1)).double()
    scores = qkv[0] @ qkv[1].repeat_interleave(heads[0] // heads[1], 1).transpose(2, 3) * SCALE
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
    mixed, log_sums = blocked_mixture(*qkv, causal, SCALE)
    assert_equal([log_sums], [scores.logsumexp(-1)], EXACT)
    found = blocked_gradients(gradient, *qkv, log_sums, causal, SCALE)
    assert_equal([mixed, *found], expected, EXACT)


def test_padding_gets_zeros_and_gives_no_gradient() -> None:
    segments = Segments.within(rows([-3, 4, -2, 1], [], length=12))
    found = with_gradients(lambda x: attended(Sdpa(), segments, x), inputs(segments))
    assert torch.equal((found[0] == 0).all(-1).all(1), segments.query == 0)
    for gradient in found[1:]:
        assert not gradient.transpose(1, 2)[segments.query == 0].any()
        assert gradient.any()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("size", "length"), [(45, 256), (300, 512)])  # torch's kernel, products
def test_no_neighbour_changes_a_bit_of_a_document(
    size: int, length: int, dtype: torch.dtype
) -> None:
    """Nor does its place, or how many others there are: alone in a batch it is the same."""
    alone = Segments.within(rows([size], length=length))
    near = size - 2  # padded to the same length
    packed = rows([100, size, 60], [7] * 30, [near], [near], [length], length=length)
    own = slice(100, 100 + size)
    ours, others = (
        inputs(alone, dtype=dtype, seed=1),
        inputs(Segments.within(packed), dtype=dtype),
    )
    for mine, all_of_them in zip(ours, others, strict=True):
        all_of_them[:1, :, own] = mine[:, :, :size]
    expected = _with_gradients_alike(alone, ours, slice(0, size))
    found = _with_gradients_alike(Segments.within(packed), others, own)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[:1, :, own], other[:, :, :size])


def _with_gradients_alike(
    segments: Segments, qkv: tuple[Tensor, Tensor, Tensor], own: slice
) -> list[Tensor]:
    """Return values and gradients, where the document at `own` is given the same gradient."""
    leaves = tuple(x.clone().requires_grad_() for x in qkv)
    out = attended(Sdpa(), segments, leaves)  # type: ignore[arg-type]
    weight = torch.ones_like(out)
    part = weight[:1, :, own]
    generator = torch.Generator().manual_seed(2)
    part.copy_(torch.randn(part.shape, generator=generator))
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def test_what_documents_do_not_express_has_a_mask() -> None:
    for segments in (
        within([1, 2, 1]),
        cross([[1, 1]], [[1, 1, 0]]),
        at_slots([[1]], [[1, 1]], 1),
    ):
        assert documents_of(segments) is None
        assert isinstance(Sdpa().prepare(segments), Tensor)
    assert isinstance(Sdpa(has_dropout=True).prepare(within([1, 1])), Tensor)


@pytest.mark.parametrize("causal", [True, False])
def test_shapes_depend_on_the_batch_alone(causal: bool) -> None:
    shapes = set()
    for segments_BT in (
        rows([96], [96], length=96), rows([1] * 96, [], length=96), rows([], [], length=96)
    ):  # fmt: skip
        documents = documents_of(Segments.within(segments_BT, causal=causal))
        assert documents is not None
        shapes.add((documents.tokens.shape, documents.places.shape, documents.sizes.shape))
    assert len(shapes) == 1


def test_a_padded_document_is_less_than_twice_as_long() -> None:
    for length in (1, 5, TILE, TILE + 1, 100, 1000):
        lengths = padded_lengths(length, causal=True)
        assert lengths == sorted(set(lengths))
        assert lengths[-1] == length
        for size in range(1, length + 1):
            assert next(each for each in lengths if each >= size) < 2 * size


def test_rows_of_one_document_are_not_moved() -> None:
    whole = documents_of(within([1] * 8, [1] * 8))
    assert whole is not None
    layout = Layout.of(whole.tokens, whole.places, whole.sizes, rows=2, causal=True)
    x_BTNH = torch.randn(2, 8, 3, 4)
    (part,) = layout.apart(x_BTNH.transpose(1, 2))
    assert part.data_ptr() == x_BTNH.data_ptr()
    assert torch.equal(part, x_BTNH.transpose(1, 2))
    moved = documents_of(within([0] + [1] * 7, [1] * 7 + [0]))
    assert moved is not None
    layout = Layout.of(moved.tokens, moved.places, moved.sizes, rows=2, causal=True)
    assert not layout.is_in_order  # both are padded to whole rows, yet stand elsewhere


def test_other_documents_make_no_other_graph() -> None:
    torch._dynamo.reset()
    sdpa, graphs = Sdpa(), []

    def note(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    @partial(torch.compile, backend=note, fullgraph=True)
    def block(query: Tensor, key: Tensor, value: Tensor, mask: Documents) -> Tensor:
        return sdpa.attend(query, key, value, mask, dropout=0.0, scale=SCALE) * 2

    for lengths in ([64], [1] * 64, [30, 30], []):
        segments = Segments.within(rows(lengths, [64], length=64))
        qkv, mask = inputs(segments), sdpa.prepare(segments)
        assert isinstance(mask, Documents)
        expected = [2 * x for x in with_gradients(lambda x: attended(sdpa, segments, x), qkv)]  # noqa: B023
        found = with_gradients(lambda x: block(*x, mask), qkv)  # noqa: B023
        assert_equal(found, expected, EXACT)
    assert len(graphs) == 1
    torch._dynamo.reset()


# torch 2.14 looks at gradients of what is no leaf, and warns of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_operation_is_what_torch_takes_it_for() -> None:
    """Its fake results have the real shapes and strides, and its gradient is registered rightly."""
    for segments in (within([1, 1, 2], [3, 0, 0]), within([1, 1, 1], [1, 1, 1], causal=False)):
        documents = documents_of(segments)
        assert documents is not None
        qkv = [x.requires_grad_() for x in inputs(segments)]
        given = (documents.tokens, documents.places, documents.sizes, documents.causal, SCALE)
        torch.library.opcheck(OPERATION, (*qkv, *given))


def test_flops_are_those_of_the_documents() -> None:
    segments = Segments.within(rows([64, 32, 32], [100], length=128))
    qkv = [x.requires_grad_() for x in inputs(segments)]
    with FlopCounterMode(display=False) as counter:
        attended(Sdpa(), segments, tuple(qkv)).sum().backward()  # type: ignore[arg-type]
    pairs = 64**2 + 2 * 32**2 + 128**2  # 100 tokens are padded to the row
    assert counter.get_total_flops() == (2 + 5) * 2 * pairs * qkv[0].shape[1] * qkv[0].shape[3]
