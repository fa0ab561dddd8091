"""`tessera generate`: text from a run, a checkpoint or a Hugging Face folder."""

import json
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from launch.binding import convert

USAGE = """usage: tessera generate checkpoint=DIR prompt="..." [key=value] ...

  checkpoint=DIR       a run, a step of a run (.../step_00000100), or a Hugging Face model folder
  prompt="..."         the text to continue; or prompt_file=FILE
  max_new_tokens=100   temperature=0 (likeliest)   top_p=1   top_k=null   seed=0
  num_beams=1          length_penalty=1            cache=growing (static, none)
  precision=fp32       or bf16                     bos=true: begin with the BOS token
  json=true            one JSON object instead of text
"""
PRECISIONS = ("fp32", "bf16")


def main(arguments: list[str]) -> int:
    """Run `tessera generate` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return 0
    options = _parse(arguments)
    folder = model_folder(Path(options.pop("checkpoint")).expanduser())
    return _generate(folder, options)


def _parse(arguments: list[str]) -> dict[str, Any]:
    import yaml

    options: dict[str, Any] = {}
    for word in arguments:
        key, separator, value = word.partition("=")
        if not separator:
            raise ValueError(f'{word!r} is no option; write key=value, for example prompt="Once"')
        options[key] = value if key.startswith(("prompt", "checkpoint")) else yaml.safe_load(value)
    if "checkpoint" not in options:
        raise ValueError("checkpoint is missing; set checkpoint=DIR")
    if ("prompt" in options) == ("prompt_file" in options):
        raise ValueError("one of prompt and prompt_file is needed; set prompt=TEXT")
    return options


def model_folder(folder: Path) -> Path:
    """Return the Hugging Face folder of a run, a checkpoint or such a folder; ValueError if none.

    Of a run it is that of the newest committed step.
    """
    from trainer.checkpoint.commit import committed_steps, step_folder
    from trainer.directory import CHECKPOINTS

    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if steps := committed_steps(folder / CHECKPOINTS):
        return step_folder(folder / CHECKPOINTS, steps[0]) / "model"
    raise ValueError(
        f"checkpoint={folder} is no run with a checkpoint, no checkpoint and no model folder; "
        "give one of these"
    )


def _generate(folder: Path, options: dict[str, Any]) -> int:
    import torch

    from trainer.data.tokenizers import FileTokenizer
    from trainer.decoding import check_lengths, generate
    from trainer.pretrained import load_causal_lm, spec_from

    precision, is_json = options.pop("precision", "fp32"), options.pop("json", False)
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; set it to fp32 or bf16")
    has_bos, text = options.pop("bos", True), _prompt(options)
    tokenizer = FileTokenizer(folder)
    spec = _spec(options, tokenizer.eos_token_id)
    bos = [tokenizer.bos_token_id] if has_bos and tokenizer.bos_token_id is not None else []
    prompt = [*bos, *tokenizer.encode(text)]
    check_lengths([prompt], spec, spec_from(folder).max_position_embeddings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = load_causal_lm(folder, dtype=dtype, device=device)
    stream = _Stream(tokenizer) if sys.stdout.isatty() and not is_json else None
    if stream:
        print(text, end="", flush=True)
    start = time.perf_counter()
    (ids,) = generate(model, [prompt], spec, stream.on_token if stream else None)
    seconds = time.perf_counter() - start
    found = tokenizer.decode(ids)
    if is_json:
        print(json.dumps({"prompt": text, "text": found, "ids": ids, "seconds": round(seconds, 3)}))
    elif stream:
        print(found[len(stream.text) :])
    else:
        print(text + found)
    print(f"{len(ids)} tokens, {len(ids) / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def _prompt(options: dict[str, Any]) -> str:
    if "prompt" in options:
        return str(options.pop("prompt"))
    path = Path(options.pop("prompt_file")).expanduser()
    if not path.is_file():
        raise ValueError(f"prompt_file={path} is no file; give one, or prompt=TEXT")
    return path.read_text(encoding="utf-8")


def _spec(options: dict[str, Any], eos_token_id: int | None) -> Any:
    """Return the checked GenerationSpec of the options; the tokenizer's EOS ends the text."""
    from difflib import get_close_matches
    from typing import get_type_hints

    from trainer.decoding import GenerationSpec

    hints = get_type_hints(GenerationSpec)
    known = [field.name for field in fields(GenerationSpec) if field.name != "stop_token_ids"]
    for key in options:
        if key not in known:
            near = get_close_matches(key, [*known, "prompt", "checkpoint", "json"], n=1)
            hint = f"did you mean {near[0]}?" if near else "see tessera generate --help"
            raise ValueError(f"unknown key {key}; {hint}")
    values = {key: convert(value, hints[key], key) for key, value in options.items()}
    stops = () if eos_token_id is None else (eos_token_id,)
    return GenerationSpec(**values, stop_token_ids=stops)


class _Stream:
    """Prints text as its tokens come; bytes that are half of a letter wait for the rest."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""

    def on_token(self, row: int, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.startswith(self.text) and not text.endswith("\ufffd"):
            print(text[len(self.text) :], end="", flush=True)
            self.text = text
