"""What the `key=value` words of a command say: every key known and given once, or a refusal."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any


def options_of(
    command: str,
    words: Iterable[str],
    *,
    needed: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
) -> dict[str, str]:
    """Return the text of every option of a command that takes no others.

    What is `needed` must be given and not be empty; its values say what they are: {"run": "DIR"}.
    What is `optional` is absent unless given. ValueError in one line for a word without `=`, a key
    that is unknown, one that is given twice and one that is missing.
    """
    needed, defaults = needed or {}, defaults or {}
    known = [*needed, *defaults, *optional]
    given = pairs(command, words)
    for key in given:
        if key not in known:
            raise unknown_key(command, key, known)
    for key, what in needed.items():
        if not given.get(key):
            raise ValueError(f"{key} is missing; set {key}={what}, see tessera {command} --help")
    return {**defaults, **given}


def split_off(
    command: str, words: Iterable[str], own: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Return what the words say of a command's `own` keys, and the words that are the config's."""
    words = list(words)
    mine = [word for word in words if word.partition("=")[0] in own]
    return pairs(command, mine), [word for word in words if word not in mine]


def pairs(command: str, words: Iterable[str]) -> dict[str, str]:
    """Return key and text of every word; ValueError for one without `=`, and for a second one."""
    found: dict[str, str] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if word.startswith("-") or not separator:
            raise ValueError(
                f"{word!r} is no option; write key=value, see tessera {command} --help"
            )
        if key in found:
            raise ValueError(f"tessera {command} has {key} twice; leave one of them out")
        found[key] = text
    return found


def unknown_key(command: str, key: str, known: Iterable[str]) -> ValueError:
    """Return the refusal of a key, with the nearest of the known names to its first part."""
    from trainer.near_names import did_you_mean  # here: who mistypes may wait

    hint = did_you_mean(key.partition(".")[0], known)
    return ValueError(f"unknown key {key}; {hint}see tessera {command} --help")


def refuse_idle(words: Iterable[str], tree: Mapping[str, Any]) -> None:
    """Raise ValueError for a typed setting of answers that nobody asks for.

    Typed ones alone: a recipe keeps its own where `validation.every=null` switches it off.
    """
    if tree.get("validation", {}).get("every") is not None:
        return
    for word in words:
        key = word.lstrip("+").partition("=")[0]
        if key.startswith("validation.") and key != "validation.every":
            raise ValueError(
                f"{word.lstrip('+')} has no effect, since the model is asked nothing; set "
                "validation.every=1, or leave it out"
            )
