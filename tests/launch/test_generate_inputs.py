"""What `tessera generate` reads: damaged checkpoints, other tokenizers, stop tokens, values."""

import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli import main
from launch.generate import model_folder as found_folder
from tests.conftest import tiny_spec
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.checkpoint.commit import step_folder
from trainer.data.tokenizers import FileTokenizer
from trainer.decoding import GenerationSpec, generate
from trainer.errors import StorageError
from trainer.pretrained import load_causal_lm, save_pretrained

WORDS = {"<unk>": 0, "\u2581a": 1, "\u2581b": 2, "c": 3, "\u2581d": 4, "<s>": 5, "</s>": 6}


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens carry their space in front, as SentencePiece's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder: Path = tmp_path_factory.mktemp("words")
    spec = tiny_spec(vocab_size=8)
    torch.manual_seed(0)
    model = spec.build_causal_lm(chunk_tokens=64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    save_pretrained(folder, model, spec.hf_config())
    fast = Tokenizer(models.WordLevel(WORDS | {"\u2581far": 9}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.add_special_tokens(["<s>", "</s>"])
    fast.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(specials))
    return folder


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["generate", *words, "json=true"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_first_space_of_the_new_text_is_kept(
    words_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"checkpoint={words_folder}", "prompt=a b", "max_new_tokens=6")
    found = as_json(capsys, *words)
    spelled = {number: word.replace("\u2581", " ") for word, number in WORDS.items()}
    text = "".join(spelled[token] for token in found["ids"] if token != WORDS["<s>"])
    assert found["text"] == text
    assert text.startswith(" ")


def test_a_terminal_shows_the_same_text_piece_by_piece(
    words_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.pieces: list[str] = []

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.pieces.append(text)
            return super().write(text)

    words = [f"checkpoint={words_folder}", "prompt=a b", "max_new_tokens=6"]
    assert main(["generate", *words]) == 0
    plain = capsys.readouterr().out
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["generate", *words]) == 0
    assert terminal.getvalue() == plain
    assert len([piece for piece in terminal.pieces if piece.strip()]) > 3


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_text_ends_at_every_stop_token_that_the_model_names(
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    as_list: bool,
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    words = (f"checkpoint={folder}", "prompt=x", "max_new_tokens=9", "temperature=2")
    free = as_json(capsys, *words)["ids"]
    stop = next(token for token in free if token != free[0])
    config = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    config["eos_token_id"] = [257, stop] if as_list else stop
    (folder / file).write_text(json.dumps(config))
    assert as_json(capsys, *words)["ids"] == free[: free.index(stop)]


def test_a_damaged_checkpoint_is_passed_over_and_left_where_it_is(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, train, tmp_path, tiny_run(cache, max_steps=2, save_every=1))
    first, second = (step_folder(tmp_path / "checkpoints", step) for step in (1, 2))
    assert found_folder(tmp_path) == second / "model"
    flip_a_byte(second / "model" / "model.safetensors")
    assert found_folder(tmp_path) == first / "model"
    assert "is damaged" in capsys.readouterr().err
    with pytest.raises(StorageError, match="is damaged"):
        found_folder(second)
    flip_a_byte(first / "model" / "model.safetensors")
    assert main(["generate", f"checkpoint={tmp_path}", "prompt=x"]) == 74
    assert second.is_dir()
    assert first.is_dir()


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_command_says_what_the_library_says_in_both_precisions(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = FileTokenizer(model_folder)
    how = {"max_new_tokens": 8, "temperature": 1.5, "top_p": 0.9, "seed": 4}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for has_bos in (True, False):
            words = [f"{key}={value}" for key, value in how.items()]
            words += [f"precision={precision}", f"bos={str(has_bos).lower()}", "prompt=ab"]
            found = as_json(capsys, f"checkpoint={model_folder}", *words)
            model = load_causal_lm(model_folder, dtype=dtype, device=torch.device("cpu"))
            prompt = [*([tokenizer.bos_token_id] if has_bos else []), *b"ab"]
            spec = GenerationSpec(**how, stop_token_ids=(257,))  # type: ignore[arg-type]
            assert [found["ids"]] == generate(model, [prompt], spec)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=far", "max_new_tokens=5"], "the prompt has token 9, the model vocab_size=8"),
        (["prompt=a", "top_p=["], "top_p='[' is text; needed a number"),
        (["prompt=a", "json=maybe"], "json='maybe' is text; needed true or false"),
        (["prompt=a", "bos=5"], "bos=5 is int; needed true or false"),
        (["prompt=a", "temperature=nan"], "temperature=nan"),
        (["prompt=a", "top_k=1.5", "temperature=1"], "top_k=1.5 is float; needed a whole number"),
        (["prompt=", "bos=false"], "the prompt is empty"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_in_one_line(
    words_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["generate", f"checkpoint={words_folder}", *words]) == 64
    output = capsys.readouterr()
    assert message in output.err
    assert (output.out, output.err.count("\n")) == ("", 1)


def test_small_numbers_may_be_written_with_an_exponent(
    words_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"checkpoint={words_folder}", "prompt=a", "max_new_tokens=5"]
    cold = as_json(capsys, *words, "temperature=1e-6")
    assert cold["ids"] == as_json(capsys, *words)["ids"]


def test_the_command_of_the_readme_works(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On another model, and shorter: the README's own run is the demo's."""
    readme = Path(__file__).parents[2] / "README.md"
    lines = readme.read_text().splitlines()
    (command,) = [line for line in lines if line.startswith("$ tessera generate")]
    words = shlex.split(command.removeprefix("$ tessera "))
    assert "checkpoint=runs/demo" in words
    words = [word for word in words if not word.startswith(("checkpoint=", "max_new_tokens="))]
    assert main([*words, f"checkpoint={model_folder}", "max_new_tokens=9"]) == 0
    assert capsys.readouterr().out.startswith("def ")
