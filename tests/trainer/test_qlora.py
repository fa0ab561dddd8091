"""QLoRA: training beside a base in 4 bits, against training beside the same numbers in full."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from launch.cli import main
from models.lora import PackedLoRALinear, packed_linears
from models.nn.linear import base_alone
from tests.adapters import adapter_in, check_resume, peft_package
from tests.conftest import tiny_spec, write_model
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.runs import tiny_run, train
from tests.trainer.test_adapter_files import (
    CPU,
    INPUTS,
    peft_logits,
    run_over,
    same,
    started,
)
from trainer.adapters.files import WEIGHTS
from trainer.adapters.lora import IA3, LoRA
from trainer.adapters.merged import load_merged
from trainer.adapters.nf4 import describe_packed, packing_of
from trainer.adapters.pretrained import PretrainedAdapter
from trainer.checkpoint.contents import BASE
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.engines.accelerate import AccelerateEngine
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.native import NativeEngine
from trainer.files import read_json, write_json
from trainer.mesh import MeshSpec
from trainer.optim import AdamW
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.materialise import Values, materialise, random_values
from trainer.run import Run
from trainer.verify.layouts import chosen
from trainer.verify.rows import MadeRows
from trainer.verify.shrink import shrink
from trainer.verify.verify import verify

# Once, not in every rank.
pytest.importorskip("bitsandbytes")

QLORA = LoRA(rank=4, alpha=8.0, init_lora_weights=False, quantize="nf4")
# Without momentum, Adam's first moment is the gradient.
GRADIENTS = AdamW(lr=1e-2, betas=(0.0, 0.95), max_grad_norm=None)


def rounded(run: Run, model: nn.Module) -> Values:
    """Return the values of the run's `model`, those that would be packed as they come out again."""
    values = run.adapter.values(model, random_values(model, run.model.initializer_range, run.seed))
    linears = {f"{name}.weight": linear for name, linear in packed_linears(model).items()}

    def value(name: str, start: int, stop: int) -> Tensor:
        if name not in linears:
            return values(name, start, stop)
        weight = linears[name].weight
        whole = values(name, 0, weight.numel()).view(weight.shape)
        return linears[name].pack(whole, weight.dtype)().flatten()[start:stop]

    return value


def trained(placement: Placement, run: Run, is_plain: bool) -> list[Any]:
    """Return loss and every gradient of three steps; plain: beside a base of full numbers."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    mesh = run.mesh.build(ranks=ranks)
    model, values = run.trained_model(), None
    if is_plain:
        values = rounded(run, model)
        run = replace(run, adapter=replace(run.adapter, quantize="none"))
        model = run.trained_model()
    engine = build_engine(run, model, ranks, mesh, values)
    rows, found = MadeRows(vocab_size=run.model.vocab_size), []
    for step in (1, 2, 3):
        batches = rows.micro_batches(step, mesh.dp_rank, mesh.dp_size)
        loss = engine.train_step(step, batches, rows.num_tokens(batches)).loss_sum
        state = engine.optimizer_state().items()
        gradients = {n: p.local.tolist() for n, p in state if n.startswith("exp_avg/")}
        assert len(gradients) == 28  # A and B of seven linears in two layers
        found.append((float(loss), gradients))
    ranks.close()
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_packed_base_trains_as_the_same_numbers_in_full(
    precision: str, mode: str, cache: Path
) -> None:
    """The same products of the same numbers in the same order: every bit, in every type."""
    engine = NativeEngine(activation_checkpointing=ActivationCheckpointing(mode=mode))
    run = tiny_run(cache, adapter=QLORA, precision=precision, optim=GRADIENTS, engine=engine)
    packed, plain = (run_ranks(1, trained, run, is_plain)[0] for is_plain in (False, True))
    assert packed == plain
    assert all(torch.tensor(numbers).any() for numbers in packed[0][1].values())
    unrounded = replace(run, adapter=replace(QLORA, quantize="none"))
    assert run_ranks(1, trained, unrounded, False)[0][0][0] != packed[0][0]  # rounding is seen


@pytest.mark.parametrize("engine", [NativeEngine(), AccelerateEngine()], ids=["ddp", "accelerate"])
def test_two_ranks_train_as_one(engine: Any, cache: Path) -> None:
    """The matrix's limit in fp64, 1e-12 of the largest."""
    run = tiny_run(cache, adapter=QLORA, precision="fp64", optim=GRADIENTS)
    alone = run_ranks(1, trained, run, False)[0]
    both = run_ranks(2, trained, replace(run, engine=engine), False)
    for (loss, gradients), *found in zip(alone, *both, strict=True):
        for other_loss, others in found:
            assert other_loss == pytest.approx(loss, rel=1e-12)
            for name, numbers in gradients.items():
                assert same(torch.tensor(others[name]), torch.tensor(numbers), 1e-12), name


def test_topology_free_training_gives_the_same_bits_on_two_ranks(cache: Path) -> None:
    run = tiny_run(cache, adapter=QLORA, optim=GRADIENTS, deterministic="topology_free")
    alone, both = (run_ranks(count, trained, run, False) for count in (1, 2))
    assert both == [alone[0], alone[0]]


def planned(cache: Path, **changes: Any) -> tuple[Run, nn.Module, Values]:
    run = tiny_run(cache, adapter=replace(QLORA, **changes))
    model = run.trained_model()
    return run, model, random_values(model, run.model.initializer_range, run.seed)


def test_a_base_is_packed_weight_by_weight(cache: Path) -> None:
    """Of what is packed, one weight at a time is in full; before that, nothing has memory."""
    _, model, values = planned(cache)
    names = {f"{name}.weight" for name in packed_linears(model)}
    given: list[StorageWeakRef] = []

    def value(name: str, start: int, stop: int) -> Tensor:
        tensor = values(name, start, stop)
        assert all(one.expired() for one in given), name
        if name in names:
            assert all(parameter.is_meta for parameter in model.parameters()), name
            given.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    materialise(model, CPU, value)
    assert len(given) == len(names) == 14
    assert not names & {name for name, _ in model.named_parameters()}
    assert not [name for name, _ in model.named_buffers() if name.startswith(tuple(names))]


def kept_for_backward(model: nn.Module) -> set[tuple[int, ...]]:
    """Return the shapes of all that a forward pass keeps."""
    shapes = set()

    def keep(tensor: Tensor) -> Tensor:
        shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*INPUTS)
    return shapes


def test_no_pass_keeps_a_weight_in_full(cache: Path) -> None:
    """Else every layer's would be there at once when backward begins."""
    for quantize, is_there in (("nf4", False), ("none", True)):
        _, model, values = planned(cache, quantize=quantize)
        down = model.get_submodule("model.layers.1.mlp.down_proj")
        materialise(model, CPU, values)
        shape = (down.out_features, down.in_features)
        assert bool({shape, shape[::-1]} & kept_for_backward(model)) == is_there


def test_the_base_alone_is_the_rounded_one(cache: Path) -> None:
    """What DPO takes for its reference."""
    run, model, values = planned(cache)
    plain = tiny_run(cache).plan_model()
    materialise(plain, CPU, rounded(run, run.trained_model()))
    materialise(model, CPU, values)
    with base_alone(model):
        assert same(model(*INPUTS), plain(*INPUTS), 1e-6)
    assert not same(model(*INPUTS), plain(*INPUTS), 1e-3)


def test_the_banner_says_how_much_is_packed(cache: Path) -> None:
    _, model, _ = planned(cache)
    # In each of two layers 2,304 numbers in 36 blocks, and two numbers more for each of 7 weights.
    gib = 2 * (2304 / 2 + 36 + 7 * 8) / 2**30
    assert describe_packed(model) == f", 0.00 M of them in 4 bits (nf4, {gib:.3g} GiB)"
    assert describe_packed(tiny_run(cache, adapter=LoRA()).trained_model()) == ""


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, model_folder: Path
) -> tuple[Run, Path]:
    """A finished run, and the adapter that it left."""
    folder = tmp_path_factory.mktemp("qlora")
    run = run_over(model_folder, cache, QLORA)
    run_ranks(1, train, folder, run)
    return run, adapter_in(folder)


def test_peft_reads_the_adapter_on_the_unrounded_base(
    finished: tuple[Run, Path], model_folder: Path
) -> None:
    run, folder = finished
    stated = read_json(folder / BASE)
    assert (stated["quantize"], stated["use_double_quant"]) == ("nf4", True)
    unrounded = PretrainedAdapter(path=str(folder), quantize="none")
    found = started(replace(run, adapter=unrounded))(*INPUTS)
    assert same(found, peft_logits(model_folder, folder))
    as_trained = started(replace(run, adapter=PretrainedAdapter(path=str(folder))))
    assert not same(found, as_trained(*INPUTS), 1e-2)


def test_what_is_merged_is_what_was_trained(finished: tuple[Run, Path], model_folder: Path) -> None:
    """The merged weights against their formula; and logits, of merged and of beside it."""
    run, folder = finished
    merged = load_merged(folder, dtype=torch.float32, device=CPU)
    go_on = started(replace(run, adapter=PretrainedAdapter(path=str(folder))))
    assert packing_of(go_on) is not None
    assert same(merged(*INPUTS), go_on(*INPUTS), 1e-6)
    base, own = load_file(model_folder / "model.safetensors"), load_file(folder / WEIGHTS)
    name = "model.layers.1.self_attn.o_proj"
    a, b = (own[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    linear = run.trained_model().get_submodule(name)
    assert isinstance(linear, PackedLoRALinear)
    weight = linear.pack(base[f"{name}.weight"], torch.float32)()
    assert same(merged.get_parameter(f"{name}.weight"), weight + b @ a * 2.0, 1e-6)
    assert not same(merged.get_parameter(f"{name}.weight"), base[f"{name}.weight"] + b @ a * 2.0)


def test_commands_answer_as_the_run_did(
    finished: tuple[Run, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Export writes merged weights that transformers reads alike, and generate merges the same."""
    _, folder = finished
    shutil.copytree(folder, tmp_path / "adapter")
    words = [f"checkpoint={tmp_path / 'adapter'}", f"output={tmp_path / 'out'}"]
    assert main(["export", *words]) == 0
    assert "which nf4 rounded as in training" in (tmp_path / "out" / "README.md").read_text()
    folders = (tmp_path / "out", folder)
    found, expected = (load_merged(f, dtype=torch.float32, device=CPU) for f in folders)
    assert same(found(*INPUTS), expected(*INPUTS), 1e-6)
    capsys.readouterr()
    texts = []
    for name in ("adapter", "out"):
        words = [f"checkpoint={tmp_path / name}", "prompt=def ", "max_new_tokens=12"]
        assert main(["generate", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_transformers_and_peft_compute_the_same_beside_their_own_4_bits(
    tmp_path: Path, cache: Path
) -> None:
    """Of the largest logit, in fp32: 1e-5, as for adapters beside a base in full.

    Width 64: of shorter rows the CPU kernel of bitsandbytes 0.50 looks up wrong scales, and
    transformers has one row per output feature.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    spec = tiny_spec(hidden_size=64, intermediate_size=128)
    write_model(tmp_path / "base", spec)
    run_ranks(1, train, tmp_path / "run", run_over(tmp_path / "base", cache, QLORA))
    adapter = adapter_in(tmp_path / "run")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager", quantization_config=settings,
        dtype=torch.float32,
    )  # fmt: skip
    for module in base.modules():  # else, where the CPU has bf16, products of eval() are in bf16
        module.support_avx512bf16_for_cpu = False
    with peft_package() as peft:
        theirs = peft.PeftModel.from_pretrained(base, adapter).eval()(INPUTS[0]).logits
    assert same(load_merged(adapter, dtype=torch.float32, device=CPU)(*INPUTS), theirs)


def test_resumed_run_equals_uninterrupted_run_also_on_other_ranks(
    tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    run = run_over(model_folder, cache, replace(QLORA, dropout=0.2))
    check_resume(tmp_path, run, run)


def test_verify_agrees_where_it_may_and_says_why_it_may_not_elsewhere(cache: Path) -> None:
    small = shrink(tiny_run(cache, adapter=QLORA))
    assert packing_of(small.run.trained_model()) is not None
    ddp, cp, fsdp = verify(small, chosen(["ddp", "cp", "fsdp"]), steps=4)
    assert ddp.passes
    assert cp.passes
    assert not ddp.impossible + cp.impossible
    assert fsdp.impossible.startswith("mesh.dp_shard=2 with adapter.quantize")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mesh": MeshSpec(dp_shard=2)}, "mesh.dp_shard=2 with adapter.quantize"),
    ({"mesh": MeshSpec(tp=2)}, "mesh.tp=2 with adapter.quantize"),
    ({"mesh": MeshSpec(pp=2)}, "mesh.pp=2 with adapter.quantize"),
    ({"engine": DeepSpeedEngine(stage=2)}, "engine=deepspeed with adapter.quantize"),
    ({"engine": NativeEngine(compile=True)}, "engine.compile=true with adapter.quantize"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_would_cut_a_weight_up_or_keep_it_is_refused(
    changes: dict[str, Any], message: str, cache: Path
) -> None:
    run = tiny_run(cache, adapter=QLORA, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        run.check(2)
    assert "\n" not in str(caught.value)
    assert "set adapter.quantize=none" in str(caught.value)
    replace(run, adapter=replace(QLORA, quantize="none")).check(2)


def test_the_folder_of_another_kind_of_adapter_takes_no_packing(
    tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    run_ranks(1, train, tmp_path, run_over(model_folder, cache, IA3(), max_steps=1))
    with pytest.raises(ValueError, match=r"adapter.quantize have no effect on IA3"):
        PretrainedAdapter(path=str(adapter_in(tmp_path, 1)), quantize="nf4")


def test_an_adapter_of_pefts_goes_on_beside_a_packed_base_where_that_is_asked_for(
    finished: tuple[Run, Path], tmp_path: Path
) -> None:
    run, folder = finished
    shutil.copytree(folder, tmp_path / "theirs")
    stated = read_json(folder / BASE)
    write_json(tmp_path / "theirs" / BASE, {k: stated[k] for k in ("xxh3", "weights")})
    plain = PretrainedAdapter(path=str(tmp_path / "theirs"))
    assert packing_of(replace(run, adapter=plain).trained_model()) is None
    asked = replace(run, adapter=replace(plain, quantize="nf4"))
    as_trained = replace(run, adapter=PretrainedAdapter(path=str(folder)))
    assert torch.equal(started(asked)(*INPUTS), started(as_trained)(*INPUTS))
