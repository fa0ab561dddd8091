"""Hugging Face's config.json: reading its v4 and v5 styles, and which family a file belongs to."""

import logging
from dataclasses import fields
from fnmatch import fnmatchcase
from importlib import import_module
from types import UnionType
from typing import Any, get_args

from models.nn.rope import RopeParameters

log = logging.getLogger(__name__)

FAMILIES = {
    "llama": "models.llama.LlamaSpec",
    "gemma": "models.gemma.GemmaSpec",
    "gpt_bigcode": "models.gpt_bigcode.GPTBigCodeSpec",
    "idefics": "models.idefics.IdeficsSpec",
}
"""The one table from model_type to spec."""

# Keys that say how a model is used, labelled or stored: they change no hidden state.
_NEUTRAL = (
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "*_token_id", "id2label", "label2id", "num_labels", "problem_type", "_name_or_path",
    "_model_name_or_path", "name_or_path", "auto_map", "output_*", "return_dict*", "torchscript",
    "chunk_size_feed_forward", "is_encoder_decoder", "task_specific_params", "finetuning_task",
    "tokenizer_class", "prefix", "pruned_heads", "transformers.js_config", "summary_*",
    "attn_implementation", "_attn_implementation*", "use_bfloat16", "tf_legacy_loss",
    "rope_theta", "rope_scaling", "rope_parameters",
    # Settings of text generation, which old files keep here.
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "length_penalty",
    "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "remove_invalid_values", "repetition_penalty", "suppress_tokens",
    "temperature", "top_k", "top_p", "typical_p",
)  # fmt: skip


OWN_KEYS = ("attn_implementation", "additional_tokens")
"""Fields of our specs that no config.json holds."""
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def family_of(config: dict[str, Any], source: str) -> Any:
    """Return the spec class of a config.json; ValueError names what is there and what to do."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{source}: model_type={model_type!r} is none of {', '.join(FAMILIES)}; "
            "train it with model=hf_auto, or give another folder"
        )
    module, _, name = FAMILIES[model_type].rpartition(".")
    return getattr(import_module(module), name)


def read_config(
    spec: type, config: dict[str, Any], defaults: dict[str, Any], neutral: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the fields of `spec` that `config` gives, or else `defaults`: what a v4 file omits.

    Raises ValueError for a value of another kind, null included. Keys that change the numbers and
    that the spec has not are refused when they are set; `neutral` names those that do not matter.
    """
    kinds = {field.name: field.type for field in fields(spec)}
    names = set(kinds) - {"rope_parameters", *OWN_KEYS}
    values = {**defaults, **{name: config[name] for name in names if name in config}}
    for key in names & set(config):
        _check_kind(key, config[key], kinds[key])
    for key, value in config.items():
        is_known = key in names or any(fnmatchcase(key, p) for p in (*_NEUTRAL, *neutral))
        if not is_known and value not in (None, False, 0, 0.0, "", [], {}):
            raise ValueError(
                f"config.json: {key}={value!r} is unknown to {spec.__name__} and could change the "
                "numbers; remove the key if it does not, or train with model=hf_auto"
            )
    return values


def drop_own(config: dict[str, Any]) -> None:
    """Take out of a spec's fields, in place, what no config.json holds."""
    for key in OWN_KEYS:
        del config[key]


def _check_kind(key: str, value: Any, kind: Any) -> None:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    is_number = float in kinds and type(value) is int
    needed = [_KINDS[k] for k in kinds if k in _KINDS]
    if needed and type(value) not in kinds and not is_number:
        raise ValueError(f"config.json: {key}={value!r} is not {' or '.join(needed)}; correct it")


def _group(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a copy of a group of keys; empty where it is absent or null."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"config.json: {key}={value!r} is no group of keys; correct it")
    return dict(value)


def read_nested(spec: type, config: dict[str, Any], key: str) -> Any:
    """Return the spec of a group of keys; what the file omits stands at its default."""
    return spec(**read_config(spec, _group(config, key), {}))


def read_rope(config: dict[str, Any]) -> RopeParameters:
    """Return the rotary settings of v5's rope_parameters, or of v4's rope_theta + rope_scaling."""
    given = _group(config, "rope_parameters") or _group(config, "rope_scaling")
    legacy = given.pop("type", None)
    given.setdefault("rope_type", legacy or "default")
    given.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    if given["rope_type"] == "yarn" and "original_max_position_embeddings" not in given:
        given["original_max_position_embeddings"] = config["max_position_embeddings"]
    known = {field.name: field.type for field in fields(RopeParameters)}
    if given["rope_type"] == "default":  # some files keep the factor of a kind they do not use
        given = {key: given[key] for key in ("rope_type", "rope_theta")}
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"config.json: rope_parameters.{key}={value!r} is unknown; remove it, or train "
                "with model=hf_auto"
            )
        _check_kind(f"rope_parameters.{key}", value, known[key])
        if type(value) is int and key != "original_max_position_embeddings":
            given[key] = float(value)
    return RopeParameters(**given)
