"""Which image each token may look at: the latest one of its own document, or none."""

import numpy as np


def latest_image(
    ids: np.ndarray, segments: np.ndarray, image_token_id: int, eos_token_id: int | None
) -> np.ndarray:
    """Return for every token of a row (T,) which of the row's images it may look at; -1: none.

    That is the latest at or before it: none before the first image of its document, none behind an
    EOS until the next image, none in padding (segment 0). On a row of one document this is what
    transformers' IdeficsProcessor computes; it would show a packed document the image of the one
    before, had that no EOS.
    """
    places = np.arange(len(ids))
    is_image = (ids == image_token_id) & (segments > 0)  # padding may have the id of anything
    is_first = np.diff(segments, prepend=-1) != 0
    latest = _latest(is_image, places)
    start = _latest(is_first, places)
    is_end = np.zeros(len(ids), bool) if eos_token_id is None else ids == eos_token_id
    end = np.roll(_latest(is_end, places), 1)
    end[:1] = -1  # an EOS itself still looks: only what is behind it does not
    sees = (segments > 0) & (latest >= start) & (latest > end)
    return np.where(sees, np.cumsum(is_image) - 1, -1)


def _latest(is_here: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the last place up to each at which something is; -1: nowhere."""
    return np.maximum.accumulate(np.where(is_here, places, -1))
