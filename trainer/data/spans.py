"""Which tokens have a character of a stretch of text."""

import numpy as np


def tokens_between(places: np.ndarray, start: int, stop: int) -> tuple[int, int]:
    """Return the first and the last token with a character in [start, stop); last < first: none.

    `places` are the characters (n, 2) of each token, which never decrease: so these tokens are
    neighbours. One without a character counts for the next.
    """
    stops = np.maximum(places[:, 1], places[:, 0] + 1)
    first = np.searchsorted(stops, start, side="right")
    return int(first), int(np.searchsorted(places[:, 0], stop, side="left")) - 1
