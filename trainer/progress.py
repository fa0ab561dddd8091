"""How far a run has come: its step, its totals, and the window since the last log point."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trainer.by_source import by_source, mean
from trainer.points import TOKENS
from trainer.protocols import StepResult

NONE, UNKNOWN = "0x0.0p+0", "nan"
_RATES = {
    TOKENS: "num_tokens",
    "onlookers_per_second": "num_onlookers",
    "images_per_second": "num_images",
}
_SUMS = ("loss_sum", "num_targets", "num_skipped", *_RATES.values())


class Progress:
    """Counters of the run. Sums stay on the device as fp64 until a log point reads them.

    fp64 counts exactly to 2**53: enough for 9e15 tokens.
    """

    def __init__(self, device: torch.device, sources: Sequence[str] = ()) -> None:
        """`sources`: the names of the sources of the data; one alone is not told apart."""
        self.sources = sources if len(sources) > 1 else ()
        self.step = 0
        self.evaluation_due = False
        """Whether a stop came before the evaluation of this step was done: the run's folder says so
        in a file, since a checkpoint stays as it is."""
        self.device = device
        self.total_tokens = self._zero()
        self.total_images = self._zero()
        self.window = {name: self._zero() for name in _SUMS}
        self.by_source = self._no_source()
        """(2, sources), of the window: the sum of losses and the targets of each source."""
        # Of the window, before this start: no time is known for them.
        self._before = dict.fromkeys(_RATES.values(), 0.0)
        self.last: StepResult | None = None
        self.stopwatch = Stopwatch(device)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def _no_source(self) -> Tensor:
        return torch.zeros(2, len(self.sources), dtype=torch.float64, device=self.device)

    def advance(self, result: StepResult) -> None:
        self.step += 1
        self.last = result
        self.total_tokens += result.num_tokens
        self.total_images += result.num_images
        for name in ("loss_sum", "num_targets", *_RATES.values()):
            self.window[name] += getattr(result, name)
        self.window["num_skipped"] += result.skipped
        self.by_source += result.by_source

    def close_window(self) -> dict[str, Any]:
        """Return the window's numbers and start a new one; of images once there was one."""
        assert self.last is not None
        # sync: the only one in the loop.
        sums = {name: float(value) for name, value in self.window.items()}
        images = int(self.total_images)
        counts = {rate: sums[name] - self._before[name] for rate, name in _RATES.items()}
        metrics = {
            "loss": mean(sums["loss_sum"], sums["num_targets"]),
            "num_targets": int(sums["num_targets"]),
            **by_source(self.sources, self.by_source.tolist()),
            "tokens": int(self.total_tokens),
            **({"images": images} if images else {}),
            "grad_norm": float(self.last.grad_norm),
            "lr": self.last.lr,
            "skipped_steps": int(sums["num_skipped"]),
            **self.stopwatch.lap(counts if images else {TOKENS: counts[TOKENS]}),
        }
        self.window = {name: self._zero() for name in _SUMS}
        self.by_source = self._no_source()
        self._before = dict.fromkeys(_RATES.values(), 0.0)
        return metrics

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, equal on every rank; hexadecimal, to lose no bit."""
        window = {name: float(value).hex() for name, value in self.window.items()}
        pairs = zip(self.sources, self.by_source.T.tolist(), strict=True)
        sources = {name: [value.hex() for value in pair] for name, pair in pairs}
        return {
            "step": self.step,
            "total_tokens": float(self.total_tokens).hex(),
            "total_images": float(self.total_images).hex(),
            "window": window,
            **({"by_source": sources} if sources else {}),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        """Be as far as a checkpoint, whatever was before."""
        self.total_tokens = self._zero() + float.fromhex(state["total_tokens"])
        # Checkpoints of version 0.1 counted no images.
        self.total_images = self._zero() + float.fromhex(state.get("total_images", NONE))
        saved = {name: float.fromhex(state["window"].get(name, NONE)) for name in _SUMS}
        self.window = {name: self._zero() + value for name, value in saved.items()}
        self.by_source = self._no_source()
        self._before = {name: saved[name] for name in _RATES.values()}
        # Checkpoints of version 0.1 told no sources apart: those of a window that is open are lost.
        found = state.get("by_source", {})
        # A source that others were told apart without was not there yet.
        lost = UNKNOWN if saved["num_targets"] and not found else NONE
        for number, name in enumerate(self.sources):
            for kind, value in enumerate(found.get(name, [lost, lost])):
                self.by_source[kind, number] += float.fromhex(value)


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

    def lap(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Return each count per second and the share of time spent waiting for data; start anew."""
        elapsed = max(1e-9, time.monotonic() - self._start - self._paused)
        lap = {
            **{name: count / elapsed for name, count in counts.items()},
            "data_wait_fraction": self._waited / elapsed,
        }
        self.start()
        return lap
