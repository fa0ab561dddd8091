"""An Idefics assembled from folders: it begins as its text model, and trains what is fresh."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.nn.decoupled import DecoupledEmbedding, DecoupledLMHead
from models.nn.model import DecoderModel
from models.nn.rope import RopeParameters
from tests.assembled import (
    RESAMPLER,
    SIDE,
    TOWER,
    assembled,
    vision_data,
    write_clip,
    write_text_model,
)
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.assembled import AssembledIdefics
from trainer.checkpoint.commit import step_folder
from trainer.construct import _initial_values
from trainer.data.images.processor import FILE
from trainer.data.images.tokens import TOKENS, image_tokens
from trainer.data.vision_text_data import VisionTextData
from trainer.mesh import MeshSpec
from trainer.parallel.materialise import materialise
from trainer.parallel.pieces import unique_parameters
from trainer.pretrained import PretrainedModel, load_causal_lm
from trainer.record import read_lines
from trainer.run import Run
from trainer.run_images import fitted
from trainer.run_tokenizer import check_tokenizer, tokenizer_of

CPU = torch.device("cpu")
LLAMA_3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text_model(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> VisionTextData:
    return vision_data(tmp_path_factory.mktemp("rows"))


def run_of(model: Any, data: Any = None, **changes: Any) -> Run:
    settings = {"tokenizer": "auto", "weights": "auto", "max_steps": 2} | changes
    run = tiny_run(None, model=model, **settings)
    return run if data is None else replace(run, data=data)


def begun(model: AssembledIdefics) -> DecoderModel:
    """Return the model as a run starts with it."""
    run = run_of(model)
    planned = run.trained_model()
    materialise(planned, CPU, _initial_values(run, planned))
    assert isinstance(planned, DecoderModel)
    return planned.eval()


def inputs(count: int = 2) -> dict[str, Tensor]:
    """Return two packed documents in each row, and images."""
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor([1] * 9 + [2] * 8 + [0]).expand(count, -1)
    positions = torch.tensor([*range(9), *range(8), 0]).expand(count, -1)
    ids = torch.randint(0, 256, segments.shape, generator=generator)
    return {"input_ids": ids, "position_ids": positions, "segment_ids": segments}


def images(count: int = 2) -> dict[str, Tensor]:
    pixels = torch.randn(count, 1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(count, 18, 1, dtype=torch.int64)
    return {"pixel_values": pixels, "image_attention_mask": mask}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
        {"num_key_value_heads": 1, "rope_parameters": RopeParameters(**LLAMA_3)},
    ],
    ids=["as_smollm2", "biases_and_wide_heads", "one_key_head_and_llama3_rope"],
)
@torch.no_grad()
def test_it_begins_with_the_logits_of_the_text_model_in_every_bit(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    spec = write_text_model(tmp_path, **changes)
    model, own = begun(assembled(tmp_path)), inputs()
    expected = load_causal_lm(tmp_path, dtype=torch.float32, device=CPU)(**own)
    for seen in ({}, images()):
        found = model(**own, **seen)
        assert found.shape[-1] == spec.vocab_size + len(TOKENS)
        assert torch.equal(found[..., : spec.vocab_size], expected)
    for name, parameter in model.named_parameters():
        if "alpha" in name:
            parameter.fill_(0.5)
    assert not torch.equal(model(**own, **images()), model(**own))


def test_additional_rows_begin_at_the_mean_of_the_texts(tmp_path: Path, text: Path) -> None:
    write_text_model(tmp_path, tie_word_embeddings=False)
    for folder, is_tied in ((text, True), (tmp_path, False)):
        model = begun(assembled(folder))
        table, head = model.get_submodule("model.embed_tokens"), model.head
        assert isinstance(table, DecoupledEmbedding)
        assert isinstance(head, DecoupledLMHead)
        for rows, front in (
            (table.additional_embedding.weight, table.weight),
            (head.additional_fc.weight, head.weight),
        ):
            expected = front.double().mean(0).float().expand(2, -1)
            torch.testing.assert_close(rows, expected, rtol=0, atol=1e-7)
        assert (head.additional_fc.weight is table.additional_embedding.weight) == is_tied


def trained(model: nn.Module) -> set[str]:
    """Return the parts of which something trains."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {".".join(name.removeprefix("model.").split(".")[:2]) for name in names}


def test_what_is_given_is_frozen_and_what_is_fresh_trains(text: Path, clip: Path) -> None:
    fresh = {
        "embed_tokens.additional_embedding", "gated_cross_attn_layers.0",
        "gated_cross_attn_layers.1", "perceiver_resampler.latents", "perceiver_resampler.blocks",
        "perceiver_resampler.layer_norm",
    }  # fmt: skip
    tower = {f"vision_model.{name}" for name in ("embeddings", "pre_layrnorm", "encoder")}
    all_text = {"embed_tokens.weight", "layers.0", "layers.1", "norm.weight"}
    with_clip = assembled(text, vision=str(clip))
    assert trained(run_of(assembled(text)).trained_model()) == fresh | tower
    assert trained(run_of(with_clip).trained_model()) == fresh
    unfrozen = replace(with_clip, freezes_itself=False)
    assert trained(run_of(unfrozen).trained_model()) == fresh | tower | all_text


@pytest.mark.parametrize("is_whole", [False, True], ids=["tower", "whole_clip"])
@torch.no_grad()
def test_the_tower_of_a_clip_sees_what_it_saw(tmp_path: Path, text: Path, is_whole: bool) -> None:
    theirs = write_clip(tmp_path, is_whole=is_whole)
    model = begun(assembled(text, vision=str(tmp_path)))
    pixels = images()["pixel_values"][:, 0]
    found = model.get_submodule("model.vision_model")(pixels)
    # Before the norm that is of the pooled output alone.
    torch.testing.assert_close(found, theirs(pixels).last_hidden_state, rtol=1e-5, atol=1e-5)


def losses(folder: Path) -> list[float]:
    return [
        line["loss"] for line in read_lines(folder / "metrics.jsonl") if line["split"] == "train"
    ]


def test_a_run_trains_it_saves_it_whole_and_goes_on_from_its_folder(
    tmp_path: Path, text: Path, clip: Path, data: VisionTextData
) -> None:
    model = assembled(text, vision=str(clip))
    run_ranks(1, train, tmp_path / "run", run_of(model, data, precision="fp64"))
    run_ranks(
        2, train, tmp_path / "two", run_of(model, data, precision="fp64", mesh=MeshSpec(dp_shard=2))
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), rel=1e-12, abs=0)
    folder = step_folder(tmp_path / "run" / "checkpoints", 2) / "model"
    again, first = load_causal_lm(folder, dtype=torch.float64, device=CPU), begun(model).double()
    changed = {
        name for name, weight in unique_parameters(first)
        if not torch.equal(weight, again.get_parameter(name))
    }  # fmt: skip
    assert changed == {n for n, p in first.named_parameters() if p.requires_grad}
    own = PretrainedModel(path=str(folder))
    assert replace(own.spec, attn_implementation="auto") == model.spec
    assert fitted(data, own) == fitted(data, model)
    assert (folder / FILE).is_file()
    assert image_tokens(tokenizer_of(data, str(folder), own)) == (259, 258)
    longer = run_of(own, data, precision="fp64", max_steps=1)
    run_ranks(1, train, tmp_path / "on", longer)
    assert losses(tmp_path / "on")[0] < losses(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_dropout": 0.1}, r"config.json: attention_dropout=0.1, which an Idefics has"),
        ({"pretraining_tp": 2}, r"config.json: pretraining_tp=2, which an Idefics has not; set it"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4},
         r"num_attention_heads=3 does not divide hidden_size=\d+, as cross-attention needs"),
    ],
)  # fmt: skip
def test_a_text_model_that_cannot_serve_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_text_model(tmp_path, **changes)
    with pytest.raises(ValueError, match=reason):
        assembled(tmp_path)


def test_folders_of_something_else_are_refused(tmp_path: Path, text: Path, clip: Path) -> None:
    with pytest.raises(ValueError, match=r"model_type='llama'; give the folder of a CLIP as model"):
        assembled(text, vision=str(text))
    with pytest.raises(ValueError, match=r"model_type='clip_vision_model' is none of llama"):
        assembled(clip)
    with pytest.raises(ValueError, match=r"has no config.json; give a Hugging Face model folder"):
        assembled(text, vision=str(tmp_path))
    other = assembled(text, vision=str(clip))
    config = (clip / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    (tmp_path / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"encoder.layers.2.*is missing \(16 missing, 0 unknown\)"):
        run_of(replace(other, vision=str(tmp_path))).check(1)


def test_sizes_of_images_are_those_of_the_tower(text: Path, data: VisionTextData) -> None:
    model = assembled(text)
    check_tokenizer(data, str(text), model)
    assert fitted(data, model).image_size == SIDE
    with pytest.raises(
        ValueError, match=r"makes images of 30 pixels, the model takes 12; set data"
    ):
        check_tokenizer(
            replace(data, processor=replace(data.processor, image_size=30)), str(text), model
        )


def test_settings_of_the_resampler_and_of_gates_are_its_own(text: Path) -> None:
    spec = assembled(text, use_resampler=False, alpha_type="vector", cross_layer_interval=2).spec
    assert (spec.use_resampler, spec.alpha_type, spec.cross_layer_interval) == (False, "vector", 2)
    assert (spec.perceiver_config, spec.vision_config) == (RESAMPLER, TOWER)
