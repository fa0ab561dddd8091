"""From the command line to one resolved, plain config tree. The home of Hydra."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from launch.menu import groups

ROOT = "train"


@dataclass(frozen=True, kw_only=True)
class Composed:
    """What the command line asks for: plain containers, nothing of OmegaConf."""

    tree: dict[str, Any]
    experiment: str | None


def compose(overrides: list[str]) -> Composed:
    """Compose `configs/train.yaml` with overrides; ValueError in one line for what does not fit."""
    for override in overrides:
        if override.startswith("-") or "=" not in override:
            raise ValueError(f"{override!r} is no option; write key=value, for example max_steps=100")
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_module("configs", version_base="1.3"):
            config = hydra_compose(ROOT, overrides, return_hydra_config=True)
            chosen = config.hydra.runtime.choices.get("experiment")
            OmegaConf.set_struct(config, False)
            del config["hydra"]
            tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(str(error), overrides)) from None
    assert isinstance(tree, dict)
    return Composed(tree={str(key): value for key, value in tree.items()}, experiment=chosen)


def _explain(message: str, overrides: list[str]) -> str:
    """Turn Hydra's paragraphs into one line with the nearest legal name."""
    if match := re.search(r"Could not find '(\w+)/([^']+)'", message):
        return _unknown_choice(match[1], match[2])
    if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", message):
        key = match[1] or match[2]
        near = get_close_matches(key, _known_keys(overrides), n=1)
        hint = f"did you mean {near[0]}?" if near else "see tessera train --help"
        return f"unknown key {key}; {hint}"
    if match := re.search(r"Missing mandatory value: (\S+)", message):
        return f"{match[1]} is missing; set {match[1]}=..."
    return " ".join(message.split())


def _unknown_choice(group: str, choice: str) -> str:
    choices = groups().get(group)
    if choices is None:
        near = get_close_matches(group, groups(), n=1)
        return f"no group {group}; " + (f"did you mean {near[0]}={choice}?" if near else "see list")
    near = get_close_matches(choice, choices, n=1)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    return f"{group} has no choice {choice!r}; {hint}Choices: {', '.join(choices)}"


def _known_keys(overrides: list[str]) -> list[str]:
    """Return all dotted keys of the tree that the group choices among `overrides` give."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from omegaconf import OmegaConf

    from trainer.drift import flatten

    choices = [o for o in overrides if o.partition("=")[0] in groups()]
    with initialize_config_module("configs", version_base="1.3"):
        tree = OmegaConf.to_container(hydra_compose(ROOT, choices), resolve=False)
    leaves = [key for key, _ in flatten(tree)]
    parents = {key[:i] for key in leaves for i, letter in enumerate(key) if letter == "."}
    return [*leaves, *parents, *groups()]
