"""Every YAML of the menu composes, binds and builds; only plain values leave Hydra."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch.binding import bind
from launch.compose import compose, parsed
from launch.menu import config_folder, groups
from tests.adapters import write_adapter
from tests.token_folders import write_folder
from trainer.parallel.pieces import unique_parameters
from trainer.run import Run

# What a choice leaves for the user to say.
MANDATORY = {
    "adapter=pretrained": ["adapter.path={adapter}"],
    "data=chat": ["data.path=rows.jsonl"],
    "data=preferences": ["data.path={pairs}", "task=dpo", "adapter=lora"],
    "data=sequence_labels": ["data.path={texts}", "task=sequence_classification"],
    "data=text": ["data.path=stdlib"],
    "data=token_labels": ["data.path={words}", "task=token_classification"],
    "data=tokens": ["data.path={tokens}"],
    "data=vision_text": ["data.path={rows}", "model=idefics_tiny"],
    "experiment=continued_pretraining": [
        "data.path={rows}", "data.column=prompt", "model.path={folder}", "data.row_tokens=64",
    ],
    "experiment=idefics_caption": ["data.path={rows}"],
    "experiment=idefics_interleaved": ["data.path={rows}"],
    "experiment=idefics_lora": ["data.path={rows}", "model.text={folder}", "data.row_tokens=64"],
    "experiment=idefics_vqa": ["data.path={rows}"],
    "experiment=pretrain_text": ["data.path=stdlib"],
    "experiment=sequence_classification": [
        "data.path={texts}", "model.path={folder}", "data.row_tokens=64",
    ],
    "experiment=reward_modelling": [
        "data.path={pairs}", "model.path={folder}", "data.row_tokens=64",
    ],
    "experiment=dpo": [
        "data.path={pairs}", "model.path={folder}", "data.row_tokens=64",
    ],
    "experiment=token_classification": [
        "data.path={words}", "model.path={folder}", "data.row_tokens=64",
    ],
    "experiment=sft": ["data.path={rows}", "model.path={folder}", "data.row_tokens=64"],
    "experiment=pretrain_tokens": ["data.path={tokens}", "eval_every=null"],
    "freeze=groups": [
        "freeze.groups.low.names=['model.layers.[0-1].*']", "freeze.groups.low.unfreeze_at=9",
    ],
    "freeze=idefics_frozen": ["model=idefics_tiny"],
    "freeze=idefics_rates": ["model=idefics_tiny"],
    "freeze=idefics_stages": ["model=idefics_tiny"],
    "freeze=new_tokens": ["model.additional_tokens=[self]"],
    "freeze=parts": ["freeze.frozen=[model.layers.0.*]"],
    "model=idefics": ["model.text={folder}"],
    "model=pretrained": ["model.path={folder}"],
    "model=hf_auto": ["model.path={folder}"],
    "task=dpo": ["data=preferences", "data.path={pairs}", "adapter=lora"],
    "task=reward": ["data=preferences", "data.path={pairs}", "data.encoder.learns=reward"],
    "task=sequence_classification": ["data=sequence_labels", "data.path={texts}"],
    "task=token_classification": ["data=token_labels", "data.path={words}"],
}  # fmt: skip
ROWS = {
    "pairs": '{"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3"}\n',
    "rows": '{"prompt": "1 + 1 = ", "completion": "2"}\n',
    "texts": '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n',
    "words": '{"tokens": ["a", "b"], "tags": ["X", "Y"]}\n',
}
CHOICES = [
    f"{group}={choice}"
    for group, choices in groups().items()
    if group != "experiment"
    for choice in choices
]
EXPERIMENTS = [f"experiment={name}" for name in groups()["experiment"]]


def bound(*words: str) -> Run:
    """Compose and bind a command line."""
    return bound_tree(compose(list(words)).tree)


def bound_tree(tree: dict[str, Any]) -> Run:
    bind(tree["launch"], "launch")
    settings = {key: value for key, value in tree.items() if key != "launch"}
    run = bind({**settings, "name": "test"})
    assert isinstance(run, Run)
    return run


def rows_in(folder: Path) -> dict[str, Path]:
    """Write a small file of each kind of rows; return their paths by kind."""
    paths = {name: folder / f"{name}.jsonl" for name in ROWS}
    for name, path in paths.items():
        path.write_text(ROWS[name])
    return paths


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for _, parameter in unique_parameters(model))


def containers(value: Any) -> list[type]:
    """Return the types of `value` and of all that it holds."""
    found = [type(value)]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        found += containers(item)
    return found


def test_every_file_is_a_choice_of_the_menu() -> None:
    folder = config_folder()
    on_menu = {
        folder / group / f"{choice}.yaml" for group, all_of in groups().items() for choice in all_of
    }
    assert set(folder.rglob("*.y*ml")) == on_menu | {folder / "train.yaml"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_fits_a_run_and_plans_its_model(
    experiment: str, tmp_path: Path, model_folder: Path
) -> None:
    write_folder(tmp_path / "tokens", [50, 20], shard_tokens=30, name="train")
    places = {"tokens": tmp_path / "tokens", "folder": model_folder, **rows_in(tmp_path)}
    needed = [option.format(**places) for option in MANDATORY.get(experiment, [])]
    run = bound(experiment, *needed)
    run.check(world_size=1)
    model = run.plan_model()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert num_parameters(model) > 0


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_fits_the_demo_and_plans_its_model(
    choice: str, tmp_path: Path, model_folder: Path
) -> None:
    places = {"folder": model_folder, "tokens": "tokens", **rows_in(tmp_path)}
    places["adapter"] = tmp_path / "adapter"
    if choice == "adapter=pretrained":
        write_adapter(tmp_path / "adapter", bound("experiment=demo", "adapter=lora"))
    needed = [option.format(**places) for option in MANDATORY.get(choice, [])]
    tree = compose(["experiment=demo", choice, *needed]).tree
    group, _, name = choice.partition("=")
    file = yaml.safe_load((config_folder() / group / f"{name}.yaml").read_text())
    assert tree[group].get("_target_") == file.get("_target_")
    run = bound_tree(tree)
    model = run.trained_model()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert num_parameters(model) > 0


@pytest.mark.parametrize(
    "file", sorted(config_folder().rglob("*.yaml")), ids=lambda file: file.stem
)
def test_every_file_begins_with_what_it_is_and_stays_short(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert file.parent == config_folder() or len(lines) <= 30


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("smollm2_135m", 134_515_008),
        ("smollm2_360m", 361_821_120),
        ("smollm2_1_7b", 1_711_376_384),
        ("llama_3_2_1b", 1_235_814_400),
        ("llama_3_2_3b", 3_212_749_824),
        ("llama_3_1_70b", 70_553_706_496),
        ("llama_2_7b", 6_738_415_616),
        ("santacoder", 1_124_886_528),
        ("starcoderbase_1b", 1_137_207_296),
        ("starcoderbase_15b", 15_517_456_384),
        ("idefics_9b", 8_929_679_632),
        ("idefics_80b", 79_967_843_624),
        ("gemma_2b", 2_506_172_416),
        ("gemma_7b", 8_537_680_896),
        ("llama_3_1_8b", 8_030_261_248),
    ],
)
def test_public_model_has_its_public_number_of_parameters(choice: str, expected: int) -> None:
    model = bound("experiment=demo", f"model={choice}").plan_model()
    assert num_parameters(model) == expected


@pytest.mark.parametrize("words", [["experiment=demo"], ["freeze=parts", "freeze.frozen=[a,b]"]])
def test_plain_values_alone_leave_compose(words: list[str]) -> None:
    tree = compose(["data.path=x", "model=llama_3_2_1b", *words]).tree
    found = set(containers(tree))
    assert found <= {dict, list, str, int, float, bool, type(None)}
    assert {dict, list} <= found
    assert "hydra" not in tree


def test_values_of_the_command_line_win_over_the_experiment() -> None:
    tree = compose(["experiment=demo", "max_steps=7", "optim.lr=1", "optim=sgd"]).tree
    assert tree["max_steps"] == 7
    assert tree["optim"] == {"_target_": "trainer.optim.SGD", "lr": 1}
    assert tree["log_every"] == 20


def test_field_that_no_file_mentions_can_be_set() -> None:
    run = bound("experiment=demo", "optim.weight_decay=0.5", "model.rope_parameters.rope_theta=5")
    assert run.optim.weight_decay == 0.5
    assert run.model.rope_parameters.rope_theta == 5.0


def test_name_of_the_experiment_comes_with_the_tree() -> None:
    assert compose(["experiment=demo"]).experiment == "demo"
    assert compose(["data.path=x"]).experiment is None


def test_composing_twice_gives_the_same() -> None:
    assert compose(["experiment=demo"]) == compose(["experiment=demo"])


@pytest.fixture
def own_configs(tmp_path: Path) -> Path:
    """A user's folder with an experiment and a model of their own."""
    folder = tmp_path / "own"
    for group in ("experiment", "model"):
        (folder / group).mkdir(parents=True)
    (folder / "model" / "mine.yaml").write_text(
        "_target_: models.llama.LlamaSpec\n"
        "vocab_size: 300\nhidden_size: 48\nintermediate_size: 64\nnum_hidden_layers: 1\n"
        "num_attention_heads: 4\nnum_key_value_heads: 2\nmax_position_embeddings: 512\n"
    )
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /model: mine\n  - override /data: stdlib\n"
        "max_steps: 3\ntokenizer: byte\n"
    )
    return folder


def test_configs_of_the_user_work_beside_ours(own_configs: Path) -> None:
    words = [f"hydra.searchpath=[file://{own_configs}]", "experiment=mine", "schedule=constant"]
    assert compose(words).experiment == "mine"
    run = bound(*words)
    assert (run.max_steps, run.model.vocab_size) == (3, 300)
    run.check(world_size=1)
    assert num_parameters(run.plan_model()) > 0


def test_configs_of_the_user_are_checked_like_ours(own_configs: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (own_configs / "model" / "mine.yaml").write_text(
        f"_target_: os.system\ncommand: touch {canary}\n"
    )
    with pytest.raises(ValueError, match=r"model\._target_='os.system' is not one of"):
        bound(f"hydra.searchpath=[file://{own_configs}]", "experiment=mine")
    assert not canary.exists()


def test_composing_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bound("experiment=demo").check(world_size=1)
    with pytest.raises(ValueError, match="model has no choice"):
        compose(["model=nothing"])
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    ("override", "example"),
    [
        ("adapter.targets=[model.layers.[0-3].q_proj]", """'adapter.targets=["..."]'"""),
        ("data.path={a", """'data.path="..."'"""),
    ],
)
def test_a_value_that_cannot_be_read_is_told_about_quotes(override: str, example: str) -> None:
    with pytest.raises(ValueError, match=r"put quotes around") as caught:
        compose(["experiment=sft", override])
    assert str(caught.value).startswith(f"{override}: ")
    assert str(caught.value).endswith(example)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"put quotes around"):
        parsed(override)
