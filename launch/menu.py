"""The menu: experiments and config groups, read off the YAML files without Hydra."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


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


def main(arguments: list[str]) -> int:
    """Print the menu."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ValueError(f"tessera list takes no argument, found {arguments[0]!r}; leave it out")
    print("\n".join(lines()))
    return 0
