"""`tessera generate` on a folder, a run and a checkpoint; and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from tests.chat_templates import CHATML, SPECIALS, tokenizer_folder
from tests.conftest import tiny_spec
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.checkpoint.commit import step_folder
from trainer.decoding import GenerationSpec
from trainer.pretrained import save_pretrained


def output(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["generate", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_folder_continues_a_prompt_the_same_way_each_time(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"checkpoint={model_folder}", "prompt=a=b c", "max_new_tokens=7")
    code, text, error = output(capsys, *words)
    assert code == 0
    assert text.startswith("a=b c")
    assert "tokens/s" in error
    assert output(capsys, *words)[1] == text
    sampled = [output(capsys, *words, "temperature=1.5", f"seed={seed}")[1] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_json_and_a_prompt_file_say_the_same_as_text(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("hello")
    words = (f"checkpoint={model_folder}", "max_new_tokens=5")
    _, plain, _ = output(capsys, *words, "prompt=hello")
    _, line, _ = output(capsys, *words, f"prompt_file={tmp_path / 'prompt.txt'}", "json=true")
    found = json.loads(line)
    assert found["prompt"] + found["text"] + "\n" == plain
    assert len(found["ids"]) <= 5


def test_a_run_stands_for_its_newest_checkpoint(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, train, tmp_path, tiny_run(cache, max_steps=2, save_every=1))
    step = step_folder(tmp_path / "checkpoints", 2)
    texts = [
        output(capsys, f"checkpoint={folder}", "prompt=x", "max_new_tokens=6")[:2]
        for folder in (tmp_path, step, step / "model")
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=x"], "checkpoint is missing; set checkpoint=DIR"),
        (["checkpoint={folder}"], "one of prompt, prompt_file, chat is needed"),
        (["checkpoint={folder}", "prompt=x", "prompt_file=y"], "found prompt and prompt_file"),
        (["checkpoint={folder}", "hello"], "'hello' is no option; write key=value"),
        (["checkpoint=nowhere", "prompt=x"], "checkpoint=nowhere is no run with a checkpoint"),
        (["checkpoint={folder}", "prompt=x", "temprature=1"], "did you mean temperature?"),
        (["checkpoint={folder}", "prompt=x", "top_p=0.5"], "top_p=0.5 has no effect"),
        (["checkpoint={folder}", "prompt=x", "max_new_tokens=many"], "needed a whole number"),
        (["checkpoint={folder}", "prompt=x", "max_new_tokens=99"], "lower max_new_tokens to 62"),
        (["checkpoint={folder}", "prompt=x", "precision=int4"], "set it to fp32 or bf16"),
        (["checkpoint={folder}", "prompt_file=nowhere"], "prompt_file=nowhere is no file"),
        (
            ["checkpoint={folder}", "chat=Hi"],
            "chat needs a chat template, and the tokenizer has none",
        ),
        (["checkpoint={folder}", "chat=Hi", "bos=true"], "bos has no effect on chat"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(
    model_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, text, error = output(capsys, *(word.format(folder=model_folder) for word in words))
    assert (code, text) == (64, "")
    assert message in error
    assert error.count("\n") == 1


def test_a_chat_is_written_by_the_template_and_ends_with_the_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    spec = tiny_spec(vocab_size=258 + len(SPECIALS), max_position_embeddings=256)
    model = spec.build_causal_lm(chunk_tokens=64)
    save_pretrained(tmp_path, model, spec.hf_config())
    tokenizer_folder(tmp_path, chat_template=CHATML)
    asked: list[Any] = []

    def answer(model: Any, prompts: list[list[int]], spec: GenerationSpec, *_: Any) -> Any:
        asked.append((prompts[0], spec.stop_token_ids))
        return [list(b"Yes.")]

    monkeypatch.setattr("trainer.decoding.generate", answer)
    words = (f"checkpoint={tmp_path}", "chat=Is it?", "max_new_tokens=3")
    spoken, line = output(capsys, *words)[1], output(capsys, *words, "json=true")[1]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    turn = {"conversation": [{"role": "user", "content": "Is it?"}], "add_generation_prompt": True}
    assert spoken == "Yes.\n"
    assert json.loads(line)["prompt"] == theirs.apply_chat_template(**turn, tokenize=False)
    ids, stops = asked[0]
    assert ids == theirs.apply_chat_template(**turn, return_dict=False)
    assert set(stops) == {258 + SPECIALS.index("</s>"), 258 + SPECIALS.index("<|im_end|>")}


def test_a_folder_without_a_tokenizer_is_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    code, _, error = output(capsys, f"checkpoint={tmp_path / 'model'}", "prompt=x")
    assert code == 64
    assert "has no tokenizer.json" in error
