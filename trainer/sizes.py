"""A number of bytes in words: in powers of ten what lies on a disk, in powers of two memory."""

_DISK = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_MEMORY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def on_disk(num_bytes: float) -> str:
    """Return it in the largest unit of which there is one, as `max_file_gb` and disks count."""
    return _in_words(num_bytes, _DISK, 1)


def in_memory(num_bytes: float, digits: int = 1) -> str:
    """Return it in the largest unit of which there is one, as torch and the kernel count."""
    return _in_words(num_bytes, _MEMORY, digits)


def _in_words(num_bytes: float, units: tuple[tuple[float, str], ...], digits: int) -> str:
    unit, name = next((each for each in units if num_bytes >= each[0]), units[-1])
    return f"{num_bytes / unit:.{digits}f} {name}"
