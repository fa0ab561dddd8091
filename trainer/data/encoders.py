"""Tokenising in several processes, in the order of the texts whatever the number of processes."""

import multiprocessing as mp
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np

from trainer.data.tokenizers import Tokenizer
from trainer.errors import DataError

Chunk = tuple[list[str], list[str]]
"""Names that go along, and texts."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The tokens of a chunk of texts, one text after the other."""

    tokens: np.ndarray
    lengths: np.ndarray
    """Tokens of each text."""
    num_bytes: np.ndarray
    """UTF-8 bytes of each text."""

    @classmethod
    def of(cls, texts: list[str], tokenizer: Tokenizer, dtype: np.dtype[Any]) -> "Encoded":
        ids = tokenizer.encode_documents(texts)
        return cls(
            tokens=np.concatenate(ids).astype(dtype),
            lengths=np.array([len(one) for one in ids]),
            num_bytes=np.array([len(text.encode()) for text in texts]),
        )


class Encoders:
    """Worker processes with a pipe each; with one worker this process does the work.

    Chunks go round the workers, and each has one at a time: results come in order and two full
    pipes never wait for each other. A worker ends when its pipe does, also after `kill -9` of this
    process. Spawned, not forked: whoever reads texts may run threads.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any], workers: int) -> None:
        self.tokenizer, self.dtype, self.workers = tokenizer, dtype, workers

    def __enter__(self) -> "Encoders":
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        if self.workers > 1:
            # Ctrl-C reaches the whole group, and only this process decides what it means. Workers
            # inherit that it is ignored; a mask would not do: multiprocessing unblocks it.
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                for _ in range(self.workers):
                    self._start()
            finally:
                signal.signal(signal.SIGINT, before)
        return self

    def _start(self) -> None:
        context = mp.get_context("spawn")
        mine, theirs = context.Pipe()
        arguments = (theirs, self.tokenizer, self.dtype)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._pipes.append(mine)
        self._processes.append(process)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()

    def encode(self, chunks: Iterator[Chunk]) -> Iterator[tuple[list[str], Encoded]]:
        """Yield the names and tokens of every chunk, in order."""
        if not self._pipes:
            for names, texts in chunks:
                yield names, Encoded.of(texts, self.tokenizer, self.dtype)
            return
        waiting: deque[tuple[list[str], int]] = deque()
        for number, (names, texts) in enumerate(chunks):
            worker = number % self.workers
            if len(waiting) == self.workers:
                done, oldest = waiting.popleft()
                encoded = self._receive(oldest)
                self._send(worker, texts)  # before the result is used: nobody idles meanwhile
                waiting.append((names, worker))
                yield done, encoded
            else:
                self._send(worker, texts)
                waiting.append((names, worker))
        for names, worker in waiting:
            yield names, self._receive(worker)

    def _send(self, worker: int, texts: list[str]) -> None:
        try:
            self._pipes[worker].send(texts)
        except OSError:
            raise self._is_dead(worker) from None

    def _receive(self, worker: int) -> Encoded:
        try:
            encoded: Encoded = self._pipes[worker].recv()
        except (EOFError, OSError):
            raise self._is_dead(worker) from None
        return encoded

    def _is_dead(self, worker: int) -> DataError:
        process = self._processes[worker]
        process.join()
        return DataError(
            f"tokenising process {process.pid} died with exit code {process.exitcode}; start the "
            "same command again, with fewer workers= if memory ran out"
        )


def _work(pipe: Connection, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
    """Encode what comes until the pipe ends."""
    try:
        while True:
            pipe.send(Encoded.of(pipe.recv(), tokenizer, dtype))
    except (EOFError, OSError):
        return
