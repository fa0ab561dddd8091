"""Beam search: the sequences of highest log-probability per length, several at a time."""

from typing import Any

import torch
from torch import Tensor

from trainer.decoder import Decoder, PromptImages, decoder_of
from trainer.decoding import GenerationSpec


def beam_search(
    model: Any, prompt: list[int], spec: GenerationSpec, images: PromptImages | None = None
) -> list[int]:
    """Return the new ids of the best sequence, without its stop token.

    `images`: those of the prompt, once for each beam; None: it has none.
    Scores are sums of log-probabilities over length ** length_penalty, the stop token counted. At
    every length so many candidates are looked at that num_beams can go on even where others stop.
    It ends when num_beams sequences have stopped and the best running one scores no better than the
    worst of them.
    """
    length = len(prompt) + spec.max_new_tokens
    decoder = decoder_of(model, [prompt] * spec.num_beams, spec.cache, length, images)
    # All beams start equal: only the first counts, or they would stay equal.
    scores = torch.full((spec.num_beams,), -torch.inf, dtype=torch.float64)
    scores[0] = 0.0
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, spec.max_new_tokens + 1):
        log_p_BV = decoder.logits().double().cpu().log_softmax(-1) + scores[:, None]
        rows, tokens, scores = _go_on(log_p_BV, decoder, finished, len(prompt), length, spec)
        decoder.reorder(rows)
        decoder.append(tokens)
        finished = sorted(finished, key=lambda item: -item[0])[: spec.num_beams]
        best_running = scores.max().item() / length**spec.length_penalty
        if len(finished) == spec.num_beams and finished[-1][0] >= best_running:
            break
    else:
        for ids, score in zip(decoder.ids.tolist(), scores.tolist(), strict=True):
            penalty = spec.max_new_tokens**spec.length_penalty
            finished.append((score / penalty, ids[len(prompt) :]))
    return max(finished, key=lambda item: item[0])[1]


def _go_on(
    log_p_BV: Tensor,
    decoder: Decoder,
    finished: list[tuple[float, list[int]]],
    prompt_length: int,
    length: int,
    spec: GenerationSpec,
) -> tuple[Tensor, list[int], Tensor]:
    """Return row, token and score of the beams that go on; put those that stop to `finished`."""
    vocab_size = log_p_BV.shape[1]
    # Every beam may stop in every way, and num_beams others must still go on.
    count = min(max(2, 1 + len(spec.stop_token_ids)) * spec.num_beams, log_p_BV.numel())
    best, places = log_p_BV.flatten().topk(count)
    going: list[tuple[int, int, float]] = []
    for rank, (score, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
        row, token = divmod(place, vocab_size)
        if token not in spec.stop_token_ids:
            going.append((row, token, score))
        elif rank < spec.num_beams:  # a stop below the beam is no result
            ids = decoder.ids[row, prompt_length:].tolist()
            finished.append((score / length**spec.length_penalty, ids))
    rows, tokens, scores = zip(*going[: spec.num_beams], strict=True)
    device = decoder.ids.device
    return (
        torch.tensor(rows, device=device),
        list(tokens),
        torch.tensor(scores, dtype=torch.float64),
    )
