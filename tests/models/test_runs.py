"""Cumulative lengths of segments: a loop over sequences equals eager; flash and varlen calls."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from models.nn import backends
from models.nn.backends import backend
from models.nn.dense import Eager, repeat_heads
from models.nn.flash import Flash, flash_problem
from models.nn.runs import TILE, Runs, pack, runs_of, unpack
from models.nn.segments import Segments
from models.nn.varlen import Varlen
from tests.models.test_attention import (
    CASES,
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


def varlen_loop(
    query_XNH: Tensor, key_YKH: Tensor, value_YKH: Tensor, runs: Runs, scale: float = SCALE
) -> Tensor:
    """One sequence at a time, as varlen kernels define it: causal masks aligned bottom-right."""
    out = torch.zeros_like(query_XNH)
    starts, key_starts = runs.cu_query.tolist(), runs.cu_key.tolist()
    for index in range(len(starts) - 1):
        queries = slice(starts[index], starts[index + 1])
        keys = slice(key_starts[index], key_starts[index + 1])
        q, k, v = (x.transpose(0, 1) for x in (query_XNH[queries], key_YKH[keys], value_YKH[keys]))
        assert q.shape[1] <= runs.max_query
        assert k.shape[1] <= runs.max_key
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        if runs.causal:
            mask = mask.tril(k.shape[1] - q.shape[1])
        mixed = Eager().attend(q[None], k[None], v[None], mask, dropout=0.0, scale=scale)
        out = torch.cat((out[: queries.start], mixed[0].transpose(0, 1), out[queries.stop :]))
    return out


def through_runs(segments: Segments, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    packed = [pack(x) for x in qkv]
    return unpack(varlen_loop(*packed, runs_of(segments)), len(qkv[0]))


def assert_runs_equal_eager(segments: Segments, heads: tuple[int, int] = (4, 2)) -> None:
    """Compare values of real queries, and the gradients that they cause."""
    qkv, is_read_BT = inputs(segments, heads), segments.query > 0
    expected = with_gradients(lambda x: attended(Eager(), segments, x), qkv, is_read_BT)
    found = with_gradients(lambda x: through_runs(segments, x), qkv, is_read_BT)
    assert_equal(found, expected, 1e-14)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_a_loop_over_sequences_equals_eager(case: str, heads: tuple[int, int]) -> None:
    assert_runs_equal_eager(CASES[case](), heads)


@pytest.mark.parametrize("case", CASES)
def test_every_token_is_in_one_sequence(case: str) -> None:
    segments = CASES[case]()
    runs = runs_of(segments)
    for starts, ids in ((runs.cu_query, segments.query), (runs.cu_key, segments.key)):
        assert starts.dtype == torch.int32
        assert starts[0] == 0
        assert starts[-1] == ids.numel()
        assert (starts.diff() >= 0).all()
    assert len(runs.cu_query) == len(runs.cu_key)
    assert runs.max_query == runs.max_key == TILE


def sorted_row(generator: torch.Generator, length: int) -> list[int]:
    return torch.randint(1, 6, (length,), generator=generator).sort().values.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_random_segments_equal_eager(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = [sorted_row(generator, 6) for _ in range(3)]
    key = [sorted_row(generator, 8) for _ in range(3)]
    assert_runs_equal_eager(within(*query))
    assert_runs_equal_eager(cross(query, key))
    start = seed % 5
    assert_runs_equal_eager(at_slots([row[start : start + 4] for row in key], key, start))


def test_one_padded_side_sees_itself_only_as_under_eager() -> None:
    segments = within([0, 0, 1, 1], [1, 1, 1, 0])
    qkv = inputs(segments)
    found = with_gradients(lambda x: through_runs(segments, x), qkv)
    assert_equal(found, with_gradients(lambda x: attended(Eager(), segments, x), qkv), 1e-14)


def test_sequences_without_queries_or_keys_stand_where_both_orders_allow() -> None:
    runs = runs_of(cross([[7, 1, 8, 2]], [[1, 1, 5, 2]]))
    assert runs.cu_query.diff().tolist() == [1, 1, 1, 0, 1]
    assert runs.cu_key.diff().tolist() == [0, 2, 0, 1, 1]


def test_unfilled_cache_slots_are_keys_without_queries() -> None:
    runs = runs_of(CASES["static cache, token"]())
    assert runs.cu_query.diff().tolist() == [1, 0, 0, 1, 0, 0, 0, 1, 0]
    assert runs.cu_key.diff().tolist() == [6, 5, 2, 4, 5, 1, 3, 2, 5]


def test_a_maximum_is_rounded_up_to_the_tile() -> None:
    runs = runs_of(Segments.within(torch.ones(1, TILE + 1, dtype=torch.int64)))
    assert runs.max_query == runs.max_key == 2 * TILE


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (within([1, 2, 1]), "not contiguous"),
        (within([3, 3, 3], [1, 2, 1], causal=False), "not contiguous"),
        (cross([[1, 1]], [[1, 2, 1]]), "not contiguous"),
        (cross([[1, 2, 1]], [[1, 2, 2]]), "not contiguous"),
        (cross([[1, 2]], [[2, 1]]), "different places"),
        (at_slots([[1, 1, 3]], [[1, 1, 1]], 0), "different places"),  # keys after its last query
        (at_slots([[2, 2]], [[2, 2, 1, 1]], 2), "different places"),  # has keys, not at its slot
        (
            Segments(
                query=torch.ones(1, 2, dtype=torch.int64),
                key=torch.ones(1, 4, dtype=torch.int64),
                causal=True,
                slots=torch.tensor([1, 3]),
            ),
            "different places",
        ),
    ],
)
def test_what_varlen_kernels_cannot_express_is_refused(segments: Segments, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*set attn_implementation to sdpa or flex"):
        runs_of(segments)


def flash_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """The signature of flash-attn 2.8; `dropout_p` is added to the result, to be seen."""
    runs = Runs(
        cu_query=cu_seqlens_q,
        cu_key=cu_seqlens_k,
        max_query=max_seqlen_q,
        max_key=max_seqlen_k,
        causal=causal,
    )
    assert softmax_scale is not None
    return varlen_loop(q, k, v, runs, softmax_scale) + dropout_p


def flash_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, None]:
    """The signature of flash-attn-4, which returns a pair."""
    assert cu_seqlens_q is not None
    assert cu_seqlens_k is not None
    assert max_seqlen_q is not None
    assert max_seqlen_k is not None
    out = flash_2(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, causal=causal,
    )  # fmt: skip
    return out, None


Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return what lays the records of an installed flash-attn, and its one function."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(distribution: str, version: str) -> None:
        folder = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {distribution}\nVersion: {version}\n")
        parent: Any = sys.modules.get("flash_attn") or ModuleType("flash_attn")
        monkeypatch.setitem(sys.modules, "flash_attn", parent)
        if distribution == "flash-attn":
            parent.flash_attn_varlen_func = flash_2
        else:
            cute: Any = ModuleType("flash_attn.cute")
            cute.flash_attn_varlen_func = flash_4
            monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)

    return add


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "versions", [{"flash-attn": "2.8.3.post2", "flash-attn-4": "4.0.0b36"}, {"flash-attn-4": "4.0"}]
)
def test_flash_calls_its_kernel_with_what_equals_eager(
    case: str, versions: dict[str, str], install: Install
) -> None:
    for name, version in versions.items():
        install(name, version)
    segments = CASES[case]()
    query, key, value = inputs(segments, dtype=torch.bfloat16)
    expected = attended(Eager(), segments, (query, key, value))
    found = attended(Flash(), segments, (query, key, value))
    is_read = (segments.query > 0)[:, None, :, None]
    assert_equal([found * is_read], [expected * is_read], 2e-2)  # bf16: 2 ** -8 of values below 4


def test_flash_2_is_taken_where_both_are_installed(install: Install) -> None:
    install("flash-attn-4", "4.0.0b36")
    assert Flash().kernel is flash_4
    install("flash-attn", "2.8.3")
    assert Flash().kernel is flash_2


def test_flash_2_gets_the_dropout(install: Install) -> None:
    install("flash-attn", "2.8.3")
    segments, flash = CASES["packed"](), Flash()
    qkv, runs = inputs(segments, dtype=torch.bfloat16), flash.prepare(segments)
    found = flash.attend(*qkv, runs, dropout=0.5, scale=SCALE)
    assert torch.equal(found, flash.attend(*qkv, runs, dropout=0.0, scale=SCALE) + 0.5)


@pytest.mark.parametrize(
    ("version", "capability", "is_refused"),
    [("4.0.0b36", (9, 0), True), ("4.0.0b36", (10, 0), False), ("2.8.3", (9, 0), False)],
)
def test_flash_4_is_deterministic_on_new_gpus_alone(
    version: str, capability: tuple[int, int], is_refused: bool, install: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    install("flash-attn-4" if version.startswith("4") else "flash-attn", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    Flash()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    if not is_refused:
        Flash()
        return
    with pytest.raises(ValueError, match=r"capability 10 or 11, found 9\.0; install flash-attn 2"):
        Flash()


def test_flash_4_refuses_dropout(install: Install) -> None:
    install("flash-attn-4", "4.0.0b36")
    segments, flash = CASES["packed"](), Flash()
    qkv = inputs(segments, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"attention_dropout=0\.5; set it to 0, or install"):
        flash.attend(*qkv, flash.prepare(segments), dropout=0.5, scale=SCALE)


def test_flash_and_varlen_refuse_fp32_instead_of_casting(install: Install) -> None:
    install("flash-attn", "2.8.3")
    segments = CASES["packed"]()
    for chosen in (Flash(), Varlen()):
        with pytest.raises(ValueError, match=r"float32 and computes in bfloat16 or float16 only"):
            attended(chosen, segments, inputs(segments, dtype=torch.float32))


def test_flash_is_refused_where_it_is_missing_or_old(install: Install) -> None:
    if flash_problem() is None:
        pytest.skip("flash-attn is installed")
    with pytest.raises(ValueError, match=r"not installed; run pip install 'tessera-train\[flash\]"):
        backend("flash")
    install("flash-attn", "2.7.4.post1")
    assert flash_problem() is not None
    with pytest.raises(ValueError, match=r"needs flash-attn >= 2\.8, and 2\.7\.4\.post1 is inst"):
        backend("flash")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_flash_and_varlen_are_refused_without_a_gpu(install: Install) -> None:
    install("flash-attn", "2.8.3")
    for name in ("flash", "varlen"):
        with pytest.raises(ValueError, match=r"needs a CUDA GPU.*set it to sdpa or auto"):
            backend(name)


def test_varlen_is_refused_under_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "VARLEN_TORCH", "99.1")
    with pytest.raises(ValueError, match=r"needs torch >= 99\.1, and 2\..* is installed; upgrade"):
        backend("varlen")


def test_varlen_refuses_dropout() -> None:
    segments, varlen = CASES["packed"](), Varlen()
    qkv = inputs(segments, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1; set it to 0"):
        varlen.attend(*qkv, varlen.prepare(segments), dropout=0.1, scale=SCALE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", HEADS)
def test_varlen_calls_its_kernel_with_what_equals_eager(
    case: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def kernel(*positional: Any, **named: Any) -> Tensor:
        given = signature.bind(*positional, **named).arguments
        query, key, value = given["query"], given["key"], given["value"]
        assert given["enable_gqa"] == (query.shape[1] != key.shape[1])
        runs = Runs(
            cu_query=given["cu_seq_q"],
            cu_key=given["cu_seq_k"],
            max_query=given["max_q"],
            max_key=given["max_k"],
            causal={(-1, 0): True, (-1, -1): False}[given["window_size"]],
        )
        return varlen_loop(query, key, value, runs, given["scale"])

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    segments = CASES[case]()
    qkv = inputs(segments, heads, torch.bfloat16)
    is_read = (segments.query > 0)[:, None, :, None]
    found, expected = attended(Varlen(), segments, qkv), attended(Eager(), segments, qkv)
    assert_equal([found * is_read], [expected * is_read], 2e-2)


def test_torch_accepts_the_call_of_its_varlen_kernel() -> None:
    """The real operator with its shapes and dtypes; only the arithmetic is left out."""
    segments = CASES["growing cache, chunk"]()
    runs = Varlen().prepare(segments)
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (torch.empty_like(x) for x in inputs(segments, dtype=torch.bfloat16))
        found = Varlen().attend(query, key, value, runs, dropout=0.0, scale=SCALE)
        assert found.shape == query.shape
        assert found.dtype == query.dtype


def test_repeated_heads_lie_next_to_each_other() -> None:
    key = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    query = torch.zeros(1, 4, 1, 1)
    assert repeat_heads(key, query).flatten().tolist() == [10, 10, 20, 20]
    assert repeat_heads(query, query) is query
