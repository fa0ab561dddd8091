"""Which files and words set a key, in the order in which they take effect: the last one holds."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.compose import Layer, layers, other_length
from launch.menu import config_folder, groups

if TYPE_CHECKING:
    from yaml import Node

COMMAND_LINE = "the command line"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One place that sets a key, or all of what the key is a part of."""

    place: str
    text: str
    """The value as it is written there."""


def settings_of(key: str, overrides: list[str]) -> list[Setting]:
    """Return what sets `key`, the first that takes effect first."""
    in_files = [setting for layer in layers(overrides) for setting in _in_file(key, layer)]
    words = [word for word in overrides if _concerns(word, key)]
    lengths = [word for word in other_length(overrides) if _concerns(word, key)]
    return [
        *in_files,
        *(Setting(place=COMMAND_LINE, text=word) for word in words),
        *(Setting(place=f"{COMMAND_LINE}, which sets the other length", text=w) for w in lengths),
    ]


def _concerns(word: str, key: str) -> bool:
    """Whether a word of the command line sets the key, a part of it, or all around it."""
    name = word.partition("=")[0].lstrip("+~")
    if name in groups() or key in groups():  # decides which files there are: they say the rest
        return name == key
    return name == key or key.startswith(f"{name}.") or name.startswith(f"{key}.")


def _in_file(key: str, layer: Layer) -> list[Setting]:
    import yaml

    path = config_folder() / f"{layer.file}.yaml"
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return []
    if key in groups():
        found = _choice(root, key)
    else:
        package = [part for part in layer.package.split(".") if part]
        parts = key.split(".")
        if parts[: len(package)] != package:
            return []
        found = _value(root, parts[len(package) :])
    if found is None:
        return []
    written = " ".join(text[found.start_mark.index : found.end_mark.index].split())
    return [Setting(place=f"configs/{layer.file}.yaml:{found.start_mark.line + 1}", text=written)]


def _value(node: "Node", parts: list[str]) -> "Node | None":
    """Return what a file has below a key: a value that stands for all around it counts."""
    import yaml

    if not parts or not isinstance(node, yaml.MappingNode):
        return node
    for name, value in node.value:
        if name.value == parts[0]:
            return _value(value, parts[1:])
    return None


def _choice(root: "Node", group: str) -> "Node | None":
    """Return which choice of a group the defaults of a file name."""
    import yaml

    defaults = _value(root, ["defaults"])
    for entry in defaults.value if isinstance(defaults, yaml.SequenceNode) else []:
        for name, value in entry.value if isinstance(entry, yaml.MappingNode) else []:
            if name.value.removeprefix("override ").lstrip("/") == group:
                return value
    return None
