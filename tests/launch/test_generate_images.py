"""`tessera generate image=..`: the tokens of transformers' own processor and model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parity.oracle import built, specs
from launch.cli import main
from tests.images import encoded, picture, tokenizer
from tests.trainer.test_vision_text import PLAIN_TEMPLATE, TEMPLATE
from trainer.adapters.merged import load_merged
from trainer.data.images.decode import MAX_PIXELS
from trainer.data.images.files import MAX_BYTES
from trainer.data.images.processor import ImageProcessor
from trainer.data.images.tokens import FAKE, IMAGE
from trainer.data.tokenizers import FileTokenizer
from trainer.decoding import GenerationSpec, generate
from trainer.pretrained import save_pretrained
from trainer.prompt_images import processor_of, prompt_images

NEW = 9
SPEC = replace(specs()["Idefics"], vocab_size=258, max_position_embeddings=96)
MEAN = (0.4, 0.5, 0.6)  # no defaults: what the folder says is used


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Idefics with tokenizer, processor and pictures, of which three cannot be shown."""
    folder = tmp_path_factory.mktemp("idefics")
    save_pretrained(folder, built(SPEC), SPEC.hf_config())
    tokenizer(TEMPLATE).save(folder)
    ImageProcessor(image_size=12, image_mean=MEAN, image_std=(0.2, 0.3, 0.4)).save(folder)
    for number in range(2):
        (folder / f"{number}.png").write_bytes(encoded(picture(number)))
    (folder / "cut.png").write_bytes(encoded(picture(0))[:90])
    (folder / "bomb.png").write_bytes(encoded(picture(0, (1, 1)).resize((9000, 9000))))
    with open(folder / "huge.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    return folder


def said(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> Any:
    given = [word.format(folder=folder) for word in words]
    limits = [f"max_new_tokens={NEW}", "json=true"]
    assert main(["generate", f"checkpoint={folder}", *given, *limits]) == 0
    return json.loads(capsys.readouterr().out)


def expected(folder: Path, prompt: list[Any], **options: Any) -> list[int]:
    """Return what transformers answers, by its own processor of texts and images."""
    from transformers import (
        AutoModelForImageTextToText,
        IdeficsProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    fast = PreTrainedTokenizerFast(
        tokenizer_object=FileTokenizer(folder)._fast, bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>", pad_token="<|end_of_text|>",
        additional_special_tokens=[FAKE, IMAGE],
    )  # fmt: skip
    processor = IdeficsProcessor(IdeficsImageProcessorPil.from_pretrained(folder), fast)
    inputs = processor(text=[prompt], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
    )  # fmt: skip
    ids: list[int] = found[0, inputs["input_ids"].shape[1] :].tolist()
    return ids[: ids.index(257)] if 257 in ids else ids


A, B = picture(0), picture(1)


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        (["image={folder}/0.png", "prompt=what is it?"], [A, "what is it?"]),
        (["image=[{folder}/0.png,{folder}/1.png]", "prompt=both?"], [A, B, "both?"]),
        (["image=[{folder}/1.png, '{folder}/0.png', {folder}/1.png]",
          "prompt=is<image>and<image><image>so?"], ["is", B, "and", A, B, "so?"]),
        (["image={folder}/1.png", "prompt=it<image>", "cache=none"], ["it", B]),
    ],
)  # fmt: skip
def test_answers_about_images_are_those_of_transformers(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], prompt: list[Any]
) -> None:
    found = said(capsys, folder, *words)
    assert found["ids"] == expected(folder, prompt)
    assert found["prompt"] == words[1].removeprefix("prompt=")


def test_beams_take_images_along(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("image=[{folder}/1.png,{folder}/0.png]", "prompt=two", "num_beams=3")
    assert said(capsys, folder, *words)["ids"] == expected(folder, [B, A, "two"], num_beams=3)


def test_another_image_gets_another_answer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, none = (
        said(capsys, folder, *image, "prompt=what?")["ids"]
        for image in (["image={folder}/0.png"], ["image={folder}/1.png"], [])
    )
    assert first != second
    assert none not in (first, second)


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN_TEMPLATE])
def test_a_chat_about_images_is_asked_as_the_template_writes_it(
    folder: Path, capsys: pytest.CaptureFixture[str], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow reference writes the blocks by hand."""
    asked: list[list[int]] = []

    def answer(model: Any, prompts: list[list[int]], spec: GenerationSpec, *more: Any) -> Any:
        asked.append(prompts[0])
        return generate(model, prompts, spec, *more)

    monkeypatch.setattr("trainer.decoding.generate", answer)
    (folder / "chat_template.jinja").write_text(template)
    found = said(capsys, folder, "image=[{folder}/0.png,{folder}/1.png]", "chat=<image> or <image>")
    tokens = FileTokenizer(folder)
    block = f"{FAKE}{IMAGE}{FAKE}"
    ids = tokens.encode(f"[user]{block} or {block}|[assistant]")
    assert asked == [ids]
    model = load_merged(folder, dtype=torch.float32, device=torch.device("cpu"))
    images = prompt_images([A, B], ids, tokens, processor_of(SPEC, folder))
    assert images.image_attention_mask[0, -1].tolist() == [0, 1]
    spec = GenerationSpec(max_new_tokens=NEW, stop_token_ids=(257,))
    assert [found["ids"]] == generate(model, [ids], spec, images=images)


def test_an_adapter_is_asked_with_the_processor_of_its_base(folder: Path, tmp_path: Path) -> None:
    made = processor_of(SPEC, tmp_path, folder)
    assert made.image_mean == MEAN
    assert processor_of(SPEC, tmp_path).image_size == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image=nowhere.png", "prompt=x"],
         "image=nowhere.png cannot be read: No such file or directory; give another file"),
        (["image={folder}", "prompt=x"], " is no file; give another file"),
        (["image={folder}/config.json", "prompt=x"], "is no image; give another file"),
        (["image={folder}/cut.png", "prompt=x"], "cut.png is broken: "),
        (["image={folder}/bomb.png", "prompt=x"], f"to data.max_pixels={MAX_PIXELS}; give"),
        (["image={folder}/huge.png", "prompt=x"], f"needed 1 to {MAX_BYTES}; give another file"),
        (["image=", "prompt=x"], "names no file; set image=FILE or image=[FILE,FILE]"),
        (["image=[]", "prompt=x"], "image=[] names no file"),
        (["image={folder}/0.png", "prompt=<image> <image>"],
         "the prompt has 2 places for images (<image>), and image= names 1; make them as many"),
        (["prompt=see <image>"], "1 places for images (<image>), and image= names 0"),
        (["image=[{folder}/0.png,{folder}/1.png]", "chat=<image>"], "and image= names 2; make"),
        (["image={folder}/0.png", "prompt=a<|end_of_text|>b"], "ends behind an EOS, from where"),
        (["image={folder}/0.png", f"prompt=a {FAKE} b"], "stands around images and nowhere else"),
        (["imag={folder}/0.png", "prompt=x"], "unknown key imag; did you mean image?"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    given = [word.format(folder=folder) for word in (*words, f"max_new_tokens={NEW}")]
    assert main(["generate", f"checkpoint={folder}", *given]) == 64
    output = capsys.readouterr()
    assert message in output.err
    assert (output.out, output.err.count("\n")) == ("", 1)


def test_a_model_without_eyes_is_given_no_image(
    folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"checkpoint={model_folder}", f"image={folder}/0.png", "prompt=x"]
    assert main(["generate", *words]) == 64
    assert "needs a model that looks at images" in capsys.readouterr().err
    # To such a model <image> is text.
    assert main(["generate", words[0], "prompt=<image>", "max_new_tokens=2"]) == 0
