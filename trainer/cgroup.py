"""What machine, container or scheduler grant this process. Standard library only."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 writes 2^63 less a page


def free_memory(root: Path = ROOT) -> int:
    """Return the bytes that may still be taken: of the machine, and within our cgroups' limit.

    Where neither is known, more than there can be.
    """
    lines = _lines(root / "proc/meminfo")  # Linux alone has it, and counts KiB
    free = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    limit = memory_left(root)
    return min([*free, *(limit[:1] if limit else ())], default=_UNLIMITED)


def memory_left(root: Path = ROOT) -> tuple[int, int] | None:
    """Return the bytes that may still be taken, and the limit; None: there is no limit.

    The narrowest level counts. What the disk has as well can be had back: files, however often they
    were read, and names of files, as in MemAvailable of the machine.
    """
    found = []
    for folder, is_new in _levels("memory", root):
        limit = _number(folder / ("memory.max" if is_new else "memory.limit_in_bytes"))
        used = _number(folder / ("memory.current" if is_new else "memory.usage_in_bytes"))
        if limit is not None and used is not None and limit < _UNLIMITED:
            found.append((max(0, limit - used + _kept_of_disk(folder, is_new)), limit))
    return min(found, default=None)


def cores(root: Path = ROOT) -> float | None:
    """Return how many cores' worth of time is granted; None: there is no quota."""
    found = []
    for folder, is_new in _levels("cpu", root):
        if is_new:
            words = _words(folder / "cpu.max")
        else:
            words = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and words[0] not in ("max", "-1"):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def _levels(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Yield our group and all above it, and whether they are of version 2.

    In a container the path may be that of the host, which is not to be seen: its root is ours then.
    """
    own: dict[str, str] = {}
    for text in _lines(root / "proc/self/cgroup"):
        _, names, path = text.split(":", 2)
        own |= dict.fromkeys(names.split(","), path)
    mounts = root / "sys/fs/cgroup"
    for name, mount, is_new in ((controller, mounts / controller, False), ("", mounts, True)):
        if name in own:
            folder = mount / own[name].lstrip("/")
            yield from ((each, is_new) for each in (folder, *folder.parents) if _is_in(each, mount))


def _is_in(folder: Path, mount: Path) -> bool:
    return folder.is_relative_to(mount) and folder.is_dir()


def _kept_of_disk(folder: Path, is_new: bool) -> int:
    keys = ("inactive_file", "active_file", "slab_reclaimable")
    values = dict(text.split() for text in _lines(folder / "memory.stat"))
    return sum(int(values.get(key if is_new else f"total_{key}", 0)) for key in keys)


def _number(file: Path) -> int | None:
    words = _words(file)
    return int(words[0]) if words and words[0].isdigit() else None


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
