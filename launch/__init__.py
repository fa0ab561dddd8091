"""Everything with a command line.

The only code that knows Hydra, environment variables and launchers.
"""

import sys
from importlib.util import find_spec
from pathlib import Path


def _guard() -> None:
    """Fail clearly when a folder or distribution of the same name shadows one of our packages."""
    ours = Path(__file__).resolve().parent.parent
    for name in ("trainer", "models", "configs"):
        spec = find_spec(name)
        found = Path(next(iter(spec.submodule_search_locations or [""]), "")) if spec else None
        if found is None or found.resolve().parent != ours:
            sys.exit(
                f"tessera: package {name!r} comes from {found}, not from {ours / name}; "
                "start from another folder, or install tessera-train in an environment of its own"
            )


_guard()
