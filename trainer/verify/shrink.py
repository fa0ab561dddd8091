"""The user's run at a size that fits: same family, same ratio of heads, same flags."""

import dataclasses
from dataclasses import replace
from math import lcm
from typing import Any

from models.nn.prompt import virtual_ids
from trainer.adapters.targets import ALL_LINEAR, fits
from trainer.freeze import FreezeSpec
from trainer.run import Run
from trainer.settings import RANDOM
from trainer.tasks.emphasis import BALANCED
from trainer.verify.made_labels import MadeLabels
from trainer.verify.measure import ADAM_EPS
from trainer.verify.rows import MadeRows

HEAD_DIM, LAYERS, VOCABULARY, TOKENS, IMAGE = 8, 4, 257, 32, 12
MAX_STEPS = 1000
VIRTUAL = 3
STD = 0.1  # weights large enough that every part of the model matters
HEADS = 4  # so that two and four ranks can share them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """A run that one process computes in milliseconds, and what of the user's it changed."""

    run: Run
    rows: MadeRows
    notes: tuple[str, ...]


def shrink(run: Run) -> Small:
    """Return the small run in fp64; ValueError for a model that is read through transformers."""
    spec: Any = getattr(run.model, "spec", run.model)
    if not run.model.layout.norm:
        raise ValueError(
            f"{type(run.model).__name__} is read through transformers, whose size is not ours to "
            "change; verify with a family of ours"
        )
    small, notes = shrink_spec(replace(spec, additional_tokens=run.model.additional_tokens))
    adapter, more = _adapter(run, small)
    notes += more
    whole = replace(run, model=small, adapter=adapter, freeze=FreezeSpec()).trained_model()
    freeze = run.freeze.fitting(whole)
    if lost := [p for p in run.freeze.patterns if p not in freeze.patterns]:
        notes.append(f"freeze patterns of layers that the small model lacks: {', '.join(lost)}")
    engine: Any = run.engine
    if engine.is_compiled:
        notes.append("engine.compile=false")
        engine = replace(engine, compile=False)
    optim: Any = run.optim
    if hasattr(optim, "eps"):
        notes.append(
            f"optim.eps={ADAM_EPS}, so that gradients of nothing but rounding move nothing"
        )
        optim = replace(optim, eps=ADAM_EPS)
    labels = run.data.labels
    task: Any = run.task
    if hasattr(task, "dropout"):
        notes.append("task.dropout=0")
        task = replace(task, dropout=0.0)
    max_steps = run.max_steps
    if max_steps is None:
        notes.append(f"max_steps={MAX_STEPS} for max_epochs, as no data is read")
        max_steps = MAX_STEPS
    if labels and getattr(task, "class_weights", None) == BALANCED:
        notes.append("task.class_weights=1, 2, .. for balanced, as no data is read")
        weights = {name: place + 1.0 for place, name in enumerate(labels.names)}
        task = replace(task, class_weights=weights)
    rows = MadeRows(
        vocab_size=small.vocab_size
        + getattr(small, "additional_vocab_size", 0)
        + len(small.additional_tokens),
        tokens=TOKENS,
        relabel=MadeLabels(labels=labels) if labels else None,
        virtual_ids=virtual_ids(whole),
        images=(2, 3, IMAGE) if hasattr(small, "vision_config") else None,
    )
    changed = replace(
        run, model=small, task=task, engine=engine, optim=optim, precision="fp64", weights=RANDOM,
        tokenizer="byte", freeze=freeze, adapter=adapter,
        data=replace(run.data, micro_rows=rows.micro_rows), max_steps=max_steps, max_epochs=None,
    )  # fmt: skip
    return Small(run=changed, rows=rows, notes=tuple(notes))


def shrink_spec(spec: Any) -> tuple[Any, list[str]]:
    """Return the family's spec at a small size, and what else of it was changed."""
    names = {field.name for field in dataclasses.fields(spec)}
    changes = _bigcode(spec) if "n_embd" in names else _decoder(spec, names)
    changes["initializer_range"] = STD
    notes = []
    drops = [
        name
        for name in names
        if ("dropout" in name or name.endswith("pdrop")) and getattr(spec, name)
    ]
    changes |= dict.fromkeys(drops, 0.0)
    if drops:
        notes.append(f"dropout switched off: {', '.join(sorted(drops))}")
    if spec.attn_implementation not in ("auto", "eager", "sdpa"):
        changes["attn_implementation"] = "sdpa"
        notes.append(f"attention by sdpa, not {spec.attn_implementation}: this runs on the CPU")
    return replace(spec, **changes), notes


def _decoder(spec: Any, names: set[str]) -> dict[str, Any]:
    shared = spec.num_key_value_heads or spec.num_attention_heads
    groups, is_shared = spec.num_attention_heads // shared, shared == 1
    heads = HEADS if is_shared else lcm(groups, HEADS)
    hidden = heads * HEAD_DIM
    changes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
    }
    if "num_key_value_heads" in names:
        changes["num_key_value_heads"] = 1 if is_shared else heads // groups
    if getattr(spec, "head_dim", None) is not None:
        is_plain = spec.head_dim * spec.num_attention_heads == spec.hidden_size
        changes["head_dim"] = HEAD_DIM if is_plain else 2 * HEAD_DIM
    if "pretraining_tp" in names:
        changes["pretraining_tp"] = 1
    if "vision_config" in names:
        changes |= _vision(spec)
    return changes


def _vision(spec: Any) -> dict[str, Any]:
    return {
        "additional_vocab_size": min(spec.additional_vocab_size, 3),
        "cross_layer_interval": min(spec.cross_layer_interval, 2),
        "alpha_initializer": "ones",  # at zero no gradient would reach the images
        "vision_config": replace(
            spec.vision_config, embed_dim=3 * HEAD_DIM, image_size=IMAGE, patch_size=IMAGE // 2,
            intermediate_size=4 * HEAD_DIM, num_hidden_layers=2, num_attention_heads=3,
            attention_dropout=0.0,
        ),
        "perceiver_config": replace(
            spec.perceiver_config, resampler_n_latents=3, resampler_depth=1, resampler_n_heads=2,
            resampler_head_dim=HEAD_DIM,
        ),
    }  # fmt: skip


def _bigcode(spec: Any) -> dict[str, Any]:
    width = HEADS * HEAD_DIM
    return {
        "vocab_size": VOCABULARY,
        "n_embd": width,
        "n_head": HEADS,
        "n_layer": LAYERS,
        "n_inner": None if spec.n_inner is None else 2 * width,
    }


def _adapter(run: Run, small: Any) -> tuple[Any, list[str]]:
    """Return the adapter at the small size, acting from the first step on, and what was changed."""
    adapter: Any = getattr(run.adapter, "inner", run.adapter)  # the numbers of a folder do not fit
    fields = {field.name for field in dataclasses.fields(adapter)}
    notes: list[str] = []
    changes: dict[str, Any] = {}
    if getattr(adapter, "dropout", 0.0):
        notes.append("adapter.dropout=0")
        changes["dropout"] = 0.0
    if "init_lora_weights" in fields:
        notes.append("the adapter's B starts at random: from zero, no gradient would reach A")
        changes["init_lora_weights"] = False
    if getattr(adapter, "num_virtual_tokens", 0) > VIRTUAL:
        notes.append(f"adapter.num_virtual_tokens={VIRTUAL}, which fit the small rows")
        changes["num_virtual_tokens"] = VIRTUAL
    modules = [name for name, _ in replace(run, model=small).plan_model().named_modules()]
    for field in sorted(fields & {"targets", "feedforward_targets", "modules_to_save"}):
        patterns = getattr(adapter, field)
        is_known = {p: p == ALL_LINEAR or any(fits(n, p) for n in modules) for p in patterns}
        if lost := [pattern for pattern, known in is_known.items() if not known]:
            notes.append(f"adapter.{field} that the small model lacks: {', '.join(lost)}")
            changes[field] = tuple(pattern for pattern in patterns if is_known[pattern])
    return replace(adapter, **changes), notes
