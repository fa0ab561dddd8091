"""Documents that share a row see neither each other's text nor each other's images."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity.oracle import built, relative, specs
from models.nn.backends import backend
from tests.images import (
    encoded,
    endless_tokenizer,
    picture,
    tokenizer,
    write_pictures,
    write_rows,
)
from trainer.batch import Batch
from trainer.data.images.processor import ImageProcessor
from trainer.data.vision_text import VisionTextEncoder
from trainer.data.vision_text_data import VisionTextData

TOKENIZER = tokenizer()
SPEC = specs()["Idefics"]
COUNT = 12


def rows(names: list[str]) -> list[dict[str, Any]]:
    """Return rows of no image, of one, and of two, in turn."""
    return [
        [
            {"prompt": f"{n}: plain", "completion": "." * (n + 1)},
            {"image": names[2 * n], "text": f"{n} a caption"},
            {"images": names[2 * n :][:2], "prompt": f"{n}: <image> and <image>",
             "completion": "." * (n + 1)},
        ][n % 3]
        for n in range(COUNT)
    ]  # fmt: skip


def batches(
    folder: Path, changed: int | None = None, packing: Any = "best_fit", has_eos: bool = True
) -> list[Batch]:
    """Return a step of all documents; `changed`: the one whose first image is another."""
    names = write_pictures(folder, 2 * COUNT)
    if changed is not None:
        (folder / names[2 * changed]).write_bytes(encoded(picture(999)))
    data = VisionTextData(
        path=write_rows(folder / "rows.jsonl", rows(names)), encoder=VisionTextEncoder(),
        processor=ImageProcessor(image_size=SPEC.vision_config.image_size), row_images=4,
        eval_fraction=0.0, row_tokens=64, micro_rows=2, global_documents=COUNT, packing=packing,
        cache=str(folder / "cache"),
    )  # fmt: skip
    own = TOKENIZER if has_eos else endless_tokenizer(folder)
    loader, _ = data.build(tokenizer=own, seed=0, rank=0, num_ranks=1)
    return loader.step(0).micro_batches


def model_of(attention: str, dtype: torch.dtype) -> Any:
    model = built(replace(SPEC, vocab_size=258, additional_vocab_size=2))
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend(attention)
    return model.to(dtype)


@torch.no_grad()
def logits(model: Any, found: list[Batch]) -> dict[int, Tensor]:
    of_documents = {}
    for batch in found:
        whole = model(batch.input_ids, batch.position_ids, batch.segment_ids, **batch.images)
        for row, source in enumerate(batch.provenance):
            for segment, document in enumerate(re.findall(r"\[(\d+):", source), start=1):
                of_documents[int(document)] = whole[row, batch.segment_ids[row] == segment]
    assert sorted(of_documents) == list(range(COUNT))
    return of_documents


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("has_eos", [True, False])
def test_another_documents_image_changes_no_bit_of_a_documents_logits(
    tmp_path: Path, attention: str, has_eos: bool
) -> None:
    before = batches(tmp_path / "a", has_eos=has_eos)
    assert max(int(batch.segment_ids.max()) for batch in before) > 2
    model = model_of(attention, torch.float32)
    expected = logits(model, before)
    for target in (1, 5, 8):
        found = logits(model, batches(tmp_path / str(target), target, has_eos=has_eos))
        for document in expected:
            is_equal = torch.equal(found[document], expected[document])
            assert is_equal == (document != target), (target, document)


def test_a_packed_document_has_the_logits_that_it_has_alone(tmp_path: Path) -> None:
    model = model_of("eager", torch.float64)
    packed = logits(model, batches(tmp_path))
    alone = logits(model, batches(tmp_path, packing="off"))
    for document in packed:
        assert relative(packed[document], alone[document]) < 1e-12
