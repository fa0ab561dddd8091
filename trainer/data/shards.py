"""One file of tokens and of what belongs to them: its layout, and how pieces of it are read.

    header     64 bytes: magic, version, then place, size and xxh3_128 of the footer
    sections   arrays one after the other, each beginning at a multiple of 8 bytes
    hashes     xxh3_64 of every 4 MiB between the header and here
    footer     JSON: the sections, counts, tokenizer, xxh3_128 of the hashes

All numbers are little-endian. Every shard has `tokens` and `starts` (the first token of every
document, then the number of tokens); other sections are free. Beside one of bytes, of which each
document may have any number, stands `NAME_starts`, which is to it what `starts` is to the tokens.
Opening reads header and footer. Pieces are read with `pread`: unlike a mapping, it takes no memory
that grows with what was read, and a disk that fails raises an error instead of killing the process
with SIGBUS.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trainer.errors import DataError

SUFFIX = ".shard"
TOKENS, STARTS, HASHES = "tokens", "starts", "hashes"
_DTYPES = ("|u1", "<u2", "<u4", "<u8", "<i4", "<i8", "<f4", "<f8")
OF_BYTES = "_starts"  # behind the name of a section of bytes
MAGIC, VERSION = b"TESSERA\0", 1
HEADER = struct.Struct("<8sI4xQQ16s16x")
BLOCK_BYTES = 4 << 20
_NEAR = 512  # starts in this many documents are read at once


@dataclass(frozen=True, kw_only=True)
class Section:
    """Where one array lies."""

    name: str
    dtype: str
    """As numpy writes it: `<u2`."""
    offset: int
    """From the beginning of the file, in bytes."""
    count: int

    @property
    def stop(self) -> int:
        return self.offset + self.count * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the ids of a shard mean."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: int
    bos_token_id: int | None
    """The id that every document begins with; None: none."""
    eos_token_id: int | None
    """The id that every document ends with; None: none."""

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What a shard says about itself."""

    num_tokens: int
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the source texts; 0: unknown."""
    vocabulary: Vocabulary
    sections: dict[str, Section]
    """By name; the hashes are the last of the file."""
    xxh3_128_of_hashes: str
    fingerprint: str
    """xxh3_128 of the footer, which holds that of all hashes: it stands for every byte."""


class Shard:
    """An open shard. DataError names file and place of whatever is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        try:
            self.footer = self._read_footer()
        except DataError:
            self.close()
            raise

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of a section, in its own type."""
        section = self.footer.sections[name]
        array = np.empty(max(0, min(stop, section.count) - start), section.dtype)
        self._fill(array.view(np.uint8), section.offset + start * array.itemsize)
        return array

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return token ids [start, stop); DataError if one lies outside the vocabulary."""
        tokens = self.read(TOKENS, start, stop)
        if len(tokens) and tokens.max() >= self.footer.vocabulary.vocab_size:
            place = int(tokens.argmax())
            offset = self.footer.sections[TOKENS].offset + (start + place) * tokens.itemsize
            raise DataError(
                f"{self.path} holds token {tokens[place]} at byte {offset}, its vocabulary has "
                f"{self.footer.vocabulary.vocab_size}; delete {self.path.parent} and start again"
            )
        return tokens

    def documents(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """Return which document holds token `start`, and its and all later starts below `stop`.

        One more start ends the array: the first that is not below `stop`.
        """
        first, size = self._document_at(start), _NEAR
        while True:
            starts = self.read(STARTS, first, first + size)
            number = int(np.searchsorted(starts, stop))
            if number < len(starts):
                return first, starts[: number + 1]
            size *= 8

    def _document_at(self, place: int) -> int:
        """Return the last document that begins at or before `place`, which is one of the tokens.

        Starts are read where equally long documents would have it; every second time in the middle,
        which ends soon however long they are. Of 5 M documents that takes 3 reads.
        """
        low, high, is_even = 0, self.footer.sections[STARTS].count - 1, True
        before, behind = 0, self.footer.num_tokens
        while (num := high - low) >= _NEAR:  # before = starts[low] <= place < starts[high] = behind
            guess = low + ((place - before) * num // (behind - before) if is_even else num // 2)
            first = min(max(low, guess - _NEAR // 2), high + 1 - _NEAR)
            starts = self.read(STARTS, first, first + _NEAR)
            number = int(np.searchsorted(starts, place, side="right"))
            if 0 < number < _NEAR:
                return first + number - 1
            if number:
                low, before = first + _NEAR - 1, int(starts[-1])
            else:
                high, behind = first, int(starts[0])
            is_even = not is_even
        near = self.read(STARTS, low, high + 1)
        return low + int(np.searchsorted(near, place, side="right")) - 1

    def damaged(self) -> Iterator[tuple[int, int]]:
        """Read the whole file; yield the bytes [first, last) of every block that was changed."""
        place = self.footer.sections[HASHES]
        hashes = self.read(HASHES, 0, place.count)
        if xxhash.xxh3_128_hexdigest(hashes.data) != self.footer.xxh3_128_of_hashes:
            yield place.offset, place.stop
            return
        block = np.empty(BLOCK_BYTES, np.uint8)
        for number, expected in enumerate(hashes):
            start = HEADER.size + number * BLOCK_BYTES
            part = block[: min(BLOCK_BYTES, place.offset - start)]
            self._fill(part, start)
            if xxhash.xxh3_64_intdigest(part.data) != expected:
                yield start, start + len(part)

    def close(self) -> None:
        """Close the file, which the next read opens again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()

    def _fill(self, buffer: np.ndarray, offset: int) -> None:
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            done = 0
            while done < len(buffer):
                count = os.preadv(self._descriptor, [buffer[done:].data], offset + done)
                if not count:
                    break
                done += count
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read at byte {offset}: {error.strerror}; "
                "bring the file back, or the disk that it lies on"
            ) from error
        if done < len(buffer):
            raise self._is_broken(f"ends at byte {offset + done}, needed {offset + len(buffer)}")

    def _read_footer(self) -> Footer:
        head = np.empty(HEADER.size, np.uint8)
        self._fill(head, 0)
        magic, version, offset, size, digest = HEADER.unpack(head.tobytes())
        if magic != MAGIC:
            raise self._is_broken(f"begins with {magic!r}, needed {MAGIC!r}")
        if version != VERSION:
            raise DataError(
                f"{self.path} has version {version} of the format, this Tessera reads {VERSION}; "
                "make it again with tessera tokenize"
            )
        found = self.path.stat().st_size
        if found != offset + size:
            raise self._is_broken(f"has {found} bytes, its header says {offset + size}")
        text = np.empty(size, np.uint8)
        self._fill(text, offset)
        if xxhash.xxh3_128_digest(text.data) != digest:
            raise self._is_broken(f"has a footer at byte {offset} that does not match its hash")
        try:
            footer = parse_footer(text.tobytes())
            self._check_sections(footer, offset)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._is_broken(f"has no footer that can be used: {error!r}") from None
        return footer

    @staticmethod
    def _check_sections(footer: Footer, end: int) -> None:
        """Raise ValueError for sections that are no numbers, or lie outside the file: the hashes
        tell of accidents alone, and anyone can write a shard."""
        for section in footer.sections.values():
            if section.dtype not in _DTYPES or type(section.count) is not int:
                raise ValueError(f"{section.name} holds {section.count} of {section.dtype!r}")
            if not HEADER.size <= section.offset <= section.stop <= end:
                raise ValueError(f"{section.name} lies outside the file")
        for name in (TOKENS, STARTS, HASHES):
            footer.sections[name]

    def _is_broken(self, what: str) -> DataError:
        return DataError(f"{self.path} {what}; delete {self.path.parent} and start again")


def parse_footer(text: bytes) -> Footer:
    """Return the footer that `text` is."""
    tree = json.loads(text)
    sections = [Section(**section) for section in tree["sections"]]
    return Footer(
        num_tokens=tree["num_tokens"],
        num_documents=tree["num_documents"],
        num_bytes=tree["num_bytes"],
        vocabulary=Vocabulary(**tree["vocabulary"]),
        sections={section.name: section for section in sections},
        xxh3_128_of_hashes=tree["xxh3_128_of_hashes"],
        fingerprint=xxhash.xxh3_128_hexdigest(text),
    )
