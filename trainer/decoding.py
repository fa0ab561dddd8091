"""Text from a whole model on one device: greedy, sampled or by beam search, with a cache."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.decoder import CACHES, Decoder, PromptImages, decoder_of


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
    images: PromptImages | None = None,
) -> list[list[int]]:
    """Return the new ids of each prompt, up to and without its stop token.

    `on_token(row, id)` hears of every token as it is chosen, but not in beam search. The same seed
    gives the same text. `images`: of the prompts, for a model that looks at some.
    """
    if spec.num_beams > 1:
        from trainer.beam_search import beam_search

        own = [
            images and images.repeated(row, len(prompt), spec.num_beams)
            for row, prompt in enumerate(prompts)
        ]
        pairs = zip(prompts, own, strict=True)
        return [beam_search(model, prompt, spec, shown) for prompt, shown in pairs]
    length = max(map(len, prompts)) + spec.max_new_tokens
    return continued(decoder_of(model, prompts, spec.cache, length, images), spec, on_token)


def continued(
    decoder: Decoder,
    spec: GenerationSpec,
    on_token: Callable[[int, int], None] | None = None,
    is_over: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Return the new ids of each row, up to and without its stop token; no beams.

    `is_over` hears after every token whether all rows have stopped, and says whether that is the
    end: ranks that run their passes together agree in it.
    """
    results: list[list[int]] = [[] for _ in decoder.ids]
    for next_ids in _steps(decoder, spec, is_over):
        for row, token in enumerate(next_ids):
            if token is not None:
                results[row].append(token)
                if on_token is not None:
                    on_token(row, token)
    return results


def _steps(
    decoder: Decoder, spec: GenerationSpec, is_over: Callable[[bool], bool]
) -> Iterator[list[int | None]]:
    """Yield the next id of each row; None once the row has stopped."""
    generators = _generators(spec.seed, len(decoder.ids))
    has_stopped = [False] * len(decoder.ids)
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
        if is_over(all(has_stopped)):
            break


def _generators(seed: int, count: int) -> list[torch.Generator]:
    """Return one generator per row: equal prompts get different texts, whatever comes behind."""
    source = torch.Generator().manual_seed(seed)
    seeds = [int(torch.randint(2**63 - 1, (), generator=source)) for _ in range(count)]
    return [torch.Generator().manual_seed(row_seed) for row_seed in seeds]
