"""Row groups of parquet files are decoded as a whole: does memory hold the largest?"""

from pathlib import Path

from trainer.cgroup import free_memory
from trainer.errors import DataError
from trainer.sizes import in_memory


def check_row_groups(path: Path) -> int:
    """Return how many rows a file has; DataError where a row group states more bytes than there is
    memory left."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    most, free = max((each.total_byte_size for each in groups), default=0), free_memory()
    if most > free:
        raise DataError(
            f"{path} has a row group of {in_memory(most)}, which is decoded as a whole, and "
            f"{in_memory(free)} of memory are left; write it anew with fewer rows in each "
            "(row_group_size), or take a machine with more"
        )
    return int(metadata.num_rows)
