"""Meshes that a model cannot be laid out on are refused with the legal choices."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parity.oracle import specs
from models.nn.flash import Flash
from models.nn.varlen import Varlen
from tests.conftest import tiny_spec
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.engines.native import NativeEngine
from trainer.parallel.legal import check_axes, check_gradients
from trainer.precision import PRECISIONS
from trainer.verify.forked import RankFailedError
from trainer.verify.shrink import shrink_spec

PLAIN = {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}


def check(
    spec: Any, *, chunks: int = 1, tokens: int = 32, micro_batches: int | None = 4, **axes: int
) -> None:
    with torch.device("meta"):
        model = spec.build_causal_lm(chunk_tokens=8)
    check_axes(
        model, spec.layout, PLAIN | axes, sequence=True, chunks=chunks, row_tokens=tokens,
        micro_batches=micro_batches,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        (tiny_spec(), {"tp": 3}, r"mesh.tp=3 does not divide the .*; set it to one of \[1, 2, 4"),
        (tiny_spec(num_attention_heads=6, num_key_value_heads=3, hidden_size=24),
         {"tp": 2}, r"mesh.tp=2 does not divide the 3 heads of [kv]_proj; .* \[1, 3"),
        (tiny_spec(intermediate_size=30), {"tp": 4}, r"the 30 features of down_proj; .* \[1, 2"),
        (tiny_spec(pretraining_tp=2, vocab_size=258), {"tp": 2}, r"set model.pretraining_tp=1"),
        (tiny_spec(), {"cp": 4, "tokens": 36}, r"data.row_tokens=36 does not divide into the 8 "
         r"parts .* set it to 32 or 40"),
        (tiny_spec(), {"cp": 2, "tp": 4, "tokens": 36}, r"into the 8 parts"),
        (tiny_spec(), {"pp": 4}, r"makes 4 stages of 2 layers"),
        (tiny_spec(), {"pp": 2, "micro_batches": 1}, r"mesh.pp=2 needs 2 or more micro-batches"),
        (tiny_spec(), {"chunks": 2}, r"engine.pipeline_chunks=2 has no effect without a pipeline"),
        (tiny_spec(num_hidden_layers=4), {"pp": 2, "chunks": 2, "micro_batches": 5},
         r"needs a multiple of 2 micro-batches"),
        (specs()["GPT-BigCode (MHA)"], {"tp": 8}, r"does not divide the 4 .*heads"),
    ],
)  # fmt: skip
def test_an_impossible_mesh_is_refused(spec: Any, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(spec, **settings)


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (tiny_spec(num_key_value_heads=1), {"tp": 4}),  # one key head, four copies
        (tiny_spec(vocab_size=257), {"tp": 2}),
        (specs()["GPT-BigCode (MQA)"], {"tp": 4}),
        (specs()["Idefics"], {"tp": 4, "pp": 2, "cp": 2}),
        (tiny_spec(num_hidden_layers=4), {"pp": 2, "chunks": 2}),
        (tiny_spec(num_hidden_layers=4), {"pp": 2, "chunks": 2, "micro_batches": None}),
    ],
)
def test_a_possible_mesh_passes(spec: Any, settings: dict[str, int]) -> None:
    check(spec, **settings)


@pytest.mark.parametrize("kind", [Varlen, Flash])
def test_attention_by_lengths_is_not_compiled(kind: type) -> None:
    spec = tiny_spec()
    with torch.device("meta"):
        model = spec.build_causal_lm(chunk_tokens=8)
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = object.__new__(kind)
    axes: Any = (model, spec.layout, PLAIN)
    others: Any = {"row_tokens": 32, "micro_batches": 4, "precision": PRECISIONS["bf16"]}
    NativeEngine().check(*axes, **others)
    with pytest.raises(ValueError, match=r"varlen or flash.*set model.attn_implementation=auto"):
        NativeEngine(compile=True).check(*axes, **others)


@pytest.mark.parametrize("name", list(specs()))
def test_a_shrunk_model_keeps_family_ratio_and_flags(name: str) -> None:
    spec = specs()[name]
    small, notes = shrink_spec(spec)
    assert type(small) is type(spec)
    assert notes == []
    assert small.tie_word_embeddings == spec.tie_word_embeddings
    if hasattr(spec, "num_key_value_heads"):
        groups = spec.num_attention_heads // (spec.num_key_value_heads or spec.num_attention_heads)
        assert small.num_attention_heads // small.num_key_value_heads == groups
    check(small, tp=2)
    check(small, pp=2)


def test_what_a_shrunk_model_changes_is_said() -> None:
    spec = replace(tiny_spec(attention_dropout=0.1), attn_implementation="flex")
    with pytest.raises(ValueError, match="dropout"):
        replace(spec).build_trunk()
    small, notes = shrink_spec(spec)
    assert small.attention_dropout == 0.0
    assert notes == [
        "dropout switched off: attention_dropout",
        "attention by sdpa, not flex: this runs on the CPU",
    ]


def test_attention_without_gradients_on_a_cpu_is_refused_before_a_step(
    tmp_path: Path, cache: Path
) -> None:
    run = tiny_run(cache, model=tiny_spec(attn_implementation="flex"))
    with torch.device("meta"):
        model = run.model.build_causal_lm(chunk_tokens=64)
    check_gradients(model, torch.device("cuda"))
    with pytest.raises(RankFailedError, match="flex has no backward pass on a CPU; train on"):
        run_ranks(1, train, tmp_path / "run", run)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
