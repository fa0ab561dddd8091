"""Panics of packages in Rust: no Exception, so nothing that catches those sees them."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_panic(kind: type[Exception]) -> Iterator[None]:
    """Raise `kind` where tokenizers panics: over a tokenizer.json that it cannot use after all, or
    a text that takes one of its patterns too long. Serves as a decorator, too."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of each such package its own
            raise
        reason = " ".join(str(error).split())[:200]
        raise kind(
            f"the package tokenizers gives up: {reason}; give another tokenizer, or leave out the "
            "text"
        ) from None
