"""Which parameters train: patterns, groups, what is said of them, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.conftest import tiny_spec
from tests.runs import tiny_run
from trainer.adapters.lora import LoRA
from trainer.freeze import FreezeSpec, Group
from trainer.optim import AdamW
from trainer.parallel.pieces import named_pieces
from trainer.trained import Trained


def model_of(**changes: Any) -> nn.Module:
    return tiny_spec(**changes).build_causal_lm(chunk_tokens=8)


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_globs_and_regular_expressions_name_parameters() -> None:
    by_glob, by_regex = model_of(), model_of()
    FreezeSpec(frozen=("model.layers.[0-1].mlp.*",)).apply(by_glob)
    FreezeSpec(frozen=(r"re:model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight",)).apply(by_regex)
    assert frozen_names(by_glob) == frozen_names(by_regex)
    assert len(frozen_names(by_glob)) == 6


def test_a_group_is_frozen_up_to_its_step_and_trains_from_the_next() -> None:
    freeze = FreezeSpec(
        frozen=("model.norm.*",),
        groups={
            "low": Group(names=("model.layers.0.*",), unfreeze_at=2),
            "high": Group(names=("model.layers.1.*",), unfreeze_at=5),
        },
    )
    assert freeze.borders == (2, 5)
    for step, layers in ((1, {"0", "1"}), (2, {"0", "1"}), (3, {"1"}), (5, {"1"}), (6, set())):
        model = model_of()
        freeze.apply(model, step)
        names = frozen_names(model)
        assert "model.norm.weight" in names
        assert {name.split(".")[2] for name in names - {"model.norm.weight"}} == layers


def test_a_tied_weight_goes_by_either_of_its_names() -> None:
    for pattern in ("lm_head.*", "model.embed_tokens.*"):
        model = model_of(tie_word_embeddings=True)
        FreezeSpec(frozen=(pattern,)).apply(model)
        assert frozen_names(model) == {"model.embed_tokens.weight"}
    both = FreezeSpec(
        frozen=("model.embed_tokens.*",),
        groups={"head": Group(names=("lm_head.*",), lr_ratio=2.0)},
    )
    with pytest.raises(ValueError, match=r"is in freeze.frozen and in freeze.groups.head \(a tied"):
        both.apply(model_of(tie_word_embeddings=True))
    both.apply(model_of(tie_word_embeddings=False))


def test_groups_set_rates_and_decays_and_an_adapter_keeps_its_own(cache: Path) -> None:
    groups = {
        "late": Group(names=("*.1.*.lora_?.weight",), lr_ratio=3.0),
        "low": Group(names=("*.0.mlp.up_proj.lora_*",), weight_decay=0.5),
    }
    adapter = LoRA(rank=2, targets=("up_proj",), lr_ratio=16.0)
    run = tiny_run(cache, adapter=adapter, freeze=FreezeSpec(groups=groups))
    model = run.trained_model()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamW(lr=1.0, weight_decay=0.1).build(
        pieces={
            name: piece.like(trained[name]) for name, piece in named_pieces(trained.items()).items()
        },
        rules=run.rules(model),
    )
    names = {id(p): name for name, p in trained.items()}
    found = {
        names[id(weight)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    layer = "model.layers.{}.mlp.up_proj.lora_{}.weight".format
    assert found == {
        layer(0, "A"): (1.0, 0.5), layer(0, "B"): (16.0, 0.5),
        layer(1, "A"): (3.0, 0.1), layer(1, "B"): (3.0, 0.1),
    }  # fmt: skip


def test_what_trains_is_said_in_tensors_parameters_and_shares() -> None:
    groups = {
        "norms": Group(names=("*norm*",), unfreeze_at=4, lr_ratio=0.5),
        "head": Group(names=("lm_head.*",), weight_decay=0.02),
    }
    freeze, model = FreezeSpec(groups=groups), model_of(tie_word_embeddings=False)
    freeze.apply(model)
    whole = sum(p.numel() for p in model.parameters())
    trained = Trained.of(freeze, model, 1)
    assert trained.describe() == (
        f"16 of 21 tensors, {whole - 80:,} of {whole:,} parameters ({1 - 80 / whole:.2%}); "
        f"norms: 5 tensors, 80 parameters ({80 / whole:.2%}), from step 5 on, lr x 0.5; "
        f"head: 1 tensor, 4,128 parameters ({4128 / whole:.2%}), weight decay 0.02"
    )


HEAD = {"names": ("lm_head.*",)}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"names": (), "lr_ratio": 2.0}, "names=[] names no parameter"),
        ({**HEAD}, "changes nothing; set frozen=true"),
        ({**HEAD, "frozen": True, "lr_ratio": 2.0}, "lr_ratio=2.0 has no effect on a group that"),
        ({**HEAD, "frozen": True, "unfreeze_at": 2}, "unfreeze_at=2 has no effect"),
        ({**HEAD, "unfreeze_at": 0}, "unfreeze_at=0 is not positive"),
        ({**HEAD, "lr_ratio": 0.0}, "lr_ratio=0.0 is not positive; set it above 0, or frozen=true"),
        ({**HEAD, "weight_decay": -1.0}, "weight_decay=-1.0: set it to 0 or more"),
        ({"names": ("re:lm_(",), "lr_ratio": 2.0}, "names='re:lm_(' is no regular expression"),
    ],
)
def test_a_group_that_says_nothing_or_two_things_is_refused(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Group(**settings)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"a": {"names": ("lm_haed.*",), "lr_ratio": 2.0}}, "a='lm_haed.*' matches no"),
        ({"a": {"names": ("*",), "unfreeze_at": 2}}, "leaves nothing to train at step 1"),
        ({"a": {**HEAD, "unfreeze_at": 10}}, "unfreeze_at=10 is not before the end, max_steps=10"),
        (
            {"a": {"names": ("*norm*",), "weight_decay": 0.1}},
            "freeze.groups.a.weight_decay=0.1 has no effect on norms, biases, gates and embeddings",
        ),
        (
            {"a": {**HEAD, "lr_ratio": 2.0}, "b": {"names": ("lm_*",), "weight_decay": 0.0}},
            "lm_head.weight is in freeze.groups.a and in freeze.groups.b",
        ),
    ],
)  # fmt: skip
def test_groups_that_fit_no_model_or_run_are_refused_before_any_process(
    cache: Path, groups: dict[str, Any], says: str
) -> None:
    freeze = FreezeSpec(groups={name: Group(**settings) for name, settings in groups.items()})
    run = tiny_run(cache, model=tiny_spec(tie_word_embeddings=False), freeze=freeze)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        run.check(1)
    assert says in str(caught.value)


def test_beside_an_adapter_groups_set_rates_and_freeze_nothing(cache: Path) -> None:
    for group, says in (
        (
            Group(names=("*.lora_A.*",), unfreeze_at=2),
            "freeze.groups.a.unfreeze_at=2 has no effect",
        ),
        (Group(names=("*.lora_A.*",), frozen=True), "freeze.groups.a.frozen=true has no effect"),
        (Group(names=("model.norm.*",), lr_ratio=2.0), "freeze.groups.a has no effect"),
    ):
        run = tiny_run(cache, adapter=LoRA(), freeze=FreezeSpec(groups={"a": group}))
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            run.check(1)
        assert says in str(caught.value)


def test_a_smaller_model_keeps_the_patterns_that_still_match() -> None:
    low = Group(names=("model.layers.0.*", "model.layers.30.*"), unfreeze_at=2)
    gone = Group(names=("model.layers.31.*",), lr_ratio=2.0)
    freeze = FreezeSpec(frozen=("lm_head.*", "score.*"), groups={"low": low, "gone": gone})
    kept = freeze.fitting(model_of())
    assert kept.patterns == ["lm_head.*", "model.layers.0.*"]
    assert kept.groups == {"low": replace(low, names=("model.layers.0.*",))}
