"""LoRA on an assembled Idefics beside fresh parts that train whole: saved, merged, exported."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from launch.model_folders import model_folder
from tests.assembled import assembled, vision_data, write_clip, write_text_model
from tests.ranks import run_ranks
from tests.runs import train
from tests.trainer.test_assembled import begun, images, inputs, losses, run_of
from trainer.adapters.lora import LoRA
from trainer.adapters.merged import load_as_trained, load_merged, merged_spec
from trainer.adapters.pretrained import PretrainedAdapter
from trainer.adapters.protocol import NoAdapter
from trainer.assembled import AssembledIdefics
from trainer.checkpoint.spec import CheckpointSpec
from trainer.export.export import export
from trainer.export.source import Source
from trainer.run import Run

CPU = torch.device("cpu")
FRESH = (
    "vision_model", "perceiver_resampler", "gated_cross_attn_layers", "additional_embedding",
    "additional_fc",
)  # fmt: skip
LORA = LoRA(rank=2, targets=("model.layers.*",), modules_to_save=FRESH)
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied_with_clip"])
def model(request: pytest.FixtureRequest, tmp_path_factory: Any) -> AssembledIdefics:
    folder = tmp_path_factory.mktemp("parts")
    write_text_model(folder / "text", tie_word_embeddings=request.param)
    if request.param:
        return assembled(folder / "text")
    write_clip(folder / "clip")
    return assembled(folder / "text", vision=str(folder / "clip"))


@pytest.fixture(scope="module")
def lora(model: AssembledIdefics, tmp_path_factory: pytest.TempPathFactory) -> Run:
    data = vision_data(tmp_path_factory.mktemp("rows"))
    saved = FRESH if model.vision_folder is None else FRESH[1:]
    return run_of(
        model, data, adapter=replace(LORA, modules_to_save=saved), max_steps=4, save_every=2
    )


@pytest.fixture(scope="module")
def adapter(lora: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    run_ranks(1, train, folder, lora)
    return model_folder(folder)


def logits(model: nn.Module) -> Tensor:
    """Return the logits of the documents' tokens; what padding gets, nobody promises."""
    given = inputs()
    with torch.no_grad():
        result: Tensor = model(**given, **images())
    return result[given["segment_ids"] > 0]


def by_hand(model: AssembledIdefics, folder: Path) -> Tensor:
    """Return the logits of what the run began with, the file's numbers put in and multiplied."""
    whole = begun(model)
    weights = {
        name.removeprefix("base_model.model."): value
        for name, value in load_file(folder / FILE).items()
    }
    with torch.no_grad():
        for name, value in weights.items():
            if name.endswith(".lora_A.weight"):
                base = name.removesuffix(".lora_A.weight")
                product = weights[f"{base}.lora_B.weight"] @ value * LORA.scale
                whole.get_parameter(f"{base}.weight").add_(product)
            elif ".lora_B" not in name:
                whole.get_parameter(name).copy_(value)
    return logits(whole)


def test_lora_and_the_fresh_parts_train_and_nothing_else(
    model: AssembledIdefics, lora: Run, adapter: Path
) -> None:
    names = [n for n, p in lora.trained_model().named_parameters() if p.requires_grad]
    own = [n for n in names if n.startswith("model.layers.")]
    assert own
    assert all(".lora_" in name for name in own)
    parts = {n.split(".")[1] for n in names if n not in own and n.startswith("model.")}
    fresh = {"embed_tokens", "gated_cross_attn_layers", "perceiver_resampler"}
    assert parts == fresh | ({"vision_model"} if model.vision_folder is None else set())
    assert not {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} & set(names)
    dead = {f"model.vision_model.post_layernorm.{end}" for end in ("weight", "bias")}
    assert not dead & set(names)
    in_file = {n.removeprefix("base_model.model.") for n in load_file(adapter / FILE)}
    assert in_file == set(names) | (dead if model.vision_folder is None else set())


def test_merged_it_computes_what_was_trained(model: AssembledIdefics, adapter: Path) -> None:
    expected = by_hand(model, adapter)
    assert not torch.allclose(expected, logits(begun(model)), rtol=0, atol=1e-3)
    beside = logits(load_as_trained(adapter, dtype=torch.float32, device=CPU))
    merged = logits(load_merged(adapter, dtype=torch.float32, device=CPU))
    torch.testing.assert_close(beside, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert replace(merged_spec(adapter), attn_implementation="auto") == model.spec


def test_a_run_that_stopped_goes_on_to_the_same_numbers(
    tmp_path: Path, lora: Run, adapter: Path
) -> None:
    run_ranks(1, train, tmp_path / "lora", replace(lora, max_steps=2))
    run_ranks(1, train, tmp_path / "lora", lora)
    ours = load_file(model_folder(tmp_path / "lora") / FILE)
    for name, value in load_file(adapter / FILE).items():
        assert torch.equal(ours[name], value), name


def test_another_run_goes_on_with_the_adapter(tmp_path: Path, lora: Run, adapter: Path) -> None:
    longer = replace(lora, adapter=PretrainedAdapter(path=str(adapter)), max_steps=1)
    longer.check(1)
    run_ranks(1, train, tmp_path / "on", longer)
    begun_with = losses(adapter.parents[2])
    assert losses(tmp_path / "on")[0] < begun_with[0]


def test_transformers_reads_the_export_and_agrees(
    tmp_path: Path, model: AssembledIdefics, adapter: Path
) -> None:
    report = export(
        Source(folder=adapter), tmp_path / "out", dtype="auto", prompts=(), max_shard_gb=5.0
    )
    assert report.moved < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "num_key_value_heads" not in config  # every query head has keys of its own
    again = load_merged(tmp_path / "out", dtype=torch.float32, device=CPU)
    torch.testing.assert_close(logits(again), by_hand(model, adapter), rtol=0, atol=1e-5)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "on model.layers.*.mlp.down_proj, model.layers.*.mlp.gate_proj," in card
    assert "gated_cross_attn_layers, perceiver_resampler" in card


def test_a_base_that_is_gone_or_another_is_refused(
    tmp_path: Path, model: AssembledIdefics, adapter: Path
) -> None:
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    base = json.loads((adapter / "base.json").read_text())
    gone = base | {"assembled": base["assembled"] | {"text": "/nowhere"}}
    (tmp_path / "base.json").write_text(json.dumps(gone))
    with pytest.raises(ValueError, match=r"base.json: text='/nowhere' is no folder here; write"):
        load_merged(tmp_path, dtype=torch.float32, device=CPU)
    write_text_model(tmp_path / "other", tie_word_embeddings=model.spec.tie_word_embeddings,
                     initializer_range=0.5)  # fmt: skip
    weights = load_file(tmp_path / "other" / "model.safetensors")
    from safetensors.torch import save_file

    save_file({n: w + 1 for n, w in weights.items()}, tmp_path / "other" / "model.safetensors")
    other = base | {"assembled": base["assembled"] | {"text": str(tmp_path / "other")}}
    (tmp_path / "base.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"the adapter was trained on a base of hash"):
        load_merged(tmp_path, dtype=torch.float32, device=CPU)


def test_what_trains_is_saved_alone_without_an_adapter(
    tmp_path: Path, model: AssembledIdefics, lora: Run
) -> None:
    run = replace(
        lora, adapter=NoAdapter(), checkpoint=CheckpointSpec(contents="trained"), max_steps=2
    )
    run_ranks(1, train, tmp_path / "some", run)
    run_ranks(1, train, tmp_path / "whole", replace(run, checkpoint=CheckpointSpec()))
    some, whole = (model_folder(tmp_path / name) for name in ("some", "whole"))
    assert "model.layers.0.mlp.up_proj.weight" not in load_file(some / "trained.safetensors")
    found, expected = (
        load_merged(folder, dtype=torch.float32, device=CPU).state_dict()
        for folder in (some, whole)
    )
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_bias": True}, "has attention_bias=true: transformers' Idefics cannot compute"),
        ({"head_dim": 6}, "has head_dim=6: transformers' Idefics cannot compute that; use the"),
        ({"num_hidden_layers": 3}, "has num_hidden_layers=3 for cross_layer_interval=2, which"),
    ],
)
def test_what_transformers_cannot_express_is_not_exported(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_text_model(tmp_path / "text", **changes)
    own = assembled(tmp_path / "text", cross_layer_interval=2)
    (tmp_path / "config.json").write_text(json.dumps(own.hf_config()))
    with pytest.raises(ValueError, match=reason):
        Source(folder=tmp_path)
