"""Decoding: transformers' tokens, the same through every cache, the right odds, and refusals."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.nn.model import DecoderModel
from tests.conftest import tiny_spec
from trainer.decoding import GenerationSpec, check_lengths, choose, generate, nucleus
from trainer.pretrained import save_pretrained

NEW = 12
PROMPTS = [[5, 17, 200, 31, 8, 90, 44], [7], [250, 3, 3, 99]]


def tiny_model() -> DecoderModel:
    """Weights far from initial ones: the likeliest token depends on every part of the prompt."""
    torch.manual_seed(0)
    model: DecoderModel = tiny_spec().build_causal_lm(chunk_tokens=64).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    return tiny_model()


@pytest.fixture(scope="module")
def oracle(model: DecoderModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same weights in transformers."""
    from transformers import LlamaForCausalLM

    folder: Path = tmp_path_factory.mktemp("oracle")
    save_pretrained(folder, model, tiny_spec().hf_config())
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def theirs(oracle: Any, prompts: list[list[int]], stops: tuple[int, ...] = (), **how: Any) -> Any:
    """Return what transformers generates after left-padded prompts, without the stop tokens."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **how}
    found = oracle.generate(ids, attention_mask=mask, eos_token_id=list(stops) or None, **settings)
    return [until_stop(row[longest:].tolist(), stops) for row in found]


def until_stop(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]


def likely_stops(model: DecoderModel, count: int) -> tuple[int, ...]:
    """Return tokens that greedy texts contain in their middle."""
    texts = generate(model, PROMPTS, GenerationSpec(max_new_tokens=NEW))
    return tuple(dict.fromkeys(text[4] for text in texts))[:count]


@pytest.mark.parametrize("num_stops", [0, 1, 2])
def test_greedy_batch_of_uneven_prompts_equals_transformers(
    model: DecoderModel, oracle: Any, num_stops: int
) -> None:
    stops = likely_stops(model, num_stops)
    spec = GenerationSpec(max_new_tokens=NEW, stop_token_ids=stops)
    found = generate(model, PROMPTS, spec)
    assert found == theirs(oracle, PROMPTS, stops)
    assert (min(map(len, found)) < NEW) == bool(stops)


@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("num_stops", [0, 1, 3])
def test_beam_search_equals_transformers(
    model: DecoderModel, oracle: Any, num_beams: int, length_penalty: float, num_stops: int
) -> None:
    stops = likely_stops(model, num_stops)
    spec = GenerationSpec(
        max_new_tokens=NEW,
        num_beams=num_beams,
        length_penalty=length_penalty,
        stop_token_ids=stops,
    )
    how = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": False}
    assert generate(model, PROMPTS, spec) == theirs(oracle, PROMPTS, stops, **how)


def test_beam_search_goes_on_where_most_candidates_are_stop_tokens(
    model: DecoderModel, oracle: Any
) -> None:
    """So many stop tokens that twice num_beams candidates may hold too few that go on."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        stops = tuple(torch.randperm(258, generator=generator)[:150].tolist())
        spec = GenerationSpec(max_new_tokens=NEW, num_beams=3, stop_token_ids=stops)
        how = {"num_beams": 3, "length_penalty": 1.0, "early_stopping": False}
        assert generate(model, PROMPTS, spec) == theirs(oracle, PROMPTS, stops, **how)


def test_as_many_beams_as_tokens_find_the_likeliest_pair(model: DecoderModel) -> None:
    (found,) = generate(model, PROMPTS[:1], GenerationSpec(max_new_tokens=2, num_beams=258))
    first = full_logits(model, PROMPTS[0])[-1].log_softmax(-1)
    pairs = torch.stack(
        [
            first[token] + full_logits(model, [*PROMPTS[0], token])[-1].log_softmax(-1)
            for token in range(258)
        ]
    )
    assert found == list(divmod(int(pairs.argmax()), 258))


def full_logits(model: DecoderModel, ids: list[int]) -> Tensor:
    """The slow reference: one whole forward pass of one row."""
    row = torch.tensor([ids])
    with torch.no_grad():
        logits = model(row, torch.arange(len(ids))[None], torch.ones_like(row))
    assert isinstance(logits, Tensor)
    return logits[0]


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}, {"num_beams": 3}], ids=str
)
def test_tokens_are_the_same_through_every_cache(model: DecoderModel, how: dict[str, Any]) -> None:
    texts = [
        generate(model, PROMPTS, GenerationSpec(max_new_tokens=NEW, cache=cache, **how))
        for cache in ("growing", "static", "none")
    ]
    assert texts[0] == texts[1] == texts[2]
    assert all(len(row) == NEW for row in texts[0])


def test_a_text_does_not_depend_on_its_neighbours_in_the_batch(model: DecoderModel) -> None:
    for how in ({}, {"num_beams": 3}):
        spec = GenerationSpec(max_new_tokens=NEW, **how)  # type: ignore[arg-type]
        alone = [generate(model, [prompt], spec)[0] for prompt in PROMPTS]
        assert generate(model, PROMPTS, spec) == alone
    drawn = GenerationSpec(max_new_tokens=NEW, temperature=1.0, seed=5)
    first = generate(model, PROMPTS[:1], drawn)
    assert generate(model, PROMPTS, drawn)[:1] == first


def test_equal_prompts_of_a_batch_are_continued_differently(model: DecoderModel) -> None:
    spec = GenerationSpec(max_new_tokens=NEW, temperature=1.0)
    texts = generate(model, [PROMPTS[0]] * 4, spec)
    assert len({tuple(text) for text in texts}) == 4


def test_the_seed_decides_what_is_drawn(model: DecoderModel) -> None:
    texts = [
        generate(model, PROMPTS, GenerationSpec(max_new_tokens=NEW, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 5])
def test_top_p_and_top_k_keep_what_a_slow_reference_keeps(top_p: float, top_k: int | None) -> None:
    probabilities = torch.randn(6, 40, dtype=torch.float64).mul(2).softmax(-1)
    kept = nucleus(probabilities, top_p, top_k)
    for row, found in zip(probabilities.tolist(), kept.tolist(), strict=True):
        assert found == reference_nucleus(row, top_p, top_k)


def reference_nucleus(row: list[float], top_p: float, top_k: int | None) -> list[float]:
    """Go down from the likeliest token until the sum reaches top_p."""
    kept, total = [0.0] * len(row), 0.0
    for rank, token in enumerate(sorted(range(len(row)), key=lambda t: -row[t])):
        if total >= top_p or (top_k is not None and rank >= top_k):
            break
        kept[token] = row[token]
        total += row[token]
    return kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.7, 1.0])
def test_frequencies_are_those_of_the_temperature(temperature: float, top_p: float) -> None:
    """Chi-squared of 20,000 draws over 5 tokens; 30 is beyond its 99.999th percentile."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    kept = reference_nucleus([w / sum(weights) for w in weights], top_p, None)
    expected = [p / sum(kept) for p in kept]
    draws = 20_000
    generator = torch.Generator().manual_seed(1)
    rows = logits.expand(draws, -1)
    counts = Counter(choose(rows, [generator] * draws, temperature=temperature, top_p=top_p))
    assert all(expected[token] > 0 for token in counts)
    cells = [(counts[token], draws * p) for token, p in enumerate(expected) if p > 0]
    assert sum((seen - mean) ** 2 / mean for seen, mean in cells) < 30


def test_a_temperature_near_zero_is_greedy(model: DecoderModel) -> None:
    greedy = generate(model, PROMPTS, GenerationSpec(max_new_tokens=NEW))
    cold = generate(model, PROMPTS, GenerationSpec(max_new_tokens=NEW, temperature=1e-4))
    assert cold == greedy


def test_every_chosen_token_is_announced_in_order(model: DecoderModel) -> None:
    stops = likely_stops(model, 2)
    heard: list[list[int]] = [[] for _ in PROMPTS]
    spec = GenerationSpec(max_new_tokens=NEW, stop_token_ids=stops)
    found = generate(model, PROMPTS, spec, lambda row, token: heard[row].append(token))
    assert heard == found


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=str)
def test_a_prompt_is_read_without_logits_of_all_its_positions(
    model: DecoderModel, how: dict[str, Any]
) -> None:
    """Those of 8k positions over 128k tokens would be 4 GB."""
    lengths: list[int] = []
    hook = model.head.register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
    generate(model, PROMPTS, GenerationSpec(max_new_tokens=3, **how))
    hook.remove()
    assert lengths
    assert set(lengths) == {1}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, ["max_new_tokens=0", "set it to 1"]),
        ({"num_beams": 0}, ["num_beams=0"]),
        ({"temperature": -1.0}, ["temperature=-1.0", "0 or more"]),
        ({"temperature": math.nan}, ["temperature=nan"]),
        ({"temperature": math.inf}, ["temperature=inf"]),
        ({"temperature": 1.0, "top_p": 0.0}, ["top_p=0.0"]),
        ({"temperature": 1.0, "top_p": 1.5}, ["top_p=1.5"]),
        ({"temperature": 1.0, "top_k": 0}, ["top_k=0"]),
        ({"cache": "paged"}, ["'paged'", "growing, static, none"]),
        ({"top_p": 0.9}, ["top_p=0.9", "no effect", "temperature"]),
        ({"top_k": 5}, ["top_k=5", "no effect", "temperature"]),
        ({"num_beams": 2, "temperature": 0.7}, ["temperature=0.7", "no effect", "beam"]),
        ({"length_penalty": 2.0}, ["length_penalty=2.0", "no effect", "num_beams"]),
    ],
    ids=str,
)
def test_a_setting_that_is_wrong_or_without_effect_is_refused(
    settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError, match="; ") as refusal:
        GenerationSpec(**settings)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_texts_beyond_the_models_positions_are_refused() -> None:
    spec = GenerationSpec(max_new_tokens=60)
    check_lengths([[1, 2, 3, 4]], spec, 64)
    with pytest.raises(ValueError, match="max_new_tokens to 59"):
        check_lengths([[1], [1, 2, 3, 4, 5]], spec, 64)
    with pytest.raises(ValueError, match="shorten the prompt") as refusal:
        check_lengths([[1] * 64], spec, 64)
    assert "to 0" not in str(refusal.value)
    with pytest.raises(ValueError, match="empty"):
        check_lengths([[]], spec, 64)
