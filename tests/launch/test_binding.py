"""What a config tree may say, what it is told when it says something else, what it can never do."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.binding import bind
from launch.compose import compose
from models.nn.rope import RopeParameters
from trainer.run import Run

TARGET = "_target_"
SGD = "trainer.optim.SGD"


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """The demo with a model that has nested settings: groups within groups within the root."""
    tree = compose(["experiment=demo", "model=llama_3_2_1b"]).tree
    del tree["launch"]
    return {**tree, "name": "test"}


@pytest.fixture
def tree(composed: dict[str, Any]) -> dict[str, Any]:
    return deepcopy(composed)


def keys(tree: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the dotted path of every key of every spec in `tree`."""
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if key != TARGET and path != "callbacks":  # which names its listeners freely
            yield here
        if isinstance(value, dict):
            yield from keys(value, here)


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted key."""
    *parents, last = path.split(".")
    for parent in parents:
        tree = tree[parent]
    tree[last] = value


def refusal(tree: dict[str, Any]) -> str:
    """Return the message that binding `tree` ends with: always one line."""
    with pytest.raises(ValueError, match=r".") as caught:
        bind(tree)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_whole_config_binds_to_a_run(tree: dict[str, Any]) -> None:
    run = bind(tree)
    assert isinstance(run, Run)
    assert run.model.vocab_size == 128256
    assert run.callbacks["ngrams"] is not None


def test_stored_config_binds_to_the_same_run(tree: dict[str, Any]) -> None:
    assert bind(yaml.safe_load(yaml.safe_dump(tree))) == bind(tree)


def test_binding_leaves_the_tree_as_it_was(tree: dict[str, Any], composed: dict[str, Any]) -> None:
    bind(tree)
    assert tree == composed


def test_unknown_key_at_every_depth_is_told_the_nearest_name(tree: dict[str, Any]) -> None:
    paths = list(keys(tree))
    assert {path.count(".") for path in paths} == {0, 1, 2}
    for path in paths:
        wrong = deepcopy(tree)
        put(wrong, f"{path}s", 1)
        assert f"unknown key {path}s; did you mean {path}?" in refusal(wrong)


def test_unknown_key_like_no_other_is_told_all_names(tree: dict[str, Any]) -> None:
    tree["optim"]["zzz"] = 1
    message = refusal(tree)
    assert "unknown key optim.zzz" in message
    assert "lr, betas, eps, weight_decay, max_grad_norm" in message


def test_misspelled_key_inside_a_listener_is_an_error(tree: dict[str, Any]) -> None:
    tree["callbacks"]["closing"]["prompts"] = "def"
    assert "callbacks.closing.prompts; did you mean callbacks.closing.prompt?" in refusal(tree)


@pytest.mark.parametrize("path", ["max_steps", "data.row_tokens", "optim.lr", "schedule", "runs"])
def test_missing_value_is_named_with_its_path(tree: dict[str, Any], path: str) -> None:
    *parents, last = path.split(".")
    holder = tree[parents[0]] if parents else tree
    del holder[last]
    assert f"{path} is missing; set {path}=..." in refusal(tree)


@pytest.mark.parametrize(
    ("path", "value", "fragments"),
    [
        ("optim.lr", "fast", ["optim.lr='fast'", "text", "needed a number"]),
        ("optim.lr", True, ["optim.lr=True", "true or false", "needed a number"]),
        ("optim.lr", None, ["optim.lr=None", "null", "needed a number"]),
        ("optim.lr", [1.0], ["optim.lr=[1.0]", "list", "needed a number"]),
        ("max_steps", "ten", ["max_steps='ten'", "text", "needed a whole number"]),
        ("max_steps", True, ["max_steps=True", "true or false", "needed a whole number"]),
        ("max_steps", 10.0, ["max_steps=10.0", "needed a whole number"]),
        ("seed", None, ["seed=None", "null", "needed a whole number"]),
        ("eval_every", False, ["eval_every=False", "true or false", "needed a whole number"]),
        ("model.tie_word_embeddings", 1, ["model.tie_word_embeddings=1", "needed true or false"]),
        ("model.vocab_size", {"a": 1}, ["model.vocab_size=", "a group of keys", "whole number"]),
        ("model.rope_parameters.factor", "8", ["model.rope_parameters.factor='8'", "a number"]),
        ("model.rope_parameters", 8, ["model.rope_parameters=8", "needed a group"]),
        ("name", 3, ["name=3", "needed text"]),
        ("name", None, ["name=None", "null", "needed text"]),
        ("data.path", ["a", "b"], ["data.path=", "list", "needed text"]),
        ("optim.betas", [0.9], ["optim.betas=[0.9]", "has 1 entries", "needed 2"]),
        ("optim.betas", [0.9, 0.9, 0.9], ["optim.betas=", "has 3 entries", "needed 2"]),
        ("optim.betas", [0.9, "high"], ["optim.betas[1]='high'", "text", "needed a number"]),
        ("optim.betas", 0.9, ["optim.betas=0.9", "needed a list"]),
        ("freeze.frozen", "lm_head.*", ["freeze.frozen='lm_head.*'", "text", "needed a list"]),
        ("freeze.frozen", ["a", 3], ["freeze.frozen[1]=3", "needed text"]),
        ("resume_allow", None, ["resume_allow=None", "null", "needed a list"]),
        ("model", "llama", ["model='llama'", "text", "a group with _target_"]),
        ("model", None, ["model=None", "null", "a group with _target_"]),
        ("callbacks", None, ["callbacks=None", "null"]),
        ("callbacks", "console", ["callbacks='console'", "text"]),
        ("callbacks.console", True, ["callbacks.console=True", "a group with _target_"]),
    ],
)
def test_value_of_the_wrong_type_is_one_line_with_its_path(
    tree: dict[str, Any], path: str, value: Any, fragments: list[str]
) -> None:
    put(tree, path, value)
    message = refusal(tree)
    for fragment in fragments:
        assert fragment in message


def test_refused_value_names_the_part_of_the_config_it_stands_in(tree: dict[str, Any]) -> None:
    tree["model"]["num_key_value_heads"] = 5
    message = refusal(tree)
    assert message.startswith("model: num_key_value_heads=5 does not divide")
    assert "32" in message


def test_null_stands_where_a_field_allows_it(tree: dict[str, Any]) -> None:
    tree["eval_every"] = None
    tree["optim"]["max_grad_norm"] = None
    tree["callbacks"]["console"] = None
    run = bind(tree)
    assert run.eval_every is None
    assert run.optim.max_grad_norm is None
    assert run.callbacks["console"] is None


def test_whole_numbers_become_floats_where_a_number_is_needed(tree: dict[str, Any]) -> None:
    tree["optim"] |= {"lr": 1, "betas": [0, 0.5]}
    tree["model"]["rope_parameters"]["factor"] = 32
    run = bind(tree)
    found = [run.optim.lr, *run.optim.betas, run.model.rope_parameters.factor]
    assert found == [1.0, 0.0, 0.5, 32.0]
    assert {type(value) for value in found} == {float}
    assert type(run.max_steps) is int


def test_lists_become_tuples_where_a_spec_wants_them(tree: dict[str, Any]) -> None:
    tree["freeze"]["frozen"] = ["lm_head.*"]
    run = bind(tree)
    assert run.freeze.frozen == ("lm_head.*",)
    assert run.optim.betas == (0.9, 0.95)
    assert run.resume_allow == []


def test_nested_settings_bind_without_a_target(tree: dict[str, Any]) -> None:
    assert TARGET not in tree["model"]["rope_parameters"]
    expected = RopeParameters(
        rope_type="llama3",
        rope_theta=500_000.0,
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    assert bind(tree).model.rope_parameters == expected


def test_nested_settings_bind_with_their_own_target_too(tree: dict[str, Any]) -> None:
    tree["model"]["rope_parameters"] = {TARGET: "models.nn.rope.RopeParameters", "rope_theta": 5}
    assert bind(tree).model.rope_parameters == RopeParameters(rope_theta=5.0)


@pytest.mark.parametrize(
    ("path", "target", "settings", "kind"),
    [
        ("optim", "trainer.schedule.Constant", {}, "OptimSpec"),
        ("schedule", SGD, {"lr": 0.1}, "Schedule"),
        ("model", "trainer.mesh.MeshSpec", {}, "CausalLMSpec"),
        ("engine", "trainer.mesh.MeshSpec", {}, "EngineSpec"),
        ("data", "models.nn.rope.RopeParameters", {}, "DataSpec"),
        ("model.rope_parameters", SGD, {"lr": 0.1}, "RopeParameters"),
        ("callbacks.console", "trainer.schedule.Constant", {}, "CallbackSpec"),
        # These have a `build` as well, which wants other things than a listener's.
        ("callbacks.console", "trainer.mesh.MeshSpec", {}, "CallbackSpec"),
        ("callbacks.console", SGD, {"lr": 0.1}, "CallbackSpec"),
    ],
)
def test_spec_of_another_kind_is_refused(
    tree: dict[str, Any], path: str, target: str, settings: dict[str, Any], kind: str
) -> None:
    put(tree, path, {TARGET: target, **settings})
    message = refusal(tree)
    assert f"{path}.{TARGET}={target} is no {kind}" in message
    assert f"{path}=..." in message


@pytest.mark.parametrize("path", ["name", "max_steps", "resume_allow", "optim.betas", "callbacks"])
def test_spec_where_a_plain_value_is_needed_is_refused(tree: dict[str, Any], path: str) -> None:
    put(tree, path, {TARGET: SGD, "lr": 0.1})
    assert path in refusal(tree)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "subprocess.run",
        "pickle.loads",
        "torch.load",
        "torch.nn.Linear",
        "numpy.load",
        "hydra.utils.instantiate",
        # One of our modules, but another's function seen through it.
        "trainer.run.torch.load",
        "trainer.construct.shutil.rmtree",
        "trainer.construct.json.loads",
        "launch.train.os.system",
        # Ours, but no specs: a foreign class, functions, a class with state, a module, a method.
        "trainer.construct.Path",
        "trainer.construct.fit",
        "launch.cli.main",
        "trainer.engines.native_trainer.NativeTrainer",
        "models.llama.Llama",
        "trainer.run",
        "trainer.run.Run.check",
        # A frozen dataclass under a name that it is not defined by.
        "trainer.construct.Placement",
        "trainer.run.MeshSpec",
        # No names at all.
        "trainer.no_such_module.Spec",
        "trainer.run.NoSuchSpec",
        ".trainer.run.Run",
        "trainer..run.Run",
        "Run",
        "",
        None,
        3,
        ["trainer.run.Run"],
    ],
)
def test_target_that_is_no_spec_of_ours_is_refused(tree: dict[str, Any], target: Any) -> None:
    tree["optim"] = {TARGET: target, "lr": 0.1}
    message = refusal(tree)
    assert f"optim.{TARGET}={target!r} is not one of Tessera's specs" in message
    assert "tessera list" in message


def test_config_without_a_target_is_refused() -> None:
    assert "the config has no _target_" in refusal({"max_steps": 3})


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "trainer.construct.shutil.rmtree", "pathlib.Path.unlink"],
)
@pytest.mark.parametrize("path", ["optim", "model.rope_parameters", "callbacks.console", "name"])
def test_refused_target_was_not_called(
    tree: dict[str, Any], tmp_path: Path, target: str, path: str
) -> None:
    kept, canary = tmp_path / "kept", tmp_path / "canary"
    kept.mkdir()
    by_target = {
        "os.system": {"command": f"touch {canary}"},
        "builtins.eval": {"source": f"open({str(canary)!r}, 'w')"},
        "trainer.construct.shutil.rmtree": {"path": str(kept)},
        "pathlib.Path.unlink": {"self": str(kept)},
    }
    put(tree, path, {TARGET: target, **by_target[target]})
    assert "is not one of Tessera's specs" in refusal(tree)
    assert kept.is_dir()
    assert not canary.exists()


def test_module_outside_our_packages_is_not_even_imported(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "canary_module.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    tree["optim"] = {TARGET: "canary_module.Spec"}
    assert "is not one of Tessera's specs" in refusal(tree)
    assert not canary.exists()


def test_program_of_ours_is_not_run_by_its_name(
    tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Importing `launch.__main__` would start the command line on this process's arguments."""
    tree["optim"] = {TARGET: "launch.__main__.Spec"}
    try:
        bind(tree)
    except ValueError as error:
        assert "is not one of Tessera's specs" in str(error)  # noqa: PT017  SystemExit is the defect
    except SystemExit as exit_:
        pytest.fail(f"the command line ran and left with {exit_.code}: {capsys.readouterr().err}")
    else:
        pytest.fail("a target outside the allow-list was bound")
