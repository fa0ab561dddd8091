"""Which labels a data set has: looked up once, and kept in the cache."""

from pathlib import Path

import xxhash

from trainer.data.labels import found_labels
from trainer.data.sources import TextSource
from trainer.files import exclusive, read_json, write_json


def label_names(source: TextSource, column: str, *, cache: Path) -> tuple[str, ...]:
    """Return the labels of a column: those that the files name, else all that occur in it.

    Reads the whole source, unless somebody did before; ValueError where that gives no two labels.
    """
    key = xxhash.xxh3_128_hexdigest(f"{source.key()}/{column}".encode())
    path = cache / "labels" / f"{key}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_suffix(".lock")):
            if not path.exists():
                write_json(path, source.class_names(column) or found_labels(source.rows(), column))
    names = tuple(read_json(path))
    if len(names) < 2:
        raise ValueError(
            f"{source.name}={source.path}: column {column!r} holds {len(names)} different labels; "
            "needed 2 or more"
        )
    return names
