"""New rows beside a vocabulary compute what one larger matrix computes, to 1e-12 in fp64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.parity.oracle import VOCAB, specs
from models.layout import Layout
from models.nn.decoupled import add_rows, merge_rows, new_rows
from models.nn.head import Loss
from models.nn.model import DecoderModel
from trainer.parallel.materialise import materialise, random_values
from trainer.pretrained import save_pretrained

NEW = 3
CASES = [("Llama", True), ("Llama", False), ("Gemma", True), ("Gemma", False),
         ("GPT-BigCode (MQA)", True), ("Idefics", False), ("Idefics", True)]  # fmt: skip


def decoupled(family: str, tied: bool) -> tuple[Any, DecoderModel]:
    """Return the spec without new rows, and its model with them, in random numbers."""
    own = {"additional_vocab_size": 0} if family == "Idefics" else {}
    spec = replace(specs()[family], tie_word_embeddings=tied, initializer_range=0.1, **own)
    with torch.device("meta"):
        model = spec.build_causal_lm(chunk_tokens=7).double()
        add_rows(model, spec.layout.embedding, NEW)
    materialise(model, torch.device("cpu"), random_values(model, 0.1, 0))
    model.requires_grad_(True)
    return spec, model


def merged(family: str, tied: bool) -> DecoderModel:
    _, model = decoupled(family, tied)
    merge_rows(model)
    return model.requires_grad_(True)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB + NEW, (2, 24), generator=generator)
    ids[:, ::5] = VOCAB + torch.arange(5) % NEW
    positions = torch.arange(24).expand(2, -1)
    return {"input_ids": ids, "position_ids": positions, "segment_ids": torch.ones_like(ids)}


def logits_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = batch()
    loss = model(**inputs, labels=inputs["input_ids"].roll(-1, 1), scale=torch.tensor(0.1).double())
    assert isinstance(loss, Loss)
    loss.objective.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return model(**inputs).detach(), gradients


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_new_rows_compute_what_one_matrix_computes(family: str, tied: bool) -> None:
    model, whole = decoupled(family, tied)[1], merged(family, tied)
    rows = new_rows(model)
    assert len(rows) == (1 if tied else 2)
    logits, gradients = logits_and_gradients(model)
    expected, whole_gradients = logits_and_gradients(whole)
    assert logits.shape[-1] == VOCAB + NEW
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    for name, front in rows.items():
        both = torch.cat((gradients.pop(name), gradients.pop(front))).roll(-NEW, 0)
        assert both[-NEW:].abs().min() > 0
        torch.testing.assert_close(both, whole_gradients.pop(front), rtol=0, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole_gradients[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("family", "tied"), CASES[:5])
def test_transformers_computes_the_same_from_the_merged_matrix(
    family: str, tied: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    spec, model = decoupled(family, tied)
    config = replace(spec, vocab_size=VOCAB + NEW).hf_config()
    save_pretrained(tmp_path, merged(family, tied), config)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    inputs = batch()
    found = oracle.double().eval()(inputs["input_ids"]).logits
    torch.testing.assert_close(found, model.eval()(**inputs), rtol=0, atol=1e-6)


def test_an_embedding_that_computes_otherwise_is_refused() -> None:
    class Odd(nn.Embedding):
        pass

    model = nn.ModuleDict({"embed": Odd(4, 2)})
    layout = Layout(blocks=(), colwise=(), rowwise=(), embedding="embed")
    with pytest.raises(ValueError, match="beside embed, a Odd"):
        add_rows(model, layout.embedding, 1)


def test_an_idefics_with_additional_rows_takes_no_others() -> None:
    with torch.device("meta"):
        model = specs()["Idefics"].build_causal_lm(chunk_tokens=7)
    with pytest.raises(ValueError, match=r"set model.additional_vocab_size=0"):
        add_rows(model, "model.embed_tokens", 1)
