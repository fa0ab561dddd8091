"""Settings of adapters: what they name, what trains, learning rates, and every refusal."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parity.oracle import specs
from launch.compose import compose
from models import heads
from models.nn.init import initializers
from tests.conftest import tiny_spec
from tests.runs import tiny_run
from tests.tasks import HeadTask
from trainer.adapters.lora import IA3, LoRA
from trainer.adapters.targets import ALL_LINEAR, find_targets
from trainer.freeze import FreezeSpec
from trainer.optim import SGD, AdamW
from trainer.optimizers.rules import Rules
from trainer.parallel.materialise import random_values
from trainer.pieces import Piece
from trainer.run import Run

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def run_with(adapter: Any, **changes: Any) -> Run:
    return tiny_run(None, adapter=adapter, **changes)


def targets(run: Run, *patterns: str) -> list[str]:
    return find_targets(run.plan_model(), run.model.layout, patterns)


def trained(run: Run) -> set[str]:
    model = run.trained_model()
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_all_linear_is_every_linear_of_the_layers_and_no_head() -> None:
    run = run_with(LoRA(), model=tiny_spec(tie_word_embeddings=False))
    found = targets(run, ALL_LINEAR)
    assert len(found) == 2 * len(LINEARS)
    assert {name.rpartition(".")[2] for name in found} == LINEARS


def test_a_pattern_is_a_name_or_its_end() -> None:
    run = run_with(LoRA())
    q = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert targets(run, "q_proj") == targets(run, "self_attn.q_proj") == q
    assert targets(run, "model.layers.1.*.q_proj") == q[1:]
    assert targets(run, "*q_proj", "q_proj") == q
    assert len(targets(run, "mlp.*")) == 6
    assert targets(run, "down_proj", "q_proj")[0] == q[0]  # in the order of the model


def test_a_tower_that_sees_images_is_adapted_only_where_its_name_is_given() -> None:
    run = run_with(LoRA(), model=specs()["Idefics"])
    tower = "model.vision_model."
    for pattern in (ALL_LINEAR, "q_proj"):
        found = targets(run, pattern)
        assert found
        assert not [name for name in found if name.startswith((tower, "model.perceiver"))]
    assert {n.startswith(tower) for n in targets(run, f"{tower}*.q_proj")} == {True}


def test_adapters_train_and_everything_else_is_frozen() -> None:
    run = run_with(LoRA(targets=("q_proj",)))
    ends = {name.partition("q_proj.")[2] for name in trained(run)}
    assert ends == {"lora_A.weight", "lora_B.weight"}
    assert len(trained(run)) == 4


@pytest.mark.parametrize(("head", "name"), [(heads.SEQUENCE, "score"), (heads.TOKEN, "score")])
def test_a_head_that_is_no_language_models_trains_with_the_adapter(head: str, name: str) -> None:
    run = run_with(LoRA(targets=("q_proj",)), task=HeadTask(head=head))
    assert f"{name}.weight" in trained(run)
    config = run.adapter.peft_config(run.trained_model())
    assert config is not None
    assert config["modules_to_save"] == [name]
    assert config["task_type"] == {heads.SEQUENCE: "SEQ_CLS", heads.TOKEN: "TOKEN_CLS"}[head]


def test_modules_to_save_train_as_a_whole() -> None:
    spec = tiny_spec(tie_word_embeddings=False)
    run = run_with(LoRA(targets=("q_proj",), modules_to_save=("lm_head", "norm")), model=spec)
    assert {"lm_head.weight", "model.norm.weight"} <= trained(run)
    assert "model.embed_tokens.weight" not in trained(run)


def test_the_base_starts_as_without_an_adapter() -> None:
    plain, run = tiny_run(None).plan_model(), run_with(LoRA(use_dora=True))
    adapted = run.trained_model()
    inits = initializers(plain, 0.02)
    assert inits.items() <= initializers(adapted, 0.02).items()
    values = run.adapter.values(adapted, random_values(adapted, 0.02, 0))
    expected = random_values(plain, 0.02, 0)
    for name, parameter in plain.named_parameters():
        assert torch.equal(values(name, 0, parameter.numel()), expected(name, 0, parameter.numel()))


def test_a_magnitude_starts_as_the_length_of_its_row_whoever_asks_for_which() -> None:
    run = run_with(LoRA(use_dora=True))
    model = run.trained_model()
    values = run.adapter.values(model, random_values(model, 0.02, 0))
    name = "model.layers.1.mlp.down_proj"
    linear = model.get_submodule(name)
    weight = values(f"{name}.weight", 0, linear.weight.numel()).view(linear.weight.shape)
    lengths = torch.tensor([float(row.square().sum().sqrt()) for row in weight])
    found = [values(f"{name}.lora_magnitude_vector", *part) for part in ((0, 5), (5, 5), (5, 16))]
    assert torch.allclose(torch.cat(found), lengths, rtol=1e-6)


def test_b_has_its_own_learning_rate_and_ia3_no_decay() -> None:
    """LoRA+: B moves by ratio times what A moves, of equal gradients."""
    run = run_with(LoRA(lr_ratio=16.0))
    names = ("x.lora_A.weight", "x.lora_B.weight", "score.weight", "x.ia3_l")
    weights = {name: torch.ones(2, 3, requires_grad=True) for name in names}
    pieces = {name: Piece.of(weight.detach()) for name, weight in weights.items()}
    rules = Rules(no_decay=IA3().undecayed, lr_ratios=run.adapter.lr_ratios)
    for spec in (SGD(lr=0.01), AdamW(lr=0.01, weight_decay=0.0)):
        before = {name: piece.local.clone() for name, piece in pieces.items()}
        optimizer = spec.build(pieces=pieces, rules=rules)
        for piece in pieces.values():
            piece.local.grad = torch.ones(2, 3)
        optimizer.step()
        moved = {n: float((before[n] - piece.local).mean()) for n, piece in pieces.items()}
        assert moved["x.lora_B.weight"] == pytest.approx(16 * moved["x.lora_A.weight"], rel=1e-4)
        assert moved["score.weight"] == pytest.approx(moved["x.lora_A.weight"], rel=1e-4)
    decays = {
        id(weight): group["weight_decay"]
        for group in AdamW(lr=0.01, weight_decay=0.5).build(pieces=pieces, rules=rules).param_groups
        for weight in group["params"]
    }
    assert [decays[id(pieces[name].local)] for name in names] == [0.5, 0.5, 0.5, 0.0]


def test_names_in_pefts_config_are_short_where_they_mean_the_same() -> None:
    for patterns, expected in (
        (("q_proj", "v_proj"), ["q_proj", "v_proj"]),
        (("model.layers.1.*.q_proj",), ["model.layers.1.self_attn.q_proj"]),
    ):
        run = run_with(LoRA(targets=patterns))
        config = run.adapter.peft_config(run.trained_model())
        assert config is not None
        assert config["target_modules"] == expected
    run = run_with(IA3(targets=("layers.0.*.k_proj",), feedforward_targets=("layers.1.*.k_proj",)))
    config = run.adapter.peft_config(run.trained_model())
    assert config is not None
    assert set(config["feedforward_modules"]) < set(config["target_modules"])


UNTIED = tiny_spec(tie_word_embeddings=False)
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (LoRA(targets=("q_prj",)), {}, r"adapter.targets='q_prj' matches no linear; .* q_proj"),
    (LoRA(targets=("lm_head",)), {}, r"the head is tied to the embedding, .*; take it out"),
    (LoRA(targets=("embed_tokens",)), {}, r"the head is tied to the embedding"),
    (
        LoRA(targets=("lm_head",)), {"model": UNTIED},
        r"is no linear of a layer, .*adapter.modules_to_save=\[lm_head\]",
    ),
    (LoRA(modules_to_save=("lm_head",)), {}, r"peft would untie them .*tie_word_embeddings=false"),
    (LoRA(modules_to_save=("scor",)), {"model": UNTIED}, r"matches no module with weights; "),
    (LoRA(modules_to_save=("mlp",)), {}, r"modules_to_save='mlp' has an adapter too"),
    (LoRA(), {"model": tiny_spec(pretraining_tp=2)}, r"set model.pretraining_tp=1"),
    (LoRA(), {"freeze": FreezeSpec(frozen=("model.norm.*",))}, r"no effect .*; set freeze=none"),
    (IA3(feedforward_targets=("k_proj",)), {}, r"both name model.layers.0.self_attn.k_proj"),
]  # fmt: skip


@pytest.mark.parametrize(("adapter", "changes", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_the_check(
    adapter: Any, changes: dict[str, Any], message: str, cache: Path
) -> None:
    run = replace(tiny_run(cache), adapter=adapter, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        run.check(1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"rank": 0}, "adapter.rank=0 is not positive"),
        ({"alpha": 0.0}, "adapter.alpha=0.0 is not positive"),
        ({"dropout": 1.0}, "adapter.dropout=1.0 is no probability below 1"),
        ({"lr_ratio": 0.0}, "adapter.lr_ratio=0.0 is not positive"),
        ({"targets": ()}, r"adapter.targets=\[\] adapts nothing"),
    ],
)
def test_impossible_settings_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**words)


def test_the_choices_of_the_menu_differ_as_their_names_say() -> None:
    def tree(choice: str) -> Any:
        return compose(["experiment=demo", f"adapter={choice}"]).tree["adapter"]

    assert tree("rslora")["use_rslora"]
    assert tree("dora")["use_dora"]
    assert "NoAdapter" in tree("none")["_target_"]
    assert LoRA(rank=64, alpha=16, use_rslora=True).scale == 2.0
    assert LoRA(rank=16, alpha=32).scale == 2.0
