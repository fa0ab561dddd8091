"""Hugging Face folders in and out: v4 and v5 files, shards, ties, heads, and every refusal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.heads import SEQUENCE, sequence_classifier
from models.llama import LlamaSpec
from tests.conftest import tiny_spec
from trainer.errors import StorageError
from trainer.parallel.materialise import materialise, random_values
from trainer.pretrained import load_causal_lm, save_pretrained, spec_from
from trainer.weights import match_weights

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


def saved(folder: Path, spec: LlamaSpec, *, max_file_gb: float = 5.0) -> nn.Module:
    """Save a random model of `spec`, and return it."""
    model = planned(spec)
    materialise(model, CPU, random_values(model, 0.1, seed=0))
    save_pretrained(folder, model, spec.hf_config(), max_file_gb=max_file_gb)
    return model


def planned(spec: LlamaSpec) -> nn.Module:
    with torch.device("meta"):
        return spec.build_causal_lm(chunk_tokens=8)


def load(folder: Path) -> nn.Module:
    return load_causal_lm(folder, dtype=torch.float32, device=CPU)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_file_gb", [5.0, 5e-6])
def test_a_saved_model_comes_back_bit_for_bit(
    tmp_path: Path, tied: bool, max_file_gb: float
) -> None:
    model = saved(tmp_path, tiny_spec(tie_word_embeddings=tied), max_file_gb=max_file_gb)
    again = load(tmp_path)
    assert_same(again, model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_a_tied_model_is_saved_without_its_alias_and_read_with_or_without_it(
    tmp_path: Path,
) -> None:
    model = saved(tmp_path, tiny_spec())
    tensors = load_file(tmp_path / WEIGHTS)
    assert "lm_head.weight" not in tensors
    alias = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": alias}, tmp_path / WEIGHTS)
    assert_same(load(tmp_path), model)
    del tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": alias}, tmp_path / WEIGHTS)
    assert_same(load(tmp_path), model)
    save_file(
        {**tensors, "model.embed_tokens.weight": alias + 1, "lm_head.weight": alias},
        tmp_path / WEIGHTS,
    )
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        load(tmp_path)


def test_files_of_the_trunk_alone_and_old_buffers_are_read(tmp_path: Path) -> None:
    model = saved(tmp_path, tiny_spec())
    tensors = {
        name.removeprefix("model."): value for name, value in load_file(tmp_path / WEIGHTS).items()
    }
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / WEIGHTS)
    assert_same(load(tmp_path), model)


def test_a_new_head_starts_fresh_over_a_language_model_and_an_old_one_is_read(
    tmp_path: Path,
) -> None:
    saved(tmp_path / "lm", tiny_spec(tie_word_embeddings=False))
    with torch.device("meta"):
        model = sequence_classifier(
            tiny_spec(), num_labels=3, problem_type="single_label_classification"
        )
    source = match_weights(tmp_path / "lm", model, trunk_name="model", head_name="score")
    assert source.fresh == ("score.weight",)
    materialise(model, CPU, source.values(model, 0.02, seed=0))
    trunk = load_file(tmp_path / "lm" / WEIGHTS)
    assert torch.equal(model.trunk.norm.weight, trunk["model.norm.weight"])
    assert model.head.weight.std() > 0
    save_pretrained(tmp_path / "head", model, tiny_spec().hf_config(SEQUENCE))
    source = match_weights(tmp_path / "head", model, trunk_name="model", head_name="score")
    assert source.fresh == ()


V5 = {
    "model_type": "llama", "vocab_size": 99, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 80, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 4}},
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            {"rope_type": "default", "rope_theta": 7.0},
        ),
        ({"rope_scaling": None}, {"rope_type": "default", "rope_theta": 1e4}),
    ],
)
def test_rotary_settings_of_version_4_and_5_mean_the_same(
    tmp_path: Path, rope: dict[str, Any], expected: dict[str, Any]
) -> None:
    spec = spec_from(write_config(tmp_path, V5 | rope))
    assert spec.rope_parameters.given() == expected


def test_what_a_version_4_file_omits_stands_at_the_default(tmp_path: Path) -> None:
    spec = spec_from(write_config(tmp_path, {"model_type": "llama", "torch_dtype": "bfloat16"}))
    assert (spec.hidden_size, spec.num_key_value_heads, spec.rms_norm_eps) == (4096, 32, 1e-6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"hidden_act": "gelu"}, "gelu_pytorch_tanh"),
        ({"hidden_act": "silu", "hidden_activation": None}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "silu"}, "silu"),
        ({"hidden_act": "silu", "rope_parameters": {"rope_theta": 1e4}}, "silu"),
        ({"hidden_act": "gelu", "rope_parameters": {"rope_theta": 1e4}}, "gelu_pytorch_tanh"),
    ],
)
def test_gemmas_activation_is_read_by_the_rule_of_the_files_version(
    tmp_path: Path, given: dict[str, Any], expected: str
) -> None:
    spec = spec_from(write_config(tmp_path, V5 | {"model_type": "gemma", "head_dim": 8} | given))
    assert spec.hidden_act == expected


def _change(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def _truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def _pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_change(model_type="mistral"), "none of llama, gemma, gpt_bigcode, idefics; train it"),
        (_change(rope_parameters={"rope_type": "longrope"}), "rope_type='longrope' is unknown"),
        (_change(rope_parameters={"magic": 1, "rope_type": "linear"}), "magic=1 is unknown"),
        (_change(num_key_value_heads=3), "does not divide num_attention_heads=4"),
        (_change(vocab_size=300), r"has shape \[258, 16\], the model needs \[300, 16\]"),
        (_change(num_hidden_layers=3), r"missing \(9 missing, 0 unknown\)"),
        (_change(num_hidden_layers=1), r"unknown to the model \(0 missing, 9 unknown\)"),
        (_change(sliding_window=4096), "sliding_window=4096 is unknown to LlamaSpec"),
        (_change(tie_word_embeddings=False), "lm_head.weight is missing"),
        (_truncate, "lies outside the file"),
        (_pickle_only, "only pytorch_model.bin, which is a pickle; convert it"),
        (_drop_tensor, "model.norm.weight is missing"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    saved(tmp_path, tiny_spec())
    damage(tmp_path)
    with pytest.raises((ValueError, StorageError), match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tmp_path, tiny_spec(), max_file_gb=5e-6)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "aside")
    with pytest.raises(StorageError, match=f"names {shard.name}, which is not there"):
        load(tmp_path)
    other = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shutil.copyfile(other, shard)
    with pytest.raises(StorageError, match="has no tensor"):
        load(tmp_path)
