"""Which labels a data set has: looked up once, and kept in the cache."""

from pathlib import Path

import xxhash

from trainer.data.labels import found_labels
from trainer.data.sources import RowSource
from trainer.files import exclusive, make_folder, read_json, write_json


def label_names(sources: list[RowSource], column: str, *, cache: Path) -> tuple[str, ...]:
    """Return the labels of a column: those that the files name, else all that occur in it.

    Reads all of the sources, unless somebody did before; ValueError where that gives no two labels.
    """
    keys = "/".join(source.key() for source in sources)
    key = xxhash.xxh3_128_hexdigest(f"{keys}/{column}".encode())
    path = cache / "labels" / f"{key}.json"
    if not path.exists():
        make_folder(path.parent, "data.cache")
        with exclusive(path.with_suffix(".lock")):
            if not path.exists():
                write_json(path, _look_up(sources, column))
    names = tuple(read_json(path))
    if len(names) < 2:
        raise ValueError(
            f"{sources[0].path}: column {column!r} holds {len(names)} different labels; "
            "needed 2 or more"
        )
    return names


def _look_up(sources: list[RowSource], column: str) -> tuple[str, ...]:
    given = sources[0].class_names(column)
    if given and all(source.class_names(column) == given for source in sources[1:]):
        return tuple(given)
    return found_labels((row for source in sources for row in source.rows()), column)
