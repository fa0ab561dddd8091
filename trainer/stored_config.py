"""Configs that a run or a checkpoint holds: plain values that others may have written."""

from pathlib import Path
from typing import Any

MAX_VALUES = 100_000  # lists and keys; ours have a few hundred


def read_stored(path: Path) -> dict[str, Any]:
    """Return the tree of a config.yaml; ValueError in one line for what is no config.

    Only plain values: a tag that would make an object is refused. Names within a file that stand
    for parts of it can make a few lines endless, so what they come to is counted.
    """
    import yaml

    advice = "bring the file back as the run left it, or start a new run"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} holds more or less than plain YAML: {reason}; {advice}") from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ValueError(f"{path} holds no keys; {advice}")
    if _is_large(tree):
        raise ValueError(f"{path} comes to more than {MAX_VALUES} values; {advice}")
    return tree


def _is_large(tree: Any) -> bool:
    waiting, count = [tree], 0
    while waiting and count <= MAX_VALUES:
        node = waiting.pop()
        count += 1
        if isinstance(node, dict | list):
            waiting += node.values() if isinstance(node, dict) else node
    return count > MAX_VALUES
