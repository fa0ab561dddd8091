"""Every back-end on CUDA against eager in fp32, and their times: `pytest -s tests/gpu`."""

import pytest
import torch
from torch import Tensor

from models.nn.backends import automatic, backend
from models.nn.dense import Eager
from models.nn.flash import flash_problem
from models.nn.segments import Segments
from tests.models.test_attention import CASES, HEADS, with_gradients

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU"),
    # The compilers behind torch.compile warn of their own deprecations.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]
NAMES = ["sdpa", "flex", "varlen", "flash"]
SIZE, SCALE = 64, 64**-0.5
# Largest difference over largest value. Weights and values are rounded to bf16 (2 ** -9) in every
# product; the gradients are products of products.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


def chosen(name: str) -> object:
    if name == "flash" and (problem := flash_problem()):
        pytest.skip(problem)
    return backend(name)


def moved(segments: Segments) -> Segments:
    """Return the segments on the GPU; queries that are the keys stay so."""
    key = segments.key.cuda()
    query = key if segments.is_self else segments.query.cuda()
    slots = segments.slots.cuda()
    return Segments(query=query, key=key, causal=segments.causal, slots=slots)


def inputs(segments: Segments, heads: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    (batch, length), width = segments.query.shape, segments.key.shape[1]
    shapes = [(heads[0], length), (heads[1], width), (heads[1], width)]
    return tuple(
        torch.randn(batch, *shape, SIZE, generator=generator).to("cuda", dtype) for shape in shapes
    )


def run(
    attention: object, segments: Segments, qkv: tuple[Tensor, ...], *, is_read: Tensor
) -> list[Tensor]:
    mask = attention.prepare(segments)  # type: ignore[attr-defined]
    return with_gradients(
        lambda x: attention.attend(*x, mask, dropout=0.0, scale=SCALE),  # type: ignore[attr-defined]
        qkv,  # type: ignore[arg-type]
        is_read,
    )


def assert_near_eager(
    name: str, segments: Segments, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    torch._dynamo.reset()
    torch.backends.cuda.matmul.allow_tf32 = False
    is_read, qkv = segments.query > 0, inputs(segments, heads, dtype)
    wide = tuple(x.float() for x in qkv)
    expected = run(Eager(), segments, wide, is_read=is_read)
    found = run(chosen(name), segments, qkv, is_read=is_read)
    for part, ours, theirs in zip(
        ("output", "query", "key", "value"), found, expected, strict=True
    ):
        assert ours.dtype == dtype
        assert ours.isfinite().all(), part
        # A part that eager has at 0 must be 0: the 1e-6 lets nothing else pass.
        allowed = TOLERANCES[dtype] * float(theirs.abs().max()) + 1e-6
        difference = float((ours.float() - theirs).abs().max())
        assert difference <= allowed, f"{part}: {difference} > {allowed}"
    keyless = ~(segments.query[:, :, None] == segments.key[:, None]).any(-1) & is_read
    for zeros in (found[0], found[1]):
        assert not zeros.transpose(1, 2)[keyless].any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_in_bf16_is_near_eager(name: str, case: str) -> None:
    assert_near_eager(name, moved(CASES[case]()), (4, 2), torch.bfloat16)


@pytest.mark.parametrize("heads", [HEADS[0], HEADS[2]])
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_with_other_heads_is_near_eager(name: str, heads: tuple[int, int]) -> None:
    assert_near_eager(name, moved(CASES["packed"]()), heads, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_over_many_blocks_is_near_eager(name: str) -> None:
    lengths = torch.tensor([300, 1, 129, 128, 442])
    row = torch.arange(1, 6).repeat_interleave(lengths)
    ids = torch.stack((row, torch.where(row == 5, 0, row)))
    assert_near_eager(name, moved(Segments.within(ids)), (4, 2), torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
def test_sdpa_in_fp32_is_eager(case: str) -> None:
    assert_near_eager("sdpa", moved(CASES[case]()), (4, 2), torch.float32)


def test_flex_holds_no_scores_where_blocks_are_not_compiled() -> None:
    """As for logits of a run with engine.compile=true."""
    torch._dynamo.reset()
    segments = Segments.within(torch.ones(1, 8192, dtype=torch.int64, device="cuda"))
    qkv = inputs(segments, (4, 2), torch.bfloat16)
    attention = chosen("flex")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        mask = attention.prepare(segments)  # type: ignore[attr-defined]
        attention.attend(*qkv, mask, dropout=0.0, scale=SCALE)  # type: ignore[attr-defined]
    assert (
        torch.cuda.max_memory_allocated() - before < 8192 * 8192
    )  # a byte of each score of a head


def test_auto_is_flash_where_it_is_installed_and_else_flex() -> None:
    assert (automatic(), automatic(dropout=0.1)) == ("flex", "sdpa")


@pytest.mark.parametrize("name", NAMES)
def test_times_of_a_packed_row_are_printed(name: str) -> None:
    """16 query and 4 key/value heads of 64, 8 sequences in 8,192 tokens, bf16."""
    attention = chosen(name)
    ids = torch.arange(1, 9, device="cuda").repeat_interleave(1024)[None]
    segments = Segments.within(ids)
    query, key, value = (x.requires_grad_() for x in inputs(segments, (16, 4), torch.bfloat16))
    mask = attention.prepare(segments)  # type: ignore[attr-defined]
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    times = []
    for _ in range(8):
        start.record()
        out = attention.attend(  # type: ignore[attr-defined]
            query, key, value, mask, dropout=0.0, scale=SCALE
        )
        middle.record()
        torch.autograd.grad(out.sum(), (query, key, value))
        end.record()
        end.synchronize()
        times.append((start.elapsed_time(middle), middle.elapsed_time(end)))
    forward, backward = min(times[3:])  # the first ones compile and warm up
    print(f"\n{name}: forward {forward:.3f} ms, backward {backward:.3f} ms")
    assert out.isfinite().all()
