"""Documents that are longer than a row: refused, or cut with a word."""

import logging
from functools import cache

from trainer.data.document_store import DocumentStore
from trainer.errors import DataError

log = logging.getLogger(__name__)


def check_lengths(
    store: DocumentStore, name: str, *, row_tokens: int, num_virtual: int, is_cut: bool
) -> None:
    """Raise DataError for documents that no row has room for behind `num_virtual` tokens.

    Where they are cut instead, say once how much is lost.
    """
    lengths, room = store.all_lengths(), row_tokens - num_virtual
    too_long = lengths > room
    if not too_long.any():
        return
    lost = int((lengths[too_long] - room).sum())
    less = f" less {num_virtual} virtual tokens" if num_virtual else ""
    found = (
        f"{too_long.sum()} of {len(lengths)} documents ({name}) are longer than "
        f"data.row_tokens={row_tokens}{less}, the longest has {lengths.max()}"
    )
    if is_cut:
        _say(f"{found}: cut, {lost} of {lengths.sum()} tokens are lost")
        return
    if store.has_pairs:
        advice = "data.encoder.max_tokens: how many tokens of each text are kept"
    else:
        advice = f"data.too_long=cut, which loses {lost} of {lengths.sum()} tokens"
    raise DataError(f"{found}; raise data.row_tokens, or set {advice}")


@cache
def _say(text: str) -> None:
    """Log once what every building of the data finds: its length is asked before it is read."""
    log.info("%s", text)
