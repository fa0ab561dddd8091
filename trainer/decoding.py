"""Text from a whole model on one device: greedy, sampled or by beam search, with a cache."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.nn.cache import Cache, GrowingCache, StaticCache

CACHES = ("growing", "static", "none")


@dataclass(frozen=True, kw_only=True)
class GenerationSpec:
    """How text is chosen."""

    max_new_tokens: int = 100
    temperature: float = 0.0
    """0 takes the likeliest token; above it, tokens are drawn."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this much probability."""
    top_k: int | None = None
    """Draw from this many likeliest tokens."""
    num_beams: int = 1
    """Sequences that beam search keeps; 1: none."""
    length_penalty: float = 1.0
    """Beam search divides the sum of log-probabilities by length ** length_penalty."""
    stop_token_ids: tuple[int, ...] = ()
    cache: str = "growing"
    """`growing`, `static` (fixed shapes), or `none` (all positions anew at every token)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; set it to 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} is no temperature; set it to 0 or more"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is no probability; set it above 0, up to 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} is not positive; set it to 1 or more, or null")
        if self.cache not in CACHES:
            raise ValueError(
                f"cache={self.cache!r} is unknown; set it to one of {', '.join(CACHES)}"
            )
        self._check_effects()

    def _check_effects(self) -> None:
        is_drawn = self.temperature > 0
        without_effect = {
            "top_p": self.top_p < 1 and not is_drawn,
            "top_k": self.top_k is not None and not is_drawn,
            "length_penalty": self.length_penalty != 1 and self.num_beams == 1,
            "temperature": is_drawn and self.num_beams > 1,
        }
        for name, has_none in without_effect.items():
            if has_none:
                reason = "with beam search" if name == "temperature" else "here"
                needed = {"length_penalty": "set num_beams above 1"}.get(name, "set temperature")
                remedy = "leave it out" if name == "temperature" else f"{needed} or leave it out"
                raise ValueError(f"{name}={getattr(self, name)} has no effect {reason}; {remedy}")


def choose(
    logits_BV: Tensor,
    generators: list[torch.Generator],
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int | None = None,
) -> list[int]:
    """Return each row's next id: the likeliest at temperature 0, else drawn, in fp64 on the CPU.

    A row draws from its own generator: its text does not depend on its neighbours.
    """
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    probabilities = nucleus((logits_BV.double().cpu() / temperature).softmax(-1), top_p, top_k)
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]


def nucleus(probabilities_BV: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Return the probabilities with all but the likeliest tokens at zero, not renormalised.

    The smallest set of likeliest tokens that holds at least `top_p` stays. Source: Holtzman et al.
    2020.
    """
    ordered, order = probabilities_BV.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    keeps = before < top_p
    if top_k is not None:
        keeps[:, top_k:] = False
    return torch.zeros_like(ordered).scatter(-1, order, ordered * keeps)


class Decoder:
    """A batch of sequences that grows by one token per row and call, padded on the left."""

    def __init__(self, model: Any, prompts: list[list[int]], cache: str, max_length: int) -> None:
        longest, device = max(map(len, prompts)), next(model.parameters()).device
        padded = [[0] * (longest - len(p)) + p for p in prompts]
        real = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        self.model = model
        self.ids = torch.tensor(padded, device=device)
        self.segment_ids = torch.tensor(real, device=device)
        self.cache = _cache(cache, model, max_length)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Return the (B, V) logits of what follows."""
        positions = (self.segment_ids.cumsum(1) - 1).clamp(min=0)
        start = 0
        if self.cache is not None and self.cache.length > 0:
            start = self.ids.shape[1] - 1
        inputs = (self.ids[:, start:], positions[:, start:], self.segment_ids[:, start:])
        extra = {} if self.cache is None else {"cache": self.cache}
        hidden_BTD = self.model.trunk(*inputs, **extra)
        # The head sees the last position only: logits of 8k x 128k in fp32 would take 4 GB.
        logits_B1V: Tensor = self.model.head(hidden_BTD[:, -1:], inputs[2][:, -1:])
        return logits_B1V[:, 0]

    def append(self, tokens: list[int]) -> None:
        """Add one id to every row."""
        next_ids = torch.tensor(tokens, device=self.ids.device)[:, None]
        self.ids = torch.cat((self.ids, next_ids), dim=1)
        ones = torch.ones_like(next_ids)
        self.segment_ids = torch.cat((self.segment_ids, ones), dim=1)

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        self.ids, self.segment_ids = self.ids[rows], self.segment_ids[rows]
        if self.cache is not None:
            self.cache.reorder(rows)


def _cache(kind: str, model: Any, max_length: int) -> Cache | None:
    if kind == "none":
        return None
    num_layers = model.trunk.num_cached_layers
    return GrowingCache(num_layers) if kind == "growing" else StaticCache(num_layers, max_length)


def check_lengths(prompts: list[list[int]], spec: GenerationSpec, max_positions: int) -> None:
    """Raise ValueError where a prompt is empty, or prompt and new tokens exceed the positions."""
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        room = max_positions - len(prompt)
        if room < spec.max_new_tokens:
            lower = f"lower max_new_tokens to {room} or " if room > 0 else ""
            raise ValueError(
                f"{len(prompt)} prompt tokens and max_new_tokens={spec.max_new_tokens} exceed "
                f"max_position_embeddings={max_positions}; {lower}shorten the prompt"
            )


def generate(
    model: Any,
    prompts: list[list[int]],
    spec: GenerationSpec,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the new ids of each prompt, up to and without its stop token.

    `on_token(row, id)` hears of every token as it is chosen, but not in beam search. The same seed
    gives the same text.
    """
    if spec.num_beams > 1:
        from trainer.beam_search import beam_search

        return [beam_search(model, prompt, spec) for prompt in prompts]
    results: list[list[int]] = [[] for _ in prompts]
    for next_ids in _steps(model, prompts, spec):
        for row, token in enumerate(next_ids):
            if token is not None:
                results[row].append(token)
                if on_token is not None:
                    on_token(row, token)
    return results


def _steps(
    model: Any, prompts: list[list[int]], spec: GenerationSpec
) -> Iterator[list[int | None]]:
    """Yield the next id of each row; None once the row has stopped."""
    max_length = max(map(len, prompts)) + spec.max_new_tokens
    decoder = Decoder(model, prompts, spec.cache, max_length)
    generators = _generators(spec.seed, len(prompts))
    has_stopped = [False] * len(prompts)
    for _ in range(spec.max_new_tokens):
        tokens = choose(  # sync: the host decides who has stopped
            decoder.logits(),
            generators,
            temperature=spec.temperature,
            top_p=spec.top_p,
            top_k=spec.top_k,
        )
        decoder.append(tokens)
        has_stopped = [
            stopped or token in spec.stop_token_ids
            for stopped, token in zip(has_stopped, tokens, strict=True)
        ]
        yield [
            None if stopped else token for stopped, token in zip(has_stopped, tokens, strict=True)
        ]
        if all(has_stopped):
            break


def _generators(seed: int, count: int) -> list[torch.Generator]:
    """Return one generator per row: equal prompts get different texts, whatever comes behind."""
    source = torch.Generator().manual_seed(seed)
    seeds = [int(torch.randint(2**63 - 1, (), generator=source)) for _ in range(count)]
    return [torch.Generator().manual_seed(row_seed) for row_seed in seeds]
