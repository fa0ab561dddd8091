"""Documents that share a row do not see each other, from a jsonl file to the logits."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity.oracle import built, relative, specs
from models.nn.backends import backend
from trainer.batch import Batch
from trainer.data.chat import ChatEncoder
from trainer.data.document_data import DocumentData
from trainer.data.tokenizers import ByteTokenizer

FAMILIES = ("Llama", "Gemma", "GPT-BigCode (MQA)", "GPT-BigCode (MHA)")
BACKENDS = ("eager", "sdpa", "flex")
TEXTS = [f"{n}: " + "to pack or to pad " * (n % 3) + "." * n for n in range(12)]


def batches(folder: Path, texts: list[str], packing: Any = "best_fit") -> list[Batch]:
    """Return the micro-batches of a step that holds all texts, read from a file."""
    folder.mkdir(exist_ok=True)
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DocumentData(
        path=str(path), encoder=ChatEncoder(), eval_fraction=0.0, row_tokens=64, micro_rows=2,
        global_documents=len(texts), packing=packing, cache=str(folder / "cache"),
    )  # fmt: skip
    loader, _ = data.build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1)
    return loader.step(0).micro_batches


def places(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """Yield row, segment and document of everything in a batch."""
    for row, source in enumerate(batch.provenance):
        for segment, number in enumerate(re.findall(r"\[(\d+):", source), start=1):
            yield row, segment, int(number)


def between_others(found: list[Batch]) -> int:
    """Return a document that shares its row with one before it and one behind it."""
    return next(
        document
        for batch in found
        for row, segment, document in places(batch)
        if 1 < segment < batch.segment_ids[row].max()
    )


def neighbour_of(found: list[Batch], document: int) -> int:
    """Return the document behind another one in its row."""
    placed = [place for batch in found for place in places(batch)]
    return placed[[number for _, _, number in placed].index(document) + 1][2]


@torch.no_grad()
def logits(model: Any, found: list[Batch]) -> dict[int, Tensor]:
    """Return the logits of each document."""
    of_documents = {}
    for batch in found:
        whole = model(batch.input_ids, batch.position_ids, batch.segment_ids)
        for row, segment, document in places(batch):
            of_documents[document] = whole[row, batch.segment_ids[row] == segment]
    assert sorted(of_documents) == list(range(len(TEXTS)))
    return of_documents


def model_of(family: str, attention: str, dtype: torch.dtype) -> Any:
    model = built(replace(specs()[family], vocab_size=ByteTokenizer().vocab_size))
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend(attention)
    return model.to(dtype)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_another_document_in_the_row_changes_no_bit_of_a_documents_logits(
    tmp_path: Path, family: str, attention: str
) -> None:
    before = batches(tmp_path / "a", TEXTS)
    target = between_others(before)
    changed = [text[::-1].upper() if n == target else text for n, text in enumerate(TEXTS)]
    after = batches(tmp_path / "b", changed)
    model = model_of(family, attention, torch.float32)
    expected, found = logits(model, before), logits(model, after)
    for document in expected:
        is_equal = torch.equal(found[document], expected[document])
        assert is_equal == (document != target), document


def gradients(model: Any, found: list[Batch], target: int) -> dict[str, Tensor]:
    """Return the gradient of every weight, of a loss on the logits of one document alone."""
    model.zero_grad()
    for batch in found:
        own = [(row, segment) for row, segment, document in places(batch) if document == target]
        for row, segment in own:
            whole = model(batch.input_ids, batch.position_ids, batch.segment_ids)
            whole[row, batch.segment_ids[row] == segment].float().square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])  # flex has no backward pass on a CPU
@pytest.mark.parametrize("family", FAMILIES)
def test_another_document_in_the_row_changes_no_bit_of_the_gradients_of_a_documents_loss(
    tmp_path: Path, family: str, attention: str
) -> None:
    before = batches(tmp_path / "a", TEXTS)
    changed = between_others(before)
    texts = [text[::-1].upper() if n == changed else text for n, text in enumerate(TEXTS)]
    after = batches(tmp_path / "b", texts)
    target = neighbour_of(before, changed)
    model = model_of(family, attention, torch.float32)
    expected, found = gradients(model, before, target), gradients(model, after, target)
    assert any(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_document_has_the_logits_that_it_has_alone(
    tmp_path: Path, family: str, attention: str
) -> None:
    model = model_of(family, attention, torch.float64)
    packed = logits(model, batches(tmp_path, TEXTS))
    for batch in batches(tmp_path, TEXTS, packing="off"):
        for row, segment, document in places(batch):
            is_in = batch.segment_ids[row] == segment
            ids, positions = batch.input_ids[row, is_in][None], batch.position_ids[row, is_in][None]
            with torch.no_grad():
                alone = model(ids, positions, torch.ones_like(ids))[0]
            assert relative(packed[document], alone) < 1e-12
