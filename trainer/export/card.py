"""README.md of an exported model: what it is, what it was trained on, how it did, how to use it."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.heads import CAUSAL_LM, SEQUENCE, TOKEN
from trainer.adapters.nf4 import NONE
from trainer.callbacks.card import extent_in_words
from trainer.environment import environment
from trainer.export.idefics import IDEFICS
from trainer.export.reloaded import auto_class
from trainer.export.source import History, Source
from trainer.files import write_text
from trainer.pretrained import FREEZING

if TYPE_CHECKING:
    from trainer.export.export import Report

PIPELINES = {
    CAUSAL_LM: "text-generation", SEQUENCE: "text-classification", TOKEN: "token-classification",
}  # fmt: skip
HUB = "hf://datasets/"
_ASK = 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
_ASK_IMAGE = """\
from PIL import Image
from transformers import AutoImageProcessor, IdeficsProcessor

processor = IdeficsProcessor(AutoImageProcessor.from_pretrained(folder), tokenizer)
asked = [Image.new("RGB", (64, 64), "red"), "what color is the image?"]
inputs = processor(text=[asked], return_tensors="pt")
"""
_ASK_CHAT = """\
messages = [{"role": "user", "content": "What is 2 + 2?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
"""
_WRITE = """\
output = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_CLASSIFY = """\
inputs = tokenizer(["a text", "another, longer text"], padding=True, return_tensors="pt")
for scores in model(**inputs).logits{activation}.tolist():
    print(dict(zip(model.config.id2label.values(), scores)))
"""
_TAG = """\
inputs = tokenizer("Anna lives in Rome", return_tensors="pt")
for token, scores in zip(inputs.tokens(), model(**inputs).logits[0]):  # {place}
    print(token, model.config.id2label[scores.argmax().item()])
"""
_ACTIVATIONS = {"multi_label_classification": ".sigmoid()", "regression": ""}


def write_card(folder: Path, source: Source, report: "Report") -> None:
    """Write README.md into `folder`, which becomes `report.output`."""
    name = report.output.name
    parts = [_front(source), f"# {name}\n", _facts(source, report)]
    if source.history is not None and (found := source.history.evaluation):
        parts.append(_evaluation(found))
    parts += [f"## Use\n\n```python\n{code(source, name)}```\n", _compared(report)]
    if source.history is not None:
        parts.append(_settings(source.history))
    write_text(folder / "README.md", "\n".join(parts))


def base_name(source: Source) -> str | None:
    """Return the last name of what training began with; None: random weights, or unknown."""
    history = _begun(source.history.config) if source.history else None
    path = str(source.base) if source.is_adapter else history
    if path is None:
        return None
    place = Path(path).expanduser().resolve()
    in_run = place.parent.parent.name == "checkpoints"
    return place.parents[2].name if in_run else place.name


def _begun(config: dict[str, Any]) -> str | None:
    weights = config.get("weights")
    if weights == "auto":
        model = config.get("model", {})
        weights = model.get("path") or model.get("text")
    return None if weights in (None, "random") else str(weights)


def _front(source: Source) -> str:
    """Return the front matter of the Hub: YAML, whose strings are written as JSON."""
    tags = ["tessera"]
    if source.is_adapter:
        tags.append(str(source.adapter["peft_type"]).lower())
    keys: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": _pipeline(source),
        "base_model": base_name(source),
        "tags": tags,
        "datasets": [p.removeprefix(HUB) for p in _data(source.history) if p.startswith(HUB)],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in keys.items() if value]
    return "\n".join(["---", *lines, "---"]) + "\n"


def _pipeline(source: Source) -> str:
    is_idefics = source.config.get("model_type") == IDEFICS
    return "image-text-to-text" if is_idefics else PIPELINES[source.head]


def _data(history: History | None) -> list[str]:
    data = history.config.get("data", {}) if history else {}
    sources = data.get("sources") or {"": data}
    return [str(each["path"]) for each in sources.values() if each.get("path")]


def _facts(source: Source, report: "Report") -> str:
    config, history = source.config, source.history
    facts = {"Task": f"{_pipeline(source)} ({config.get('model_type')})"}
    if labels := source.config.get("id2label") if source.head != CAUSAL_LM else None:
        kind = config.get("problem_type") or "one label per word"
        facts["Labels"] = f"{', '.join(f'`{name}`' for name in labels.values())} ({kind})"
    if history is not None or source.is_adapter:
        facts["Began with"] = base_name(source) or "random weights"
        facts["Trained"] = trained(source)
    if history is not None:
        # A path of this machine would say nothing to others.
        names = [p if p.startswith("hf://") else Path(p).name for p in _data(history)]
        facts["Data"] = ", ".join(names) or "unknown"
        facts["Run"] = f"{history.name}, step {history.step} of {history.config.get('max_steps')}"
    facts["Weights"] = f"{report.num_parameters / 1e6:.2f} M parameters in {report.dtype}"
    return "".join(f"- **{key}**: {value}\n" for key, value in facts.items())


def trained(source: Source) -> str:
    """Return what of the model training changed."""
    if not source.is_adapter:
        if flags := [name for name in FREEZING if source.config.get(name)]:
            return f"all but what {', '.join(flags)} of config.json say"
        return _trained_itself(source.history.config if source.history else {})
    keys = source.adapter
    kind = "DoRA" if keys.get("use_dora") else "rsLoRA" if keys.get("use_rslora") else "LoRA"
    size = f" of rank {keys.get('r')}, alpha {keys.get('lora_alpha')}," if "r" in keys else ""
    targets = keys.get("target_modules") or "?"
    if not isinstance(targets, str):  # layers by *, where they are named one by one
        targets = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in targets}))
    saved = keys.get("modules_to_save") or []
    beside = f"; {', '.join(saved)} as a whole" if saved else ""
    what = kind if keys["peft_type"] == "LORA" else str(keys["peft_type"])
    kept = "" if source.quantize == NONE else f", which {source.quantize} rounded as in training"
    return f"{what}{size} on {targets}{beside}; merged into the weights{kept}"


def _trained_itself(config: dict[str, Any]) -> str:
    freeze = config.get("freeze", {})
    if freeze.get("new_tokens"):
        tokens = config.get("model", {}).get("additional_tokens") or ()
        names = f" for {', '.join(f'`{token}`' for token in tokens)}" if tokens else ""
        return f"new rows of the vocabulary{names}; merged into embedding and head"
    groups = freeze.get("groups", {}).values()
    frozen = [
        *freeze.get("frozen", ()),
        *(n for g in groups if g.get("frozen") for n in g["names"]),
    ]
    return f"all but {', '.join(frozen)}" if frozen else "every weight"


def _evaluation(found: dict[str, Any]) -> str:
    hidden = ("step", "split", "time")
    numbers = {
        name: value
        for name, value in found.items()
        if name not in hidden and not name.startswith("num_") and not isinstance(value, dict)
    }
    rows = "".join(
        f"| {name} | {value:.4f} |\n" if isinstance(value, float) else f"| {name} | {value} |\n"
        for name, value in numbers.items()
    )
    read = extent_in_words(found) or f"Held-out data, {found.get('num_targets', 0):,} targets"
    head = f"## Evaluation\n\n{read}, at step {found['step']}.\n\n"
    return f"{head}| | |\n|---|---|\n{rows}"


def code(source: Source, name: str) -> str:
    """Return lines of Python that load and ask the model."""
    kind = auto_class(source)
    load = (
        f"from transformers import {kind}, AutoTokenizer\n\n"
        f'folder = "{name}"  # where this folder is, or its name on the Hub\n'
        f"tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"model = {kind}.from_pretrained(folder)\n"
    )
    if source.head == SEQUENCE:
        kind = source.config.get("problem_type") or ""
        return load + _CLASSIFY.format(activation=_ACTIVATIONS.get(kind, ".softmax(-1)"))
    if source.head == TOKEN:
        encoder = source.history.config["data"].get("encoder", {}) if source.history else {}
        place = f"a word's tag stands on its {encoder.get('align', 'last')} token"
        return load + _TAG.format(place=place)
    if source.config.get("model_type") == IDEFICS:
        return load + _ASK_IMAGE + _WRITE
    return load + (_ASK_CHAT if source.tokenizer.chat_template else _ASK) + _WRITE


def _compared(report: "Report") -> str:
    lines = "".join(
        f"- in {check.dtype}: largest difference {check.largest:.2g}, largest logit "
        f"{check.scale:.3g}\n"
        for check in report.checks
    )
    packages = environment(1)["packages"]
    return (
        f"## Compared\n\nThis folder was opened with transformers {packages['transformers']} and "
        f"compared with the checkpoint, over {report.num_tokens} tokens of {report.num_prompts} "
        f"texts:\n\n{lines}"
    )


def _settings(history: History) -> str:
    config, versions = history.config, history.environment.get("packages", {})
    kept = ("seed", "precision", "max_steps", "optim", "schedule", "task", "freeze")
    settings = {key: plain for key in kept if (plain := _plain(config.get(key))) not in (None, {})}
    data = config.get("data", {})
    sizes = ("row_tokens", "global_documents", "global_rows")
    settings["data"] = {key: data[key] for key in sizes if key in data}
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())
    names = [f"{name} {versions[name]}" for name in ("torch", "transformers") if versions.get(name)]
    commit = history.environment.get("git_commit")
    made = ", ".join([*names, *([f"commit {commit}"] if commit else [])])
    return (
        f"## Training\n\n```yaml\n{lines}```\n\nTessera {versions.get('tessera-train')}, {made}.\n"
    )


def _plain(value: Any) -> Any:
    """Return a group's settings without its class."""
    if not isinstance(value, dict):
        return value
    return {key: each for key, each in value.items() if key != "_target_"}
