"""From the command line to one resolved, plain config tree. The home of Hydra."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from launch.config_secrets import named_variable, refuse_secrets
from launch.menu import config_folder, groups
from launch.words import unknown_key

ROOT = "train"
LENGTHS = ("max_steps", "max_epochs")
_NO_CHOICE = re.compile(r"null|true|false|[-+.\d]+", re.IGNORECASE)  # what Hydra takes for no text


@dataclass(frozen=True, kw_only=True)
class Composed:
    """What the command line asks for: plain containers, nothing of OmegaConf."""

    tree: dict[str, Any]
    experiment: str | None

    @property
    def named(self) -> dict[str, Any]:
        """The tree with a name of the run in it: the experiment's, where none is given."""
        given = self.tree.get("name")
        return self.tree | {"name": (self.experiment or "run") if given is None else given}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One file of a composition."""

    file: str
    """Below configs/, without its ending."""
    package: str
    """The key below which it stands; empty: none."""


def compose(
    overrides: list[str],
    *,
    command: str = "train",
    options: Iterable[str] = (),
    is_partial: bool = False,
) -> Composed:
    """Compose `configs/train.yaml` with overrides; ValueError in one line for what does not fit.

    The `command` has some `options` of its own, which are suggested too. What must be set is `???`
    in a partial config.
    """
    for override in overrides:
        _check_key(override, command, options)
    overrides = _for_hydra(overrides)
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    OmegaConf.register_new_resolver("oc.env", named_variable, replace=True)
    try:
        with initialize_config_module("configs", version_base="1.3"):
            config = hydra_compose(ROOT, overrides, return_hydra_config=True)
            chosen = config.hydra.runtime.choices.get("experiment")
            OmegaConf.set_struct(config, False)
            del config["hydra"]
            tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=not is_partial)
    except OverrideParseException as error:
        raise ValueError(_unreadable(str(error.override), str(error))) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(str(error))) from None
    assert isinstance(tree, dict)
    plain = {str(key): value for key, value in tree.items()}
    refuse_secrets(plain)
    return Composed(tree=plain, experiment=chosen)


def layers(overrides: list[str]) -> list[Layer]:
    """Return the files that make up a config, in the order in which they take effect."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with initialize_config_module("configs", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        found = loader.compute_defaults_list(ROOT, _for_hydra(overrides), RunMode.RUN)
    return [
        Layer(file=each.config_path, package=each.package or "")
        for each in found.defaults
        if each.config_path and each.config_path.partition("/")[0] != "hydra"
    ]


@dataclass(frozen=True, kw_only=True)
class Combination:
    """The words of one run of a sweep."""

    words: list[str]
    varied: dict[str, str]
    """Keys of which the sweep has several values, with the one of this run."""


def combinations(overrides: list[str], *, command: str) -> list[Combination]:
    """Return every combination of what varies, as Hydra's basic sweeper does: the last key varies
    fastest."""
    for override in overrides:
        _check_key(override, command, ())
    from hydra import initialize_config_module
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    with initialize_config_module("configs", version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        found = []
        for override in overrides:
            try:
                (read,) = parser.parse_overrides([override])
                BasicSweeper.split_arguments([read], max_batch_size=None)  # an interval is refused
            except HydraException as error:
                raise ValueError(_unreadable(override, str(error))) from None
            found.append(read)
        (jobs,) = BasicSweeper.split_arguments(found, max_batch_size=None)
    keys = [each.get_key_element() for each in found if each.is_sweep_override()]
    return [
        Combination(words=job, varied={k: v for k, _, v in _parted(job) if k in keys})
        for job in jobs
    ]


def _parted(words: list[str]) -> Iterable[tuple[str, str, str]]:
    return (word.partition("=") for word in words)


def _for_hydra(overrides: list[str]) -> list[str]:
    return [_settable(override) for override in [*overrides, *other_length(overrides)]]


def parsed(override: str) -> tuple[str, Any]:
    """Return key and plain value of `key=value`, read as compose reads it; else ValueError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    if "=" not in override:
        raise ValueError(f"{override!r} is no option; write key=value, for example seed=1")
    try:
        found = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ValueError(_unreadable(override, str(error))) from None
    value = OmegaConf.to_container(OmegaConf.create([found.value()]))
    assert isinstance(value, list)
    return str(found.key_or_group), value[0]


def _settable(override: str) -> str:
    """Let fields be set that stand at their default in no YAML: Hydra wants `+key` for those."""
    key = override.partition("=")[0]
    return override if _is_hydras(key) else f"++{override}"


def _is_hydras(key: str) -> bool:
    """Whether Hydra itself judges the key."""
    return key.startswith(("+", "~", "hydra.")) or key in groups()


def _check_key(override: str, command: str, options: Iterable[str]) -> None:
    """Check the first part of a key; the rest is the specs' business, and binding checks it."""
    key, separator, value = override.partition("=")
    if override.startswith("-") or not separator:
        raise ValueError(f"{override!r} is no option; write key=value, for example max_steps=100")
    if key in groups() and _NO_CHOICE.fullmatch(value):
        raise ValueError(_unknown_choice(key, value))
    if _is_hydras(key):
        return
    known = [*groups(), *_root_keys()]
    if key.partition(".")[0] not in known:
        raise unknown_key(command, key, [*known, *options])


def other_length(overrides: list[str]) -> list[str]:
    """Return what the length on the command line takes the place of, in a recipe of either kind."""
    named = {key for key in LENGTHS for override in overrides if override.startswith(f"{key}=")}
    return [f"{key}=null" for key in LENGTHS if len(named) == 1 and key not in named]


def _root_keys() -> list[str]:
    import yaml

    root = yaml.safe_load((config_folder() / f"{ROOT}.yaml").read_text())
    return [key for key in root if key not in ("defaults", "_target_")]


def _unreadable(override: str, message: str) -> str:
    """Say that Hydra's grammar cannot read a value: mostly a text that wants quotes."""
    key, _, value = override.removeprefix("++").partition("=")
    example = '["..."]' if value.startswith("[") else '"..."'
    return (
        f"{key}={value}: {_explain(message.splitlines()[0])}; put quotes around text with special "
        f"characters, and others around all for the shell: '{key}={example}'"
    )


def _explain(message: str) -> str:
    """Turn Hydra's paragraphs into one line with the nearest legal name."""
    if match := re.search(r"Could not find '(\w+)/([^']+)'", message):
        return _unknown_choice(match[1], match[2])
    if match := re.search(r"Missing mandatory value.*full_key: (\S+)", message, re.DOTALL):
        return f"{match[1]} is missing; set {match[1]}=..."
    if match := re.search(r"raised while resolving interpolation: (.+)\s+full_key: (\S+)", message):
        return f"{match[2]}: {match[1]}"
    return " ".join(message.split())


def _unknown_choice(group: str, choice: str) -> str:
    from trainer.near_names import did_you_mean  # here: who mistypes may wait

    choices = groups()[group]
    hint = did_you_mean(choice, choices, prefix=f"{group}=")
    return f"{group} has no choice {choice!r}; {hint}Choices: {', '.join(choices)}"
