"""What a manifest says of a file: all of it, in words that hardly grow with the ranks."""

import json
import random
from itertools import accumulate, pairwise

import pytest

from trainer.checkpoint.parts import FilePart, check_entry, entry_of, hashed


def sharded(sizes: list[int], ranks: int) -> list[FilePart]:
    """Return the parts of a file of tensors that many ranks share by rows of 4 bytes, as FSDP2."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for first, last in pairwise(accumulate(sizes, initial=0)):
        share = -(-(last - first) // 4 // ranks) * 4
        for rank, ranges in enumerate(found):
            start = min(first + rank * share, last)
            stop = min(start + share, last)
            if start < stop:
                ranges.append((start, stop))
    return [FilePart("model", ranges, f"of {n}") for n, ranges in enumerate(found) if ranges]


def covered(ranges: list[tuple[int, int]]) -> set[int]:
    return {place for start, stop in ranges for place in range(start, stop)}


@pytest.mark.parametrize("seed", range(20))
def test_every_hash_has_the_bytes_that_its_rank_wrote(seed: int) -> None:
    """However the pieces are dealt: of equal length, at random, or in turns with strides."""
    generator = random.Random(seed)
    sizes = [4 * generator.randrange(1, 40) for _ in range(generator.randrange(1, 8))]
    parts = sharded(sizes, generator.randrange(1, 9))
    if seed % 2:  # any rank may have any piece
        pieces = [one for part in parts for one in part.ranges]
        owners = [generator.randrange(4) for _ in pieces]
        dealt = {
            number: sorted(
                one for one, owner in zip(pieces, owners, strict=True) if owner == number
            )
            for number in set(owners)
        }
        parts = [FilePart("model", ranges, str(number)) for number, ranges in dealt.items()]
    entry = json.loads(json.dumps(entry_of("model", sum(sizes), parts)))
    check_entry(entry)
    found = {xxh3: list(ranges) for ranges, xxh3 in hashed(entry)}
    assert {part.xxh3: covered(part.ranges) for part in parts} == {
        xxh3: covered(ranges) for xxh3, ranges in found.items()
    }
    for ranges in found.values():  # in the order in which they were hashed
        assert ranges == sorted(ranges)


@pytest.mark.parametrize(
    ("runs", "hashes"), [([], 1), ([[0, 1, 1, 8]], 2), ([[0, 2, 2, 4]], 3), ([[1, 1, 1, 8]], 2)]
)
def test_a_hash_of_no_bytes_is_refused(runs: list[list[int]], hashes: int) -> None:
    size = sum(count * each for _, _, count, each in runs)
    with pytest.raises(ValueError, match="a hash has no piece"):
        check_entry({"bytes": size, "runs": runs, "xxh3": ["00"] * hashes})


def test_more_ranks_add_a_hash_each_and_nothing_else() -> None:
    sizes = [4 * 512 * n for n in (3, 1, 7, 7, 2)] * 20
    few, many = (entry_of("model", sum(sizes), sharded(sizes, ranks)) for ranks in (8, 512))
    assert len(many["runs"]) == len(few["runs"]) == len(sizes)
    assert len(many["xxh3"]) == 512


def test_two_axes_of_ranks_make_runs_with_strides() -> None:
    """Tensors that are cut by one axis first, and others that are cut by the other one first."""
    ranges: dict[int, list[tuple[int, int]]] = {rank: [] for rank in range(16)}
    for number in range(10):
        order = range(16) if number % 2 else [4 * (n % 4) + n // 4 for n in range(16)]
        for place, rank in enumerate(order):
            start = 160 * number + 10 * place
            ranges[rank].append((start, start + 10))
    parts = [FilePart("model", own, str(rank)) for rank, own in ranges.items()]
    entry = entry_of("model", 1600, parts)
    assert len(entry["runs"]) == 5 * 1 + 5 * 4
    assert {h: list(r) for r, h in hashed(entry)} == {p.xxh3: p.ranges for p in parts}
