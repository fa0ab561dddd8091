"""From the command line to one resolved, plain config tree. The home of Hydra."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from launch.config_secrets import named_variable, refuse_secrets
from launch.menu import config_folder, groups
from launch.words import unknown_key

ROOT = "train"
LENGTHS = ("max_steps", "max_epochs")


@dataclass(frozen=True, kw_only=True)
class Composed:
    """What the command line asks for: plain containers, nothing of OmegaConf."""

    tree: dict[str, Any]
    experiment: str | None


def compose(
    overrides: list[str], *, command: str = "train", options: Iterable[str] = ()
) -> Composed:
    """Compose `configs/train.yaml` with overrides; ValueError in one line for what does not fit.

    The `command` has some `options` of its own, which are suggested too.
    """
    for override in overrides:
        _check_key(override, command, options)
    overrides = [_settable(override) for override in [*overrides, *_other_length(overrides)]]
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
            tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OverrideParseException as error:
        raise ValueError(_unreadable(str(error.override), str(error))) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(str(error))) from None
    assert isinstance(tree, dict)
    plain = {str(key): value for key, value in tree.items()}
    refuse_secrets(plain)
    return Composed(tree=plain, experiment=chosen)


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
    key, separator, _ = override.partition("=")
    if override.startswith("-") or not separator:
        raise ValueError(f"{override!r} is no option; write key=value, for example max_steps=100")
    if _is_hydras(key):
        return
    known = [*groups(), *_root_keys()]
    if key.partition(".")[0] not in known:
        raise unknown_key(command, key, [*known, *options])


def _other_length(overrides: list[str]) -> list[str]:
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
    choices = groups()[group]
    near = get_close_matches(choice, choices, n=1)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    return f"{group} has no choice {choice!r}; {hint}Choices: {', '.join(choices)}"
