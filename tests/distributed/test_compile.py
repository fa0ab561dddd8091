"""Compiled blocks: the numbers of plain ones on every layout, and no graph made twice."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parity.oracle import built, inputs, specs
from models.nn import document_attention
from tests.distributed.test_layouts import DDP, FSDP, curve
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.distributed import Placement
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.data_parallel import named_blocks
from trainer.run import Run

# torch imports a deprecated part of its own, and looks at gradients while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
TENSORS = MeshSpec(tp=2)
BUDGET = ActivationCheckpointing(mode="budget", budget=0.3)
PARTITIONED = "aot_eager_decomp_partition"  # chooses what is kept as Inductor does, fuses nothing
REST = (
    (1, MeshSpec(), "none"),
    (1, MeshSpec(), "selective"),
    (2, FSDP, "full"),
    (2, DDP, "full"),
    (2, DDP, "selective"),
    (2, FSDP, "none"),
)


def train_compiled(placement: Placement, folder: Path, run: Run, backend: str) -> dict[str, int]:
    """Train one rank; return what torch.compile counted."""
    from torch._dynamo.utils import counters

    counters.clear()  # a fork has what tests before this one counted
    compile_block = torch.nn.Module.compile

    def with_backend(module: torch.nn.Module, **options: Any) -> None:
        compile_block(module, backend=backend, **options)

    torch.nn.Module.compile = with_backend  # type: ignore[method-assign]
    train(placement, folder, run)
    return dict(counters["stats"])


@pytest.mark.parametrize(
    ("world_size", "mesh", "mode"),
    [
        (1, MeshSpec(), "full"),
        (1, MeshSpec(), "budget"),
        (2, DDP, "none"),
        (2, FSDP, "selective"),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in REST),
    ],
)
def test_traced_blocks_give_the_same_bits(
    tmp_path: Path, cache: Path, world_size: int, mesh: MeshSpec, mode: str
) -> None:
    recompute = BUDGET if mode == "budget" else ActivationCheckpointing(mode=mode)
    settings: dict[str, Any] = {"precision": "bf16", "max_steps": 4, "mesh": mesh}
    plain, compiled = (
        tiny_run(
            cache, engine=NativeEngine(activation_checkpointing=recompute, compile=c), **settings
        )
        for c in (False, True)
    )
    run_ranks(world_size, train, tmp_path / "plain", plain)
    (stats, *_) = run_ranks(world_size, train_compiled, tmp_path / "traced", compiled, "aot_eager")
    for key in ("loss", "grad_norm"):
        assert curve(tmp_path / "traced", key) == curve(tmp_path / "plain", key)
    assert stats["unique_graphs"] == 1  # for both blocks and all steps


def test_no_number_of_documents_in_a_row_makes_another_graph(tmp_path: Path, cache: Path) -> None:
    """Rows of one document up to a dozen: shapes are those of rows, whatever they hold."""
    lengths = [3, 90, 1, 5, 40, 2, 2, 2, 17, 4, 70, 1, 1, 1, 1, 9]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in lengths * 20))
    run = tiny_run(
        cache, engine=NativeEngine(compile=True), data_path=str(texts), data_max_documents=None,
        data_eval_fraction=0.0, max_steps=8,
    )  # fmt: skip
    tokenizer = run.data.tokenizer("byte", 258)
    loader, _ = run.data.build(tokenizer=tokenizer, seed=0, rank=0, num_ranks=1)
    rows = [
        row for n in range(8) for batch in loader.step(n).micro_batches for row in batch.segment_ids
    ]
    assert len({int(row.max()) for row in rows}) > 4  # else nothing would vary
    (stats,) = run_ranks(1, train_compiled, tmp_path / "run", run, "aot_eager")
    assert stats["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("world_size", "mesh"), [(1, MeshSpec()), (2, DDP), (2, FSDP), (2, TENSORS)]
)
def test_a_budget_changes_no_bit_of_traced_blocks(
    tmp_path: Path, cache: Path, world_size: int, mesh: MeshSpec
) -> None:
    """Beside the same blocks with nothing chosen: decompositions round as they do."""
    settings: dict[str, Any] = {"precision": "bf16", "max_steps": 4, "mesh": mesh}
    for name, recompute in (("none", ActivationCheckpointing()), ("budget", BUDGET)):
        engine = NativeEngine(activation_checkpointing=recompute, compile=True)
        run = tiny_run(cache, engine=engine, **settings)
        (stats, *_) = run_ranks(world_size, train_compiled, tmp_path / name, run, PARTITIONED)
        assert stats["unique_graphs"] == 1
    for key in ("loss", "grad_norm"):
        assert curve(tmp_path / "budget", key) == curve(tmp_path / "none", key)


def test_a_traced_block_keeps_no_more_than_its_budget() -> None:
    """Gradients are those of a block that keeps all, bit for bit."""
    spec = replace(specs()["Llama"], hidden_size=256, intermediate_size=704)
    kept: dict[float | None, int] = {}
    gradients: dict[float | None, list[Any]] = {}
    for budget in (None, 0.0, 0.4):
        recompute = ActivationCheckpointing()
        if budget is not None:
            recompute = ActivationCheckpointing(mode="budget", budget=budget)
        model = built(spec)
        blocks = [block for _, block in named_blocks(model, spec.layout)]
        recompute.apply(blocks, is_compiled=True)
        for block in blocks:
            block.compile(dynamic=False, backend=PARTITIONED)
        with torch.autograd.graph.saved_tensors_hooks(sizes := Sizes(model), lambda kept: kept):
            loss = model(**inputs(spec)).square().sum()
        loss.backward()
        kept[budget] = sum(sizes.found.values())
        gradients[budget] = [p.grad for p in model.parameters()]
    least, most = kept[0.0], kept[None]
    # The partitioner counts what it forbids to compute again, and may keep a little else.
    assert least < kept[0.4] <= least + (0.4 + 0.05) * (most - least)
    for budget in (0.0, 0.4):
        assert all(map(torch.equal, gradients[budget], gradients[None]))


def test_attention_that_the_budget_holds_is_not_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In rows that are long beside the width of the model nothing is as dear for its bytes."""
    calls: list[float | None] = []
    mixture = document_attention._mixture

    def counted(*args: Any) -> Any:
        calls.append(budget)
        return mixture(*args)

    monkeypatch.setattr(document_attention, "_mixture", counted)
    spec = replace(
        specs()["Llama"], num_hidden_layers=1, max_position_embeddings=256,
        attn_implementation="sdpa",
    )  # fmt: skip
    gradients: dict[float | None, list[Any]] = {}
    for budget in (None, 0.0, 0.4):
        recompute = ActivationCheckpointing()
        if budget is not None:
            recompute = ActivationCheckpointing(mode="budget", budget=budget)
        torch.manual_seed(0)
        model = spec.build_causal_lm(chunk_tokens=16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        blocks = [block for _, block in named_blocks(model, spec.layout)]
        recompute.apply(blocks, is_compiled=True)
        for block in blocks:
            block.compile(dynamic=False, backend=PARTITIONED)
        model(**inputs(spec, length=256)).square().sum().backward()
        gradients[budget] = [p.grad for p in model.parameters()]
    assert Counter(calls) == {None: 1, 0.0: 2, 0.4: 1}
    for budget in (0.0, 0.4):
        assert all(map(torch.equal, gradients[budget], gradients[None]))


class Sizes:
    """Bytes of each storage that autograd keeps, but for those of weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.found: dict[int, int] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.found[storage._cdata] = storage.nbytes()
        return tensor


@pytest.mark.slow
@pytest.mark.timeout(400)  # a C++ compiler at work on a busy machine
def test_inductor_s_code_gives_the_same_numbers_and_is_made_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    settings: dict[str, Any] = {"precision": "fp64", "max_steps": 6, "eval_every": 2}
    run_ranks(1, train, tmp_path / "plain", tiny_run(cache, **settings))
    compiled = tiny_run(cache, engine=NativeEngine(compile=True), **settings)
    folder = tmp_path / "compiled"
    (stats,) = run_ranks(1, train_compiled, folder, compiled, "inductor", limit_seconds=180.0)
    for key in ("loss", "grad_norm"):
        expected = curve(tmp_path / "plain", key)
        assert curve(tmp_path / "compiled", key) == pytest.approx(expected, rel=1e-12, abs=0)
    assert stats["unique_graphs"] == 2  # one with gradients, one without


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    NativeEngine().check_machine()
    with pytest.raises(ValueError, match=r"engine\.compile=true needs a C"):
        NativeEngine(compile=True).check_machine()
