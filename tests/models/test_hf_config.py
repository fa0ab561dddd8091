"""config.json: values of another kind than the spec's are refused by key, in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.exit_codes import BAD_CONFIG
from trainer.pretrained import spec_from


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "hidden_size": "x"}, "hidden_size='x' is not a whole number"),
        ({"model_type": "llama", "vocab_size": 32000.0}, "vocab_size=32000.0 is not a whole"),
        ({"model_type": "llama", "vocab_size": True}, "vocab_size=True is not a whole number"),
        ({"model_type": "gpt_bigcode", "n_embd": None}, "n_embd=None is not a whole number"),
        ({"model_type": "gemma", "rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' is not a number"),
        ({"model_type": "gemma", "tie_word_embeddings": 1}, "=1 is not true or false"),
        ({"model_type": "gemma", "hidden_act": 3}, "hidden_act=3 is not text"),
        ({"model_type": "llama", "rope_scaling": "linear"}, "rope_scaling='linear' is no group"),
        ({"model_type": "idefics", "vision_config": 3}, "vision_config=3 is no group of keys"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": "4"}},
            "rope_parameters.factor='4' is not a number",
        ),
    ],
)
def test_a_value_of_another_kind_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: ") as caught:
        spec_from(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_without_keys_is_refused_by_generate(
    model_folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in model_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text("[]")
    assert main(["generate", f"checkpoint={tmp_path}", "prompt=a"]) == BAD_CONFIG
    assert f"{name} holds no keys" in capsys.readouterr().err
