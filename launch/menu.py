"""The menu: experiments and config groups, read off the YAML files without Hydra."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

USAGE = """usage: tessera list [GROUP]

  tessera list               experiments with a line each, groups with their choices
  tessera list experiment    or any group: a line on each of its choices
"""
HELP = {"-h", "--help"}


def config_folder() -> Path:
    """Return the folder of the packaged configs."""
    spec = find_spec("configs")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def groups() -> dict[str, list[str]]:
    """Return the choices of every group."""
    folders = sorted(entry for entry in config_folder().iterdir() if entry.is_dir())
    found = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}
    return {group: choices for group, choices in found.items() if choices}


def headline(file: Path) -> str:
    """Return the first comment line of a YAML file that is not a directive."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line[2:]
    return ""


def lines() -> Iterator[str]:
    """Yield the menu, line by line."""
    yield "experiments (experiment=NAME):"
    for name in groups().get("experiment", []):
        yield f"  {name:<24} {headline(config_folder() / 'experiment' / f'{name}.yaml')}"
    yield ""
    yield "groups (GROUP=CHOICE):"
    for group, choices in groups().items():
        if group != "experiment":
            yield f"  {group:<16} {', '.join(choices)}"


def choices_of(group: str) -> Iterator[str]:
    """Yield one line for each choice of a group; ValueError for a group that there is not."""
    known = groups()
    if group not in known:
        from trainer.near_names import did_you_mean  # here: who mistypes may wait

        hint = did_you_mean(group, known)
        raise ValueError(f"there is no group {group!r}; {hint}Groups: {', '.join(known)}")
    width = max(map(len, known[group]))
    for choice in known[group]:
        text = headline(config_folder() / group / f"{choice}.yaml")
        yield f"{group}={choice:<{width}}  {text}".rstrip()


def main(arguments: list[str]) -> int:
    """Print the menu, or the choices of one group."""
    if HELP & set(arguments):
        print(USAGE)
    if not arguments or HELP & set(arguments):
        print("\n".join(lines()))
        return 0
    if len(arguments) > 1 or "=" in arguments[0]:
        raise ValueError(
            f"tessera list takes one group at most, found {' '.join(arguments)!r}; for example "
            "tessera list experiment"
        )
    print("\n".join(choices_of(arguments[0])))
    return 0
