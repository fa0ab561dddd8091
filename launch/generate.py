"""`tessera generate`: text from a run, a checkpoint or a Hugging Face folder."""

import json
import sys
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from launch.binding import convert
from launch.model_folders import model_folder
from launch.questions import KINDS, check_kind, read_paths, read_question
from launch.words import options_of

USAGE = """usage: tessera generate checkpoint=DIR prompt="..." [key=value] ...

  checkpoint=DIR       a run, a step of a run (.../step_00000100), a Hugging Face model folder, or
                       the folder of an adapter, which names its base
  prompt="..."         the text to continue; or prompt_file=FILE; or chat="...": a message to
                       answer, written by the tokenizer's chat template
  image=FILE           what it is about, for an Idefics; several: 'image=[a.png,b.png]', where
                       the text says <image>, else in front of it
  max_new_tokens=100   temperature=0 (likeliest)   top_p=1   top_k=null   seed=0
  num_beams=1          length_penalty=1            cache=growing (static, none)
  precision=fp32       or bf16                     bos=true: begin with the BOS token
  json=true            one JSON object instead of text
"""
PRECISIONS = ("fp32", "bf16")
TEXTS = ("checkpoint", *KINDS, "image", "precision", "cache")  # whatever they look like


def main(arguments: list[str]) -> int:
    """Run `tessera generate` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return 0
    options = _parse(arguments)
    folder = model_folder(Path(options.pop("checkpoint")).expanduser())
    return _generate(folder, options)


def _parse(arguments: list[str]) -> dict[str, Any]:
    from trainer.decoding import GenerationSpec

    known = {field.name for field in fields(GenerationSpec)} - {"stop_token_ids"}
    optional = {*known, *TEXTS, "bos", "json"}
    given = options_of("generate", arguments, needed={"checkpoint": "DIR"}, optional=optional)
    options = {key: text if key in TEXTS else _value(text) for key, text in given.items()}
    check_kind(options)
    return options


def _value(text: str) -> Any:
    """Return what a word stands for: null, true, false, a number, or else itself."""
    if text in (constants := {"null": None, "true": True, "false": False}):
        return constants[text]
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text


def _generate(folder: Path, options: dict[str, Any]) -> int:
    import torch

    from trainer.adapters.merged import base_folder, load_merged, merged_spec, num_virtual_tokens
    from trainer.data.tokenizers import FileTokenizer
    from trainer.decoding import check_lengths, generate

    precision = options.pop("precision", "fp32")
    is_json = convert(options.pop("json", False), bool, "json")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; set it to fp32 or bf16")
    base = base_folder(folder)
    tokenizer = FileTokenizer(folder if (folder / "tokenizer.json").is_file() else base)
    model_spec = merged_spec(folder)
    num_virtual = num_virtual_tokens(folder)
    paths = read_paths(options)
    takes_images = _takes_images(folder, model_spec, num_virtual, bool(paths))
    question = read_question(options, tokenizer, len(paths) if takes_images else None)
    prompt, shown = question.ids, question.shown
    stops = (*_stop_token_ids(base, tokenizer.eos_token_id), *question.stops)
    spec = _spec(options, tuple(dict.fromkeys(stops)))
    first = model_spec.vocab_size
    asked = [*range(first, first + num_virtual), *prompt]
    check_lengths([asked], spec, model_spec.max_position_embeddings)
    vocab_size = first + getattr(model_spec, "additional_vocab_size", 0)
    if max(prompt, default=0) >= vocab_size:
        raise ValueError(
            f"the prompt has token {max(prompt)}, the model vocab_size={vocab_size}; "
            f"put this model's tokenizer.json into {folder}"
        )
    images = _images(paths, prompt, tokenizer, model_spec, folder, base) if paths else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    # sdpa on every device: flex would be compiled anew for the shapes of a growing text.
    model = load_merged(folder, dtype=dtype, device=device, attn_implementation="sdpa")
    stream = _Stream(tokenizer, prompt) if sys.stdout.isatty() and not is_json else None
    if stream:
        print(shown, end="", flush=True)
    start = time.perf_counter()
    (ids,) = generate(model, [asked], spec, stream.on_token if stream else None, images)
    seconds = time.perf_counter() - start
    found = _continuation(tokenizer, prompt, ids)
    if is_json:
        answer = {"prompt": question.text, "text": found, "ids": ids}
        print(json.dumps(answer | {"seconds": round(seconds, 3)}))
    elif stream:
        print(found[len(stream.text) :])
    else:
        print(shown + found)
    print(f"{len(ids)} tokens, {len(ids) / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def _takes_images(folder: Path, spec: Any, num_virtual: int, has_images: bool) -> bool:
    """Whether the model looks at images; ValueError where it is given some and does not."""
    takes = hasattr(spec, "vision_config")
    if has_images and not takes:
        raise ValueError(
            f"image= needs a model that looks at images, and {folder} holds {spec.model_type}; "
            "give the folder of an Idefics, or leave image out"
        )
    if has_images and num_virtual:
        raise ValueError(
            f"image= has no use with {folder}, whose {num_virtual} virtual tokens were trained on "
            "texts alone; leave image out, or give another adapter"
        )
    return takes


def _images(paths: list[Path], ids: list[int], tokenizer: Any, spec: Any, *folders: Path) -> Any:
    """Return what the model sees beside the prompt."""
    from trainer.prompt_images import processor_of, prompt_images, read_image

    processor = processor_of(spec, *folders)
    return prompt_images([read_image(path) for path in paths], ids, tokenizer, processor)


def _continuation(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """Return the text of `ids` after `prompt`: decoded alone, they may lose their first space."""
    return str(tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :])


def _stop_token_ids(folder: Path, eos_token_id: int | None) -> tuple[int, ...]:
    """Return the tokenizer's EOS and those of the model: generation_config.json, else config.json.

    Chat models have several there.
    """
    from trainer.files import read_keys

    stops = [] if eos_token_id is None else [eos_token_id]
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = read_keys(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            stops += found if isinstance(found, list) else [found]
            break
    return tuple(dict.fromkeys(stops))


def _spec(options: dict[str, Any], stop_token_ids: tuple[int, ...]) -> Any:
    """Return the checked GenerationSpec of the options."""
    from typing import get_type_hints

    from trainer.decoding import GenerationSpec

    hints = get_type_hints(GenerationSpec)
    values = {key: convert(value, hints[key], key) for key, value in options.items()}
    return GenerationSpec(**values, stop_token_ids=stop_token_ids)


class _Stream:
    """Prints text as its tokens come; bytes that are half of a letter wait for the rest."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        self.ids: list[int] = []
        self.text = ""

    def on_token(self, row: int, token: int) -> None:
        self.ids.append(token)
        text = _continuation(self.tokenizer, self.prompt, self.ids)
        if text.startswith(self.text) and not text.endswith("\ufffd"):
            print(text[len(self.text) :], end="", flush=True)
            self.text = text
