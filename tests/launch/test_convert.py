"""`tessera convert`: a Gemma there and back, byte for byte, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from launch.cli import main
from launch.exit_codes import BAD_CONFIG, STORAGE
from tests.models.test_gemma import tiny
from tests.models.test_gemma_trees import weights_of
from trainer.convert import DEEPMIND_FILE, _filled
from trainer.data.tokenizers import ByteTokenizer
from trainer.pretrained import save_pretrained

pytest.importorskip("msgpack")


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "gemma")


def folder_of(folder: Path, **changes: object) -> Path:
    spec = tiny(**changes)
    config = spec.hf_config() | {"bos_token_id": 2}
    save_pretrained(folder, _filled(spec, weights_of(spec, torch.bfloat16)), config)
    ByteTokenizer().save(folder)
    return folder


@pytest.mark.parametrize("to", ["flax", "deepmind", "hf"])
def test_there_and_back_is_the_same_file(
    gemma: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / "there", tmp_path / "new" / "back"
    assert main(["convert", f"source={gemma}", f"output={there}", f"to={to}"]) == 0
    tensors = len(weights_of(tiny()))
    assert f"{tensors} tensors as {to}, read back and equal" in capsys.readouterr().out
    assert main(["convert", f"source={there}", f"output={back}", "to=hf"]) == 0
    for path in gemma.iterdir():
        if path.suffix == ".json":
            assert json.loads((back / path.name).read_text()) == json.loads(path.read_text())
        else:
            assert (back / path.name).read_bytes() == path.read_bytes()


def refusal(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    assert main(["convert", *words]) == code
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_what_cannot_be_converted_is_refused_before_anything_is_written(
    gemma: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = f"output={tmp_path / 'out'}"
    assert "source is missing" in refusal(capsys, BAD_CONFIG, new, "to=hf")
    assert "unknown key too; did you mean to? see" in refusal(capsys, BAD_CONFIG, "too=hf")
    source = f"source={gemma}"
    assert "to='onnx' is unknown" in refusal(capsys, BAD_CONFIG, source, new, "to=onnx")
    full = refusal(capsys, BAD_CONFIG, source, f"output={gemma}", "to=flax")
    assert "is not empty; give a new folder" in full
    llama = refusal(capsys, BAD_CONFIG, f"source={model_folder}", new, "to=flax")
    assert "holds a llama; only Gemma" in llama
    untied = folder_of(tmp_path / "untied", tie_word_embeddings=False)
    text = refusal(capsys, BAD_CONFIG, f"source={untied}", new, "to=deepmind")
    assert "no place for a Gemma with tie_word_embeddings=False" in text
    assert not (tmp_path / "out").exists()


def test_a_damaged_source_is_refused(
    gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    assert main(["convert", f"source={gemma}", f"output={there}", "to=deepmind"]) == 0
    capsys.readouterr()
    path = there / DEEPMIND_FILE
    path.write_bytes(path.read_bytes()[:-500])
    words = (f"source={there}", f"output={tmp_path / 'out'}", "to=hf")
    assert "is no npz file of weights" in refusal(capsys, STORAGE, *words)
