"""Which keys a config has: those that it sets, and those that stay at the default of their spec."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch.fields import Field, fields_of

TARGET, ANY_NAME = "_target_", "NAME"
UNSET = object()


@dataclass(frozen=True, kw_only=True)
class Known:
    """A key of the config."""

    value: Any
    """UNSET: no file and no word says it."""
    field: Field | None
    """None: a name of the user's own, or of another tool."""


def known_keys(tree: dict[str, Any]) -> dict[str, Known]:
    """Return every key of a composed config."""
    own = {key: value for key, value in tree.items() if key != "launch"}
    launch = tree.get("launch") or {}
    return {
        **dict(_below(own, str(own[TARGET]), "")),
        "launch": Known(value=launch, field=None),
        **dict(keys_inside(launch, None, "launch")),
    }


def keys_inside(value: Any, spec: str | None, key: str) -> Iterator[tuple[str, Known]]:
    """Yield all keys below `key`, which has this value, or may have a group of keys for `spec`."""
    tree = value if isinstance(value, dict) else {}
    if target := tree.get(TARGET) or spec:
        yield from _below(tree, str(target), key)
    else:
        for name, inner in tree.items():
            yield f"{key}.{name}", Known(value=inner, field=None)
            yield from keys_inside(inner, None, f"{key}.{name}")


def _below(tree: dict[str, Any], target: str, prefix: str) -> Iterator[tuple[str, Known]]:
    for name, field in fields_of(target).items():
        key = f"{prefix}.{name}" if prefix else name
        value = tree.get(name, UNSET)
        yield key, Known(value=value, field=field)
        if not field.is_named:
            yield from keys_inside(value, field.spec, key)
            continue
        named = value if isinstance(value, dict) else {}
        for own_name, inner in {**named, **({ANY_NAME: UNSET} if field.spec else {})}.items():
            yield f"{key}.{own_name}", Known(value=inner, field=None)
            yield from keys_inside(inner, field.spec, f"{key}.{own_name}")
