"""`tessera explain`: the value of a setting, who set it, what it means and what else it may be."""

import textwrap
from collections.abc import Iterator
from difflib import get_close_matches

from launch.compose import compose
from launch.exit_codes import FINISHED
from launch.fields import in_yaml, summary_of
from launch.known_keys import TARGET, UNSET, Known, known_keys
from launch.menu import groups
from launch.origins import Setting, settings_of

USAGE = """usage: tessera explain KEY [experiment=NAME] [group=choice] [key=value] ...

  tessera explain optim.lr experiment=demo     the value, which file or word set it and what that
                                               took the place of, its meaning and legal values
  tessera explain optim experiment=demo        a group: its choice, its keys and their values
"""
MISSING = "???"
WIDTH, LABEL, MAX_TEXT = 100, 10, 60


def main(arguments: list[str]) -> int:
    """Run `tessera explain` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return FINISHED
    keys = [word for word in arguments if "=" not in word]
    if len(keys) != 1:
        raise ValueError(
            f"explain takes one key, found {len(keys)}; for example: tessera explain optim.lr "
            "experiment=demo"
        )
    overrides = [word for word in arguments if "=" in word]
    composed = compose(overrides, command="explain", is_partial=True)
    known = known_keys(composed.tree)
    known["experiment"] = Known(value=composed.experiment, field=None)  # makes a config, is no part
    print("\n".join(lines_of(keys[0], known, overrides)))
    return FINISHED


def lines_of(key: str, known: dict[str, Known], overrides: list[str]) -> Iterator[str]:
    """Yield what is to be said of a key; ValueError with the nearest names for one that is none."""
    if key not in known:
        raise ValueError(_unknown(key, known))
    found = known[key]
    settings = settings_of(key, overrides)
    yield f"{key} = {_shown(key, found, settings[-1].text if settings else '')}"
    if settings:
        yield _line("set by", _of(settings[-1]))
    elif found.field and found.field.default is not None:
        yield _line("set by", f"its default   {found.field.place}")
    for setting in reversed(settings[:-1]):
        yield _line("over", _of(setting))
    yield from _meaning(key, found)
    inner = {name: k for name, k in known.items() if name.rpartition(".")[0] == key}
    for name, each in inner.items():
        yield f"  {name} = {_text(each)}"


def _meaning(key: str, found: Known) -> Iterator[str]:
    field = found.field
    target = found.value.get(TARGET) if isinstance(found.value, dict) else None
    if text := (field.meaning if field else "") or summary_of(str(target)):
        yield _line("meaning", text)
    if target:
        yield _line("spec", str(target))
    if choices := groups().get(key):
        yield _line("choices", ", ".join(choices))
    elif field:
        if field.choices and field.choices != ("null",):
            yield _line("choices", ", ".join(field.choices))
        yield _line("type", field.kind)
        yield _line("default", field.default or "none, it must be set")


def _shown(key: str, found: Known, choice: str) -> str:
    return choice.rpartition("=")[2] if key in groups() else _text(found)


def _text(found: Known) -> str:
    """Return the value that holds: of a key that nobody sets, the default of its spec."""
    value = found.value
    if value is UNSET:
        return (found.field.default if found.field else None) or "not set"
    if value == MISSING:
        return "missing: it must be set"
    if isinstance(value, dict) and TARGET in value:
        return str(value[TARGET]).rpartition(".")[2]
    return in_yaml(value)


def _of(setting: Setting) -> str:
    return f"{setting.place}   {textwrap.shorten(setting.text, MAX_TEXT, placeholder=' ...')}"


def _line(label: str, text: str) -> str:
    return textwrap.fill(
        f"  {label:<{LABEL}}{text}", WIDTH, subsequent_indent=" " * (LABEL + 2),
        break_on_hyphens=False, break_long_words=False, replace_whitespace=False,
        drop_whitespace=True,
    )  # fmt: skip


def _unknown(key: str, known: dict[str, Known]) -> str:
    """Say which keys end as this one does, else which are spelt like it."""
    ends: dict[str, list[str]] = {}
    for name in known:
        ends.setdefault(name.rpartition(".")[2], []).append(name)
    last = key.rpartition(".")[2]
    near = ends.get(last) or get_close_matches(key, known, n=3, cutoff=0.75)
    near = near or [name for end in get_close_matches(last, ends, n=2) for name in ends[end]]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "see tessera list"
    return f"unknown key {key}; {hint}"
