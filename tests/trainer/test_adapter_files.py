"""Checkpoints of adapters: peft reads ours, we read peft's; resuming; another base is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from launch.cli import main
from models import heads
from tests.adapters import adapter_in, check_resume, peft_package, write_adapter
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.runs import tiny_run, train
from tests.tasks import HeadTask
from tests.trainer.test_model_path import saved
from trainer.adapters.files import CONFIG, PREFIX, WEIGHTS, hash_of_files
from trainer.adapters.lora import IA3, LoRA
from trainer.adapters.merged import load_merged
from trainer.adapters.pretrained import PretrainedAdapter
from trainer.checkpoint.commit import step_folder
from trainer.checkpoint.contents import BASE
from trainer.data.classification import SequenceEncoder
from trainer.data.document_data import DocumentData
from trainer.distributed import Placement, Ranks
from trainer.files import read_json, write_json
from trainer.hf_auto import HFAutoModel
from trainer.mesh import MeshSpec
from trainer.optim import AdamW
from trainer.parallel.materialise import materialise
from trainer.pretrained import PretrainedModel
from trainer.run import Run
from trainer.tasks.classification import SequenceClassificationTask
from trainer.verify.forked import RankFailedError

CPU = torch.device("cpu")
KINDS: dict[str, Any] = {
    "lora": LoRA(rank=4, alpha=8.0, targets=("q_proj", "down_proj"), init_lora_weights=False),
    "rslora": LoRA(rank=4, alpha=8.0, use_rslora=True, init_lora_weights=False),
    "dora": LoRA(rank=4, alpha=8.0, use_dora=True, init_lora_weights=False),
    "ia3": IA3(targets=("k_proj", "o_proj"), feedforward_targets=("up_proj", "down_proj")),
    "whole modules": LoRA(
        rank=4, alpha=8.0, targets=("q_proj",), modules_to_save=("norm", "input_layernorm")
    ),
}
IDS = torch.arange(7, 31)[None]
INPUTS = (IDS, torch.arange(24)[None], torch.ones_like(IDS))


def run_over(base: Path, cache: Path, adapter: Any, **changes: Any) -> Run:
    settings = {"weights": "auto", "tokenizer": "auto", "max_steps": 3}
    model = PretrainedModel(path=str(base), attn_implementation="eager")
    return tiny_run(cache, model=model, adapter=adapter, **settings | changes)


def started(run: Run) -> nn.Module:
    """Return the model that the run starts from, in eval mode."""
    model = run.trained_model()
    source = run.weight_source(model)
    assert source is not None
    values = source.values(model, run.model.initializer_range, run.seed)
    materialise(model, CPU, run.adapter.values(model, values))
    return model.eval()


def peft_logits(base: Path, adapter: Path) -> Tensor:
    """Return what transformers and peft compute from the two folders."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with peft_package() as peft:
        logits: Tensor = peft.PeftModel.from_pretrained(model, adapter).eval()(IDS).logits
    return logits


def same(found: Tensor, expected: Tensor, limit: float = 1e-5) -> bool:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max()) <= limit


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_train_and_save_computes_the_same_in_peft(
    kind: str, tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    run_ranks(1, train, tmp_path, run_over(model_folder, cache, KINDS[kind]))
    found = load_merged(adapter_in(tmp_path), dtype=torch.float32, device=CPU)(*INPUTS)
    assert same(found, peft_logits(model_folder, adapter_in(tmp_path)))
    plain = load_merged(model_folder, dtype=torch.float32, device=CPU)(*INPUTS)
    assert not same(found, plain, 1e-2)
    go_on = PretrainedAdapter(path=str(adapter_in(tmp_path)))
    assert same(started(run_over(model_folder, cache, go_on))(*INPUTS), found)


def test_a_classifiers_adapter_brings_its_head_to_peft(
    tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    lines = [json.dumps({"text": "ab" * (n % 4 + 1), "label": "xyz"[n % 3]}) for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    rows = DocumentData(
        path=str(tmp_path / "rows.jsonl"), encoder=SequenceEncoder(), row_tokens=32,
        global_documents=8, micro_rows=2, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    run = run_over(model_folder, cache, KINDS["lora"], task=SequenceClassificationTask())
    run = replace(run, data=rows)
    run_ranks(1, train, tmp_path / "run", run)
    adapter = adapter_in(tmp_path / "run")
    assert set(read_json(adapter / "config.json")["label2id"]) == {"x", "y", "z"}
    model = started(replace(run, adapter=PretrainedAdapter(path=str(adapter))))
    base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=3)
    with peft_package() as peft:
        theirs = peft.PeftModel.from_pretrained(base, adapter).eval()(IDS).logits
    assert same(model(*INPUTS)[:, 0], theirs)


def test_a_model_read_through_transformers_takes_adapters_alike(
    tmp_path: Path, cache: Path
) -> None:
    saved(tmp_path / "base", "qwen2")
    spec = HFAutoModel(path=str(tmp_path / "base"), attn_implementation="eager")
    run = tiny_run(
        cache, model=spec, weights="auto", tokenizer="auto", max_steps=3,
        adapter=replace(KINDS["dora"], targets=("q_proj", "mlp.*")),
    )  # fmt: skip
    run_ranks(1, train, tmp_path, run)
    model = started(replace(run, adapter=PretrainedAdapter(path=str(adapter_in(tmp_path)))))
    assert same(model(*INPUTS), peft_logits(tmp_path / "base", adapter_in(tmp_path)))


def peft_config(peft: Any, kind: str) -> Any:
    if kind == "ia3":
        return peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
    return peft.LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.1, target_modules=r".*\.(q|up)_proj",
        use_dora=kind == "dora", use_rslora=kind == "rslora", init_lora_weights=False,
        modules_to_save=["norm"] if kind == "lora" else None,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "ia3"])
def test_an_adapter_of_pefts_is_where_a_run_starts(
    kind: str, tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(0)
    with peft_package() as peft:
        other = peft.get_peft_model(base, peft_config(peft, kind))
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
            assert "norm.modules_to_save" in name or "lora" in name or "ia3" in name
    other.save_pretrained(tmp_path / "theirs")
    run = run_over(model_folder, cache, PretrainedAdapter(path=str(tmp_path / "theirs")))
    run.check(1)
    expected = peft_logits(model_folder, tmp_path / "theirs")
    assert same(started(run)(*INPUTS), expected)
    assert same(other.eval()(IDS).logits, expected)
    merged = load_merged(tmp_path / "theirs", dtype=torch.float32, device=CPU)
    assert same(merged(*INPUTS), expected)


def test_a_checkpoint_holds_what_trains_and_no_base(
    tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    run = run_over(model_folder, cache, KINDS["lora"])
    run_ranks(1, train, tmp_path, run)
    step = step_folder(tmp_path / "checkpoints", 3)
    assert sorted(path.name for path in step.iterdir()) == ["MANIFEST.json", "adapter", "state"]
    tensors = load_file(adapter_in(tmp_path) / WEIGHTS)
    trained = {n for n, p in run.trained_model().named_parameters() if p.requires_grad}
    assert tensors.keys() == {PREFIX + name for name in trained}
    state = load_file(step / "state" / "optimizer.safetensors")
    assert {name.partition("/")[2] for name in state} == trained
    stated = read_json(adapter_in(tmp_path) / BASE)
    assert stated["weights"] == str(model_folder)
    assert "tokenizer.json" in [path.name for path in adapter_in(tmp_path).iterdir()]


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_resumed_run_equals_uninterrupted_run_also_on_other_ranks(
    kind: str, tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    adapter = replace(KINDS[kind], dropout=0.2) if kind != "ia3" else KINDS[kind]
    run = run_over(model_folder, cache, adapter)
    check_resume(tmp_path, run, replace(run, mesh=MeshSpec(dp_shard=2)))


def changed_base(base: Path, folder: Path) -> Path:
    """Copy a model and change one number of one weight."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_another_base_is_refused_wherever_an_adapter_meets_it(
    tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    run = run_over(base, cache, KINDS["lora"], save_every=1, max_steps=2)
    run_ranks(1, train, tmp_path / "run", run)
    other = changed_base(base, tmp_path / "other")
    shutil.copy(other / "model.safetensors", base)  # the same path, other numbers
    with pytest.raises(
        RankFailedError, match=r"was trained on the base .*; this one has .*resume="
    ):
        run_ranks(1, train, tmp_path / "run", replace(run, max_steps=3))
    adapter = adapter_in(tmp_path / "run", 2)
    again = run_over(base, cache, PretrainedAdapter(path=str(adapter)))
    with pytest.raises(RankFailedError, match="adapter was trained on a base of hash"):
        run_ranks(1, train, tmp_path / "again", again)
    with pytest.raises(ValueError, match="adapter was trained on a base of hash"):
        load_merged(adapter, dtype=torch.float32, device=CPU)


def base_hash(placement: Placement, run: Run) -> str:
    source = run.weight_source(run.trained_model())
    assert source is not None
    return hash_of_files(source, Ranks(placement, COLLECTIVE_SECONDS))


def test_the_hash_of_a_base_does_not_depend_on_the_ranks_that_read_it(
    cache: Path, model_folder: Path
) -> None:
    run = run_over(model_folder, cache, KINDS["lora"])
    source = run.weight_source(run.trained_model())
    assert source is not None
    assert {*run_ranks(1, base_hash, run), *run_ranks(2, base_hash, run)} == {hash_of_files(source)}


def test_generate_takes_a_run_a_step_and_the_folder_of_an_adapter(
    tmp_path: Path, cache: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, train, tmp_path, run_over(model_folder, cache, KINDS["dora"], optim=AdamW(lr=0.1)))
    texts = []
    for folder in (tmp_path, adapter_in(tmp_path).parent, adapter_in(tmp_path), model_folder):
        words = [f"checkpoint={folder}", "prompt=def ", "max_new_tokens=12", "temperature=1"]
        assert main(["generate", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_an_adapter_over_random_weights_says_that_its_base_is_in_no_folder(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(cache, adapter=KINDS["lora"], max_steps=1)
    run_ranks(1, train, tmp_path, run)
    assert main(["generate", f"checkpoint={tmp_path}", "prompt=a"]) == 64
    error = capsys.readouterr().err
    assert "base_model_name_or_path=None is no folder here" in error
    assert len(error.strip().splitlines()) == 1


def test_a_head_of_another_task_comes_with_the_adapter(
    tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    """A classifier's adapter brings its score; a language model's leaves it to start anew."""
    task = HeadTask(head=heads.SEQUENCE)
    classifier = tiny_run(cache, weights=str(model_folder), adapter=KINDS["lora"], task=task)
    folder = write_adapter(tmp_path / "classifier", classifier)
    own = started(replace(classifier, adapter=PretrainedAdapter(path=str(folder))))
    saved = load_file(folder / WEIGHTS)[f"{PREFIX}score.weight"]
    assert torch.equal(own.get_parameter("score.weight"), saved)
    folder = write_adapter(tmp_path / "lm", run_over(model_folder, cache, KINDS["lora"]))
    new = started(replace(classifier, adapter=PretrainedAdapter(path=str(folder))))
    assert new.get_parameter("score.weight").requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"peft_type": "PREFIX_TUNING"},
            "peft_type='PREFIX_TUNING'; give a LORA, IA3 or PROMPT_TUNING",
        ),
        ({"bias": "all"}, "bias='all' is not supported; merge the adapter with peft"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern=.* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
    ],
)
def test_an_adapter_that_computes_otherwise_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    folder = write_adapter(tmp_path / "a", run_over(model_folder, cache, KINDS["lora"]))
    write_json(folder / CONFIG, json.loads((folder / CONFIG).read_text()) | change)
    with pytest.raises(ValueError, match=message):
        PretrainedAdapter(path=str(folder))


def test_an_adapter_of_another_shape_is_refused_before_training(
    tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    wide = tiny_run(cache, adapter=KINDS["lora"])
    wide = replace(wide, model=replace(wide.model, hidden_size=32))
    folder = write_adapter(tmp_path / "wide", wide)
    run = run_over(model_folder, cache, PretrainedAdapter(path=str(folder)))
    with pytest.raises(ValueError, match=r"the model needs .*belongs to another base"):
        run.check(1)
    deep = replace(wide.model, hidden_size=16, num_hidden_layers=3)
    folder = write_adapter(tmp_path / "deep", replace(wide, model=deep))
    run = run_over(model_folder, cache, PretrainedAdapter(path=str(folder)))
    with pytest.raises(ValueError, match=r"the model has no model\.layers\.2.*another base"):
        run.check(1)
    for missing in (WEIGHTS, CONFIG):
        (folder / missing).unlink()
        with pytest.raises(ValueError, match=missing):
            PretrainedAdapter(path=str(folder))
