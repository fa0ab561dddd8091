"""How far a run has come: its step, its totals, and the window since the last log point."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trainer.protocols import StepResult

_SUMS = ("loss_sum", "num_targets", "num_tokens", "num_skipped")


class Progress:
    """Counters of the run. Sums stay on the device as fp64 until a log point reads them.

    fp64 counts exactly to 2**53: enough for 9e15 tokens.
    """

    def __init__(self, device: torch.device) -> None:
        self.step = 0
        self.device = device
        self.total_tokens = self._zero()
        self.window = {name: self._zero() for name in _SUMS}
        # Of the window, from before this start: no time is known for them.
        self._tokens_before = 0.0
        self.last: StepResult | None = None
        self.stopwatch = Stopwatch(device)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def advance(self, result: StepResult) -> None:
        self.step += 1
        self.last = result
        self.total_tokens += result.num_tokens
        self.window["loss_sum"] += result.loss_sum
        self.window["num_targets"] += result.num_targets
        self.window["num_tokens"] += result.num_tokens
        self.window["num_skipped"] += result.skipped

    def close_window(self) -> dict[str, Any]:
        """Return the window's numbers and start a new one."""
        assert self.last is not None
        # sync: the only one in the loop.
        sums = {name: float(value) for name, value in self.window.items()}
        metrics = {
            "loss": _ratio(sums["loss_sum"], sums["num_targets"]),
            "num_targets": int(sums["num_targets"]),
            "tokens": int(self.total_tokens),
            "grad_norm": float(self.last.grad_norm),
            "lr": self.last.lr,
            "skipped_steps": int(sums["num_skipped"]),
            **self.stopwatch.lap(int(sums["num_tokens"] - self._tokens_before)),
        }
        self.window = {name: self._zero() for name in _SUMS}
        self._tokens_before = 0.0
        return metrics

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, equal on every rank; hexadecimal, to lose no bit."""
        window = {name: float(value).hex() for name, value in self.window.items()}
        return {"step": self.step, "total_tokens": float(self.total_tokens).hex(), "window": window}

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.total_tokens += float.fromhex(state["total_tokens"])
        for name in _SUMS:
            self.window[name] += float.fromhex(state["window"][name])
        self._tokens_before = float.fromhex(state["window"]["num_tokens"])


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")


class Stopwatch:
    """Measures training time alone: evaluation and saving are left out, data wait is told apart."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start()

    def start(self) -> None:
        """Begin to measure, now."""
        self._start = time.monotonic()
        self._paused = self._waited = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self._device.type == "cuda":
            # sync: steps still queued belong to training. What follows waits for them anyway.
            torch.cuda.synchronize(self._device)
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def lap(self, num_tokens: int) -> dict[str, float]:
        """Return throughput (tokens/s) and the share of time spent waiting for data; start anew."""
        elapsed = max(1e-9, time.monotonic() - self._start - self._paused)
        lap = {
            "tokens_per_second": num_tokens / elapsed,
            "data_wait_fraction": self._waited / elapsed,
        }
        self.start()
        return lap
