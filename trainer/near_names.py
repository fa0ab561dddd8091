"""What somebody who mistyped a name may have meant."""

from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "did you mean X? " with the known name nearest to `name`; "" where none is near.

    For the middle of a one-line message; `prefix` stands before the name that is found.
    """
    from difflib import get_close_matches  # here: who mistypes may wait for it

    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {prefix}{near[0]}? " if near else ""
