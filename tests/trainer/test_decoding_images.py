"""Decoding with images: transformers' tokens, through every cache, each image encoded once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity.oracle import built, specs, theirs
from trainer.decoder import CACHES, Decoder, PromptImages, decoder_of
from trainer.decoding import GenerationSpec, continued, generate

SPEC = specs()["Idefics"]
NEW = 10
PROMPTS = [[5, 17, 130, 31, 8, 90, 44], [7, 9], [120, 3, 3, 99]]


@pytest.fixture(scope="module")
def model() -> Any:
    return built(SPEC).double()


def images() -> tuple[Tensor, Tensor]:
    """Return two images for each prompt, and who sees which: one prompt sees none at its end."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((3, 2, 3, 12, 12), generator=generator, dtype=torch.float64)
    mask = torch.zeros((3, 7, 2), dtype=torch.int64)
    mask[0, 2:5, 0] = mask[0, 5:, 1] = mask[1, 5:, 0] = 1
    return pixels, mask


def shown(model: Any, cache: str) -> Decoder:
    decoder = decoder_of(model, PROMPTS, cache, 7 + NEW)
    decoder.show(*images())
    return decoder


@pytest.fixture(scope="module")
def expected(model: Any) -> list[list[int]]:
    """Transformers' texts, each prompt alone: nothing is padded."""
    oracle, (pixels, mask) = theirs(SPEC, model).double(), images()
    oracle.generation_config.eos_token_id = None
    found = []
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        texts = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), pixel_values=pixels[row : row + 1],
            image_attention_mask=mask[row : row + 1, -len(prompt) :], max_new_tokens=NEW,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        found.append(texts[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("cache", CACHES)
def test_texts_about_images_equal_those_of_transformers(
    model: Any, expected: list[list[int]], cache: str
) -> None:
    spec = GenerationSpec(max_new_tokens=NEW)
    assert continued(shown(model, cache), spec) == expected
    blind = continued(decoder_of(model, PROMPTS, cache, 7 + NEW), spec)
    assert [own == other for own, other in zip(blind, expected, strict=True)][:2] == [False, False]


def test_several_prompts_are_answered_together_with_the_images_of_each(
    model: Any, expected: list[list[int]]
) -> None:
    pixels, mask = images()
    shown = PromptImages(pixels, mask)
    assert generate(model, PROMPTS, GenerationSpec(max_new_tokens=NEW), images=shown) == expected
    beams = GenerationSpec(max_new_tokens=NEW, num_beams=3)
    together = generate(model, PROMPTS, beams, images=shown)
    for row, prompt in enumerate(PROMPTS):
        own = PromptImages(pixels[row : row + 1], mask[row : row + 1, 7 - len(prompt) :])
        assert generate(model, [prompt], beams, images=own) == [together[row]]


def test_images_are_encoded_once_where_a_cache_keeps_them(model: Any) -> None:
    for cache, expected in (("growing", 1), ("static", 1), ("none", NEW)):
        count = 0

        def counts(*_: Any) -> None:
            nonlocal count
            count += 1

        hook = model.trunk.vision_model.register_forward_hook(counts)
        continued(shown(model, cache), GenerationSpec(max_new_tokens=NEW))
        hook.remove()
        assert count == expected


@pytest.mark.parametrize("cache", CACHES)
def test_rows_that_change_places_take_their_images_along(model: Any, cache: str) -> None:
    decoder, other = shown(model, cache), shown(model, cache)
    for each in (decoder, other):
        each.logits()
    decoder.reorder(torch.tensor([2, 0, 0]))
    decoder.append([4, 5, 5])
    other.append([5, 6, 4])
    expected = other.logits()[[2, 0, 0]]
    assert (decoder.logits() - expected).abs().max() < 1e-12 * expected.abs().max()
