"""What the last word of a command line may go on with: commands, options, keys, choices.

Read off the YAML files and the sources of commands and specs: no Hydra, no torch.
"""

import ast
import re
from collections.abc import Iterator
from typing import Any

from launch.cli import COMMANDS
from launch.fields import source_of
from launch.known_keys import keys_inside
from launch.menu import config_folder, groups

FILES = ":files"  # in place of candidates: the shell knows the files
SHELLS = ("bash", "fish", "zsh")
ROOT = "train"
_PLACES = ("DIR", "FILE", "FOLDER", "SHARDS")
_COMPOSERS = ("launch.compose", "launch.sweep_plan")


def candidates(words: list[str]) -> list[str]:
    """Return whole words in place of the last one, or FILES; `words` come after `tessera`."""
    *before, current = words or [""]
    if not before:
        return _fitting([*COMMANDS, "--help"], current)
    command = before[0]
    key, separator, _ = current.partition("=")
    if separator:
        return _fitting([f"{key}={value}" for value in _values(key, before)], current) or [FILES]
    if command in ("list", "completion"):
        return _fitting(groups() if command == "list" else SHELLS, current)
    return _fitting(dict.fromkeys(_keys(command, before[1:], current)), current)


def _fitting(found: Any, start: str) -> list[str]:
    return [word for word in found if word.startswith(start)]


def _keys(command: str, words: list[str], current: str) -> Iterator[str]:
    """Yield options of the command and keys of the config; what has keys below it ends in a dot."""
    yield from (f"{option}=" for option in _options(command))
    if not _takes_config(command):
        return
    end = "" if command == "explain" and not any("=" not in word for word in words) else "="
    parent = current.rpartition(".")[0]
    if parent:
        below = dict(keys_inside(_group(parent.partition(".")[0], words), None, _head(parent)))
        for key in below:
            if key.rpartition(".")[0] == parent:
                yield f"{key}." if any(k.startswith(f"{key}.") for k in below) else f"{key}{end}"
        return
    for group in groups():
        yield f"{group}="
        if group != "experiment":
            yield f"{group}."
    for key, value in _yaml(ROOT).items():
        if key not in ("defaults", "_target_"):
            yield f"{key}." if isinstance(value, dict) else f"{key}{end}"


def _head(key: str) -> str:
    return key.partition(".")[0]


def _values(key: str, before: list[str]) -> list[str]:
    """Return what a key may be set to, where that is a list."""
    shown = _options(before[0]).get(key, "")
    if shown in ("true", "false"):
        return ["true", "false"]
    if shown in _PLACES or "/" in shown:
        return []
    if not _takes_config(before[0]):
        return []
    if key in groups():
        return groups()[key]
    tree = _group(_head(key), before[1:]) if "." in key else {"_target_": _yaml(ROOT)["_target_"]}
    known = dict(keys_inside(tree, None, _head(key) if "." in key else ""))
    found = known.get(key) or known.get(f".{key}")
    return list(found.field.choices) if found and found.field else []


def _group(name: str, words: list[str]) -> Any:
    """Return what the config has below a root key: of a group, the file of its choice."""
    if name not in groups():
        return _yaml(ROOT).get(name)
    choice = _chosen(name, words)
    return _yaml(f"{name}/{choice}") if choice in groups()[name] else {}


def _chosen(group: str, words: list[str]) -> str:
    """Return the choice of a group: on the command line, by the experiment, or the default."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if group in given:
        return given[group]
    files = [f"experiment/{name}"] if (name := given.get("experiment")) else []
    for file in [*files, ROOT]:
        for entry in _yaml(file).get("defaults", []):
            for key, choice in entry.items() if isinstance(entry, dict) else []:
                if key.removeprefix("override ").lstrip("/") == group:
                    return str(choice[0] if isinstance(choice, list) else choice)
    return ""


def _yaml(file: str) -> dict[str, Any]:
    import yaml

    path = config_folder() / f"{file}.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _takes_config(command: str) -> bool:
    """Whether a command composes a config: its module says so."""
    source = source_of(COMMANDS[command][0]) if command in COMMANDS else None
    nodes = ast.walk(source.tree) if source else []
    return any(isinstance(n, ast.ImportFrom) and n.module in _COMPOSERS for n in nodes)


def _options(command: str) -> dict[str, str]:
    """Return the options that a command's USAGE shows, with the value shown there."""
    source = source_of(COMMANDS[command][0]) if command in COMMANDS else None
    for node in source.tree.body if source else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "USAGE":
            text = node.value.value if isinstance(node.value, ast.Constant) else ""
            found = re.findall(r"(?<![\w.=])([a-z_][a-z_.]*)=([^\s\]),;]*)", str(text))
            return {name: value for name, value in reversed(found)}
    return {}
