"""The failures that a run tells apart; launch maps each to an exit code.

A user's mistake is a ValueError everywhere: found, needed, what to change.
"""


class DataError(Exception):
    """The data cannot be used: unreadable, empty, or outside the vocabulary."""


class StorageError(Exception):
    """No good checkpoint could be written or read."""


class CorruptionError(Exception):
    """Copies that must be equal differ: memory or a chip is at fault."""


class NumericError(Exception):
    """Steps whose loss or gradient was not finite, or a spike, and the run may not go on."""


class MemoryExhaustedError(Exception):
    """There was not enough memory on the device or on the host."""


class LockedError(ValueError):
    """Another process holds the run directory."""


class CheckError(Exception):
    """What was made is not what it should be: nothing of it is kept."""


class StoppedEarlyError(BaseException):
    """A stop was requested before the first step of this start was done: there is nothing to save.

    No Exception: whoever handles failures on the way has no part in it.
    """
