"""The exit codes that supervisors, schedulers and tests rely on. Standard library only."""

FINISHED = 0
CHECK_FAILED = 1
CORRUPT = 16
BAD_CONFIG = 64
DATA = 65
INTERNAL = 70
STORAGE = 74
PREEMPTED = 75
NO_PROGRESS = 93  # NVIDIA's resiliency extension has it, too

MEANINGS = {
    FINISHED: "finished; the last step is committed",
    CHECK_FAILED: "a check failed (verify, export, tokenize check=DIR), or a job of a sweep did",
    CORRUPT: "copies of the weights differ: memory or a chip is at fault; use other nodes",
    BAD_CONFIG: "bad config, illegal number of processes, or the run directory is in use",
    DATA: "the data cannot be read or used",
    INTERNAL: "internal error, out of memory, or too many non-finite steps",
    STORAGE: "no good checkpoint could be written or read",
    PREEMPTED: "stopped by a signal, a limit or a lost node; saved; start the same command again",
    NO_PROGRESS: "restarted again and again, or stopped by stop_at, without a new checkpoint",
}


# Decisions of ours: no accident ends a process with one of these, and the same would happen again.
FINAL = (CORRUPT, BAD_CONFIG, DATA, STORAGE)


def in_words(code: int) -> str:
    return f"exit code {code} ({MEANINGS.get(code, 'unknown')})"


def code_of(error: Exception) -> int:
    """Return the exit code that tells this failure from others."""
    from errno import EDQUOT, EIO, ENOSPC, EROFS

    from trainer.errors import CheckError, CorruptionError, DataError, StorageError

    if isinstance(error, OSError) and error.errno in (ENOSPC, EIO, EDQUOT, EROFS):
        return STORAGE

    codes: dict[type[Exception], int] = {
        ValueError: BAD_CONFIG,
        DataError: DATA,
        CheckError: CHECK_FAILED,
        CorruptionError: CORRUPT,
        StorageError: STORAGE,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), INTERNAL)
