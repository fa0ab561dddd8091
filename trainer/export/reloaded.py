"""The exported folder in transformers, as its users will open it: offline, without remote code.

Beside trainer/hf_auto.py the only place that imports transformers.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.heads import CAUSAL_LM, SEQUENCE, TOKEN
from trainer.data.tokenizers import FileTokenizer
from trainer.errors import CheckError
from trainer.export.idefics import IDEFICS, images_beside
from trainer.export.prompts import CONVERSATION, Prompt, conversation
from trainer.export.source import Source

AUTO_CLASSES = {
    CAUSAL_LM: "AutoModelForCausalLM",
    SEQUENCE: "AutoModelForSequenceClassification",
    TOKEN: "AutoModelForTokenClassification",
}


def auto_class(source: Source) -> str:
    """Return the class of transformers that opens an export."""
    is_idefics = source.config.get("model_type") == IDEFICS
    return "AutoModelForImageTextToText" if is_idefics else AUTO_CLASSES[source.head]


def check_tokenizer(folder: Path, tokenizer: FileTokenizer, prompts: list[Prompt]) -> None:
    """Raise CheckError where transformers' tokenizer gives other ids, or renders otherwise."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    chat = conversation(tokenizer)
    for prompt in prompts:
        found = theirs(prompt.text, add_special_tokens=False).input_ids
        _compare_ids(prompt.text, found, prompt.bare_ids)
        if prompt.text != chat:
            whole = theirs(prompt.text).input_ids
            _compare_ids(prompt.text, whole[: len(prompt.ids)], prompt.ids)
    if chat is not None:
        turns = list(CONVERSATION)
        rendered = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if rendered != chat:
            raise CheckError(
                f"transformers renders a conversation as {rendered[:80]!r}.., and training saw "
                f"{chat[:80]!r}..; correct chat_template.jinja of the checkpoint"
            )


def _compare_ids(text: str, found: list[int], needed: list[int]) -> None:
    if found != needed:
        place = next(
            (n for n, pair in enumerate(zip(found, needed, strict=False)) if pair[0] != pair[1]),
            min(len(found), len(needed)),
        )
        raise CheckError(
            f"the tokenizer of transformers gives {found[place : place + 4]} at token {place} of "
            f"{text[:30]!r}, and training saw {needed[place : place + 4]}; compare tokenizer.json "
            "and tokenizer_config.json of the checkpoint"
        )


def reloaded_logits(
    folder: Path, source: Source, prompts: list[Prompt], dtype: torch.dtype, apart: frozenset[str]
) -> tuple[list[Tensor], int]:
    """Return the logits of every prompt, flat and wide, and the number of layers.

    CheckError where a weight of the model is not in the folder, or one of the folder not in the
    model, but for those that are meant to be `apart`.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind: Any = getattr(transformers, auto_class(source))
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        message = re.sub(r"\s+", " ", str(error))[:300]
        raise CheckError(f"{kind.__name__} cannot open what was written: {message}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, set(info[what]) - apart)):
            names = ", ".join(found[:3])
            raise CheckError(f"{kind.__name__} finds {what.replace('_', ' ')}: {names}, ..")
    model.eval()
    with torch.no_grad():
        logits = [
            model(
                torch.tensor([prompt.ids]), **images_beside(source.config, len(prompt.ids))
            ).logits
            for prompt in prompts
        ]
    wide = [each.flatten().to(torch.promote_types(dtype, torch.float32)) for each in logits]
    return wide, int(model.config.num_hidden_layers)
