"""What may change between the starts of one run: config keys in three classes."""

from collections.abc import Iterator
from fractions import Fraction
from math import inf
from typing import Any

# The first pattern that fits decides; a pattern ending in "." covers everything below.
_RECORDED = (
    "max_steps", "max_epochs", "log_every", "eval_every", "eval_share", "save_every",
    "name", "runs", "resume", "resume_step", "resume_allow", "resume_strict", "timeout_seconds",
    "optim.", "schedule.", "mesh.", "engine.", "checkpoint.", "callbacks.", "tracker.", "launch.",
    "best.", "max_skipped_in_a_row",
    "validation.", "check_replicas_every", "stop_at", "spike.",
    "data.micro_rows", "data.packing", "data.cache", "data.eval_path", "data.eval_fraction",
    # A moved folder is no other data, nor is a tokenizer by another name: the fingerprint of the
    # tokens decides.
    "data.path", "data.sources.", "data.subset", "data.split", "data.max_documents",
    "data.eval_subset", "data.eval_split", "tokenizer",
)  # fmt: skip
# What the optimizer's state is: no other optimizer can go on from it.
_FIXED = ("optim._target_", "optim.states")
_STATES = {"states": "weights"}  # of an optimizer whose config does not say
_EXPLICIT = ("data.global_rows", "data.global_documents")
_SOURCES = ("data.path", "data.sources.")
ALLOW_MIX = "data.mix"
"""In resume_allow: other shares of the sources, or other sources."""
ALLOW_BITS = "deterministic"
"""In resume_allow: to go on with other bits."""
ALLOWABLE = (*_EXPLICIT, ALLOW_MIX, ALLOW_BITS)
MISSING = "(absent)"
MAX_TOLD = 4  # keys in one message


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {key: (old value, new value)} for every key that differs."""
    before, after = dict(flatten(old)), dict(flatten(new))
    return {
        key: (before.get(key, MISSING), after.get(key, MISSING))
        for key in sorted(before.keys() | after.keys())
        if before.get(key, MISSING) != after.get(key, MISSING)
    }


def check_drift(
    old: dict[str, Any], new: dict[str, Any], allowed: list[str]
) -> dict[str, tuple[Any, Any]]:
    """Return the changes that a resumed run may carry; ValueError names all that it may not."""
    old, new = (tree | {"optim": _STATES | tree.get("optim", {})} for tree in (old, new))
    changes = difference(old, new)
    known = (*_RECORDED, *_EXPLICIT)
    refused = [key for key in changes if key in _FIXED or not fits(key, known)]
    if refused:
        raise ValueError(
            f"{_listed(refused, changes)}, which would make another run of it; set "
            f"{'it' if len(refused) == 1 else 'them'} back, or start anew with name=... or "
            "resume=never"
        )
    if any(fits(key, _SOURCES) for key in changes):
        _check_mix(old, new, allowed)
    refused = [key for key in changes if fits(key, _EXPLICIT) and key not in allowed]
    if refused:
        raise ValueError(
            f"{_listed(refused, changes)}, which changes its data order; set "
            f"{'it' if len(refused) == 1 else 'them'} back, or allow it with "
            f"resume_allow=[{','.join(refused)}]"
        )
    return changes


def _check_mix(old: dict[str, Any], new: dict[str, Any], allowed: list[str]) -> None:
    was, now = _mixture(old), _mixture(new)
    if _shares(was) == _shares(now) or ALLOW_MIX in allowed:
        return
    before, after = (
        ", ".join(f"{name} {' '.join(map(str, share))}" for name, share in each.items())
        for each in (was, now)
    )
    raise ValueError(
        f"the mixture was {before} when this run was saved and is {after} now, which changes its "
        f"data; set data.sources back, or allow it with resume_allow=[{ALLOW_MIX}]"
    )


def _mixture(tree: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return what the config says of the share of each source, not yet checked."""
    sources = tree["data"].get("sources")
    if not isinstance(sources, dict) or not sources:
        return {"data.path": ("weight", 1)}
    found = {name: source if isinstance(source, dict) else {} for name, source in sources.items()}
    has_weights = any(source.get("weight") is not None for source in found.values())
    key, usual = ("weight", None) if has_weights else ("epochs", 1)
    return {name: (key, source.get(key) or usual) for name, source in found.items()}


def _shares(mixture: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Return the same for all numbers with the same proportions."""
    numbers = [number for _, number in mixture.values()]
    if not all(isinstance(number, int | float) and 0 < number < inf for number in numbers):
        return mixture  # will be refused for it
    total = sum(Fraction(str(number)) for number in numbers)
    return {name: (key, Fraction(str(number)) / total) for name, (key, number) in mixture.items()}


def _listed(keys: list[str], changes: dict[str, tuple[Any, Any]]) -> str:
    """Say what some keys were and are; a change of group has dozens."""
    told = [
        f"{key} was {changes[key][0]} when this run was saved and is {changes[key][1]} now"
        for key in keys[:MAX_TOLD]
    ]
    more = f"; and {len(keys) - MAX_TOLD} more keys" if len(keys) > MAX_TOLD else ""
    return "; ".join(told) + more


def fits(key: str, patterns: tuple[str, ...]) -> bool:
    """Return whether one of the patterns is this key, or ends in "." and lies above it."""
    return any(key == p.rstrip(".") or (p.endswith(".") and key.startswith(p)) for p in patterns)
