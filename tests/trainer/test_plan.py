"""What a plan counts is what closed formulas say, and nothing is started or allocated for it."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models.llama import LlamaSpec
from models.nn import backends
from models.nn.dense import Sdpa
from models.nn.flex import Flex
from tests.runs import tiny_run
from trainer.auto_mesh import AutoMesh
from trainer.data.chat import ChatEncoder
from trainer.data.document_data import DocumentData
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.optim import SGD, AdamW
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.planning.devices import DEVICES, TABLE, device
from trainer.planning.facts import facts_of
from trainer.planning.layouts import layouts
from trainer.planning.live import FORWARD, Ledger
from trainer.planning.memory import Memory, memory_of
from trainer.planning.pretend import Pretend
from trainer.planning.rows import most_micro_batches
from trainer.run import Run
from trainer.run_data import data_of

SPEC = LlamaSpec(
    vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    tie_word_embeddings=False,
)  # fmt: skip
# Embedding and head; q and o, k and v, three of the feed-forward layer, two norms; a norm.
PARAMETERS = 2 * 258 * 32 + (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32) + 32
WEIGHTS = 12
FP32 = 4


def planned(run: Run, processes: int = 1) -> Memory:
    found = memory_of(run, processes, is_gpu=False)
    assert not dist.is_initialized()
    assert sum(found.by_category.values()) == found.peak
    return found


@pytest.fixture
def run(cache: Path) -> Run:
    return tiny_run(cache, model=SPEC, data_global_rows=2, data_micro_rows=1)


def test_one_process_holds_weights_and_two_moments_of_each(run: Run) -> None:
    held = planned(run).by_category
    assert held["weights"] == FP32 * PARAMETERS
    # And a step counter of each weight.
    assert held["optimizer"] == FP32 * (2 * PARAMETERS + WEIGHTS)


def test_plain_gradient_descent_keeps_nothing(run: Run) -> None:
    assert planned(replace(run, optim=SGD(lr=0.1))).by_category["optimizer"] == 0


def test_shards_are_of_so_many_ranks(run: Run) -> None:
    run = replace(run, mesh=MeshSpec(dp_shard=2))
    held = planned(run, 2).by_category
    assert held["weights"] == FP32 * PARAMETERS / 2
    assert held["optimizer"] == FP32 * (2 * PARAMETERS / 2 + WEIGHTS)
    assert held["copies of weights"] > 0


def test_copies_have_whole_weights_and_a_bucket_of_gradients(run: Run) -> None:
    held = planned(run, 2).by_category
    assert held["weights"] == FP32 * PARAMETERS
    assert held["gradients"] >= FP32 * PARAMETERS


def test_the_stage_that_holds_most_of_a_pipeline_is_named(run: Run) -> None:
    run = replace(run, model=replace(SPEC, num_hidden_layers=2), mesh=MeshSpec(pp=2))
    memory = planned(run, 2)
    assert memory.rank in (0, 1)
    # One layer each; the first has the table, the last norm and head.
    assert memory.by_category["weights"] == FP32 * (PARAMETERS - 258 * 32 - 32 * (memory.rank == 0))


def test_longer_rows_need_more_and_recomputing_less(run: Run) -> None:
    engine = NativeEngine(activation_checkpointing=ActivationCheckpointing(mode="full"))
    long = replace(run, data=replace(run.data, row_tokens=64, micro_rows=2))
    peaks = [planned(one).peak for one in (run, replace(long, engine=engine), long)]
    assert peaks == sorted(set(peaks))


def test_on_a_gpu_attention_keeps_no_mask_and_the_host_what_is_offloaded(run: Run) -> None:
    long = replace(run, data=replace(run.data, row_tokens=64, micro_rows=2))
    assert memory_of(long, 1, is_gpu=True).peak < planned(long).peak
    away = replace(run, engine=NativeEngine(offload_optimizer=True))
    memory = memory_of(away, 1, is_gpu=True)
    assert memory.by_category["optimizer"] == 0
    # Copies of weights and gradients, and two moments.
    assert memory.host == FP32 * (4 * PARAMETERS + WEIGHTS)


@pytest.fixture
def seen_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that this process has seen: what wakes it in a fork gets torch's error."""
    parent = os.getpid()

    def wake(*_: Any) -> Any:
        if os.getpid() != parent:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        return SimpleNamespace(total_memory=1 << 30)

    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", wake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", wake)
    monkeypatch.setattr(torch.cuda, "synchronize", wake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "find_spec", lambda _: "triton")


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, of Inductor
@pytest.mark.parametrize("is_gpu", [False, True])
def test_a_gpu_of_this_machine_changes_no_plan(
    run: Run, is_gpu: bool, request: pytest.FixtureRequest
) -> None:
    runs = {
        "plain": run,
        "flex": replace(run, model=replace(SPEC, attn_implementation="flex")),
        "offloaded": replace(run, engine=NativeEngine(offload_optimizer=True)),
        "auto": replace(run, mesh=AutoMesh()),
    }
    plans = {name: partial(memory_of, one, 1, is_gpu=is_gpu) for name, one in runs.items()}
    expected = {name: plan() for name, plan in plans.items()}
    request.getfixturevalue("seen_gpu")
    assert {name: plan() for name, plan in plans.items()} == expected


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.usefixtures("seen_gpu")
@pytest.mark.parametrize(("precision", "kind"), [("fp32", Flex), ("fp64", Sdpa)])
def test_in_fp64_auto_is_not_flex(run: Run, precision: str, kind: type) -> None:
    model = replace(run, precision=precision).plan_model()
    found = [backend for m in model.modules() if (backend := getattr(m, "backend", None))]
    assert {type(backend) for backend in found} == {kind}


def test_a_ledger_knows_what_was_alive_when() -> None:
    ledger = Ledger()
    ledger.enter(FORWARD)
    with Pretend(ledger):
        first = torch.zeros(1 << 40)  # 4 TiB: nothing has them
        second = first + 1
        del first
        third = second * 2
        ids = torch.arange(3)
    assert ids.tolist() == [0, 1, 2]
    assert third.shape == second.shape
    one, two, three = (block for block in ledger.blocks if block.num_bytes > 1 << 40)
    assert one.died is not None
    assert two.born == one.died < three.born  # both were there
    assert two.died is three.died is None


def test_facts_follow_from_the_config_alone(run: Run) -> None:
    run = replace(run, save_every=5, data=replace(run.data, global_rows=8, micro_rows=2))
    facts = facts_of(run, 2, None)
    assert (facts.trainable, facts.frozen) == (PARAMETERS, 0)
    assert (facts.global_samples, facts.micro_rows, facts.micro_batches) == (8, 2, 2)
    assert facts.step_tokens == 8 * 32
    assert facts.checkpoint == FP32 * 3 * PARAMETERS
    assert facts.saves == "every 5 steps, the newest 2 stay"
    rate = facts.tokens_per_second(run, DEVICES["h100"], 0.5, 2)
    assert rate == pytest.approx(0.5 * 67e12 * 2 / facts.flops.per_token)


def test_an_impossible_mesh_is_refused_with_what_is_legal(run: Run) -> None:
    with pytest.raises(ValueError, match="not divisible by 3"):
        facts_of(run, 3, None)


def test_devices_are_known_by_name() -> None:
    assert set(TABLE) == set(DEVICES)
    assert device("cpu", 2).memory_gib * 2 == pytest.approx(device("cpu", 1).memory_gib)
    with pytest.raises(ValueError, match="did you mean h100"):
        device("h10", 1)


def test_layouts_of_eight_processes_cover_every_axis(run: Run) -> None:
    names = set(layouts(run, 8))
    assert {"ddp", "fsdp", "hsdp 2x4", "tp8", "tp2 x fsdp4", "cp2 x fsdp4", "pp4 x fsdp2"} <= names
    assert {"zero1", "zero2", "zero3"} <= names
    assert set(layouts(run, 1)) == {"single"}


def test_documents_that_were_made_say_how_many_micro_batches_there_are(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{n}", "completion": "x"}}\n' for n in range(64)))
    data = DocumentData(
        path=str(rows), encoder=ChatEncoder(), row_tokens=64, global_documents=8, micro_rows=1,
        eval_fraction=0.0, cache=str(tmp_path),
    )  # fmt: skip
    run = replace(tiny_run(tmp_path, model=SPEC), data=data, tokenizer="byte")
    assert most_micro_batches(run, 2) == 4  # a row each, as nothing was made
    data_of(run)
    assert most_micro_batches(run, 2) == 1
    assert most_micro_batches(replace(run, data=replace(data, packing="off")), 2) == 4


def test_tensors_that_are_shapes_alone_hold_nothing() -> None:
    ledger = Ledger()
    with Pretend(ledger):
        kept = torch.zeros(1 << 40)
        shape = torch.zeros_like(kept, device="meta")
    assert shape.shape == kept.shape
    assert sum(block.num_bytes for block in ledger.blocks) == 4 << 40


def test_integers_are_real_where_weights_are_given_memory() -> None:
    ledger, planned = Ledger(), torch.nn.Linear(1 << 20, 1 << 20, device="meta")
    with Pretend(ledger):  # so FSDP2 finds where the rows of a rank begin
        planned.to_empty(device="cpu")
        assert torch.arange(3).sum().item() == 3
    assert FP32 << 40 in [block.num_bytes for block in ledger.blocks]


@pytest.mark.slow
def test_8b_with_8_bit_states_takes_6_bytes_a_parameter_and_fits_80_gb(cache: Path) -> None:
    spec = LlamaSpec(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip
    engine = NativeEngine(activation_checkpointing=ActivationCheckpointing(mode="full"))
    run = tiny_run(
        cache, model=spec, optim=AdamW(lr=1e-5, states="8bit"), engine=engine,
        precision="pure_bf16", data_row_tokens=4096, data_global_rows=1, data_micro_rows=1,
    )  # fmt: skip
    vectors, weights = 65 * 4096, 32 * 9 + 3
    matrices = 2 * 128_256 * 4096 + 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14_336)
    memory = memory_of(run, 1, is_gpu=True)
    assert memory.by_category["weights"] == 2 * (matrices + vectors)
    assert memory.by_category["gradients"] >= 2 * (matrices + vectors)
    state = 2 * (1 + 4 / 256) * matrices + 2 * 2 * vectors + FP32 * weights
    assert memory.by_category["optimizer"] == state
    assert memory.peak < 80e9
    assert facts_of(run, 1, None).checkpoint_state == pytest.approx(state, rel=1e-6)
