"""Cells of parquet and arrow files, found by row: images that a column holds."""

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from trainer.data.examples import BadRowError

_KEPT_GROUPS = 2  # row groups of images in memory: documents are made in order, so the last serves


def embedded_bytes(path: Path, row: int, cell: tuple[str | int, ...]) -> bytes:
    """Return the bytes of an image in a cell; BadRowError where none are there (any more)."""
    import pyarrow as pa

    column, *rest = cell
    try:
        value = _cell(path, row, str(column))
        for key in rest:
            value = value[key]
        found = value["bytes"]
    except (pa.ArrowException, OSError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadRowError(f"cannot be read from its table: {reason}; bring the file back") from None
    assert isinstance(found, bytes)
    return found


def _cell(path: Path, row: int, column: str) -> Any:
    if path.suffix == ".arrow":
        return _arrow_table(path)[column][row].as_py()
    firsts = _first_rows(path)
    group = bisect_right(firsts, row) - 1
    return _row_group(path, group, column)[row - firsts[group]].as_py()


@lru_cache(maxsize=64)
def _first_rows(path: Path) -> list[int]:
    """Return the first row of each row group, then the number of rows."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    counts = (metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))
    return [0, *accumulate(counts)]


@lru_cache(maxsize=_KEPT_GROUPS)
def _row_group(path: Path, group: int, column: str) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column])[column]


@lru_cache(maxsize=64)
def _arrow_table(path: Path) -> Any:
    """Return a table whose rows are read from disk when they are asked for."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()  # as datasets writes them
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()
