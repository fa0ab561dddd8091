"""Prompt tuning: what virtual tokens compute, which targets count, and what documents become."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.parity.oracle import specs
from models.nn.head import IGNORED
from models.nn.prompt import prompt_rows, virtual_ids
from tests.conftest import tiny_spec
from tests.runs import tiny_run
from tests.trainer.test_model_path import saved
from trainer.adapters.lora import LoRA
from trainer.adapters.prompt import PromptTuning
from trainer.batch import Batch
from trainer.data.chat import ChatEncoder
from trainer.data.classification import SequenceEncoder
from trainer.data.document_data import DocumentData
from trainer.data.preferences import PreferenceEncoder
from trainer.data.tagging import TokenEncoder
from trainer.data.token_folder import TokenFolder
from trainer.data.tokenizers import ByteTokenizer
from trainer.errors import DataError
from trainer.hf_auto import HFAutoModel
from trainer.parallel.materialise import materialise, random_values
from trainer.run import Run
from trainer.tasks.preferences import DPOTask

CPU = torch.device("cpu")
BYTES = ByteTokenizer()
COUNT = 3
PROMPT = PromptTuning(num_virtual_tokens=COUNT)
VIRTUAL = range(258, 258 + COUNT)
ONES = torch.ones(1, COUNT + 1, dtype=torch.int64)
TEXTS: list[dict[str, Any]] = [{"text": "abc" * (n % 4 + 1)} for n in range(6)]
PAIRS: list[dict[str, Any]] = [{"prompt": f"{n}? ", "completion": "yes" * n} for n in (1, 2, 3)]


def documents(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> DocumentData:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "encoder": ChatEncoder(), "row_tokens": 40, "global_documents": len(rows),
        "micro_rows": 2, "eval_fraction": 0.0, "cache": str(folder / "cache"),
    }  # fmt: skip
    return DocumentData(path=str(path), **settings | changes)


def run_on(data: Any, **changes: Any) -> Run:
    settings = {"adapter": PROMPT, "precision": "fp64"}
    return replace(tiny_run(None, **settings | changes), data=data)


def batches(data: DocumentData, virtual: Any = VIRTUAL) -> list[Batch]:
    loader, _ = data.build(tokenizer=BYTES, seed=0, rank=0, num_ranks=1, virtual_ids=virtual)
    return loader.step(0).micro_batches


def segments(found: list[Batch]) -> list[tuple[list[int], list[int], list[int]]]:
    """Return ids, labels and positions of every document, in an order of their own."""
    every = []
    for batch in found:
        columns = (batch.input_ids, batch.labels, batch.position_ids)
        for row, of_row in enumerate(batch.segment_ids):
            for segment in range(1, int(of_row.max()) + 1):
                every.append([column[row][of_row == segment].tolist() for column in columns])
    return sorted((ids, labels, positions) for ids, labels, positions in every)


def filled(run: Run, *, is_plain: bool = False) -> nn.Module:
    """Return the run's model with weights, or the one that it adapts, with the same."""
    model = run.plan_model() if is_plain else run.trained_model()
    values = random_values(model, 0.1, run.seed)
    materialise(model, CPU, values if is_plain else run.adapter.values(model, values))
    return model.eval()


class Given(nn.Module):
    """Stands in for an embedding: what it answers was computed before."""

    def __init__(self, x_BTD: Tensor) -> None:
        super().__init__()
        self.x_BTD = x_BTD

    def forward(self, _: Tensor) -> Tensor:
        return self.x_BTD


def reference(run: Run, prompt: Tensor, ids: list[int], labels: list[int]) -> tuple[Tensor, Tensor]:
    """Return loss and logits of one document, its embedded prompt concatenated by hand.

    `labels` are those of the document alone, as transformers has them: not shifted.
    """
    model: Any = filled(run, is_plain=True)
    embedding = run.model.layout.embedding
    embedded = model.get_submodule(embedding)(torch.tensor([ids])).detach()
    model.set_submodule(embedding, Given(torch.cat((prompt[None], embedded), 1)))
    length = len(prompt) + len(ids)
    rows = (torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None])
    logits = model(*rows, torch.ones(1, length, dtype=torch.int64))[0]
    targets = torch.tensor([*[IGNORED] * len(prompt), *labels])
    # The usual shift, as in peft.
    return F.cross_entropy(logits[:-1], targets[1:], reduction="sum"), logits


def unshifted(ids: list[int], labels: list[int]) -> list[int]:
    """Return a document's labels as transformers has them, of ours, which are shifted."""
    is_whole = all(label != IGNORED for label in labels[:-1])
    return [ids[0] if is_whole else IGNORED, *labels[:-1]]


def plain_segments(data: DocumentData) -> list[tuple[list[int], list[int]]]:
    return [(ids, unshifted(ids, labels)) for ids, labels, _ in segments(batches(data, ()))]


@pytest.mark.parametrize("family", ["Llama", "Gemma", "GPT-BigCode (MQA)"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradient_are_those_of_a_prompt_that_is_concatenated_by_hand(
    family: str, tied: bool, tmp_path: Path
) -> None:
    spec: Any = replace(specs()[family], vocab_size=258, tie_word_embeddings=tied)
    data = documents(tmp_path, [*TEXTS, *PAIRS])
    run = run_on(data, model=spec)
    model = filled(run)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches(data):
        rows = (batch.input_ids, batch.position_ids, batch.segment_ids)
        loss = model(*rows, batch.labels, torch.ones((), dtype=torch.float64))
        loss.objective.backward()
        total += loss.sum
    (name,) = prompt_rows(model)
    prompt = model.get_parameter(name).detach().clone().requires_grad_()
    expected = sum(reference(run, prompt, *one)[0] for one in plain_segments(data))
    assert isinstance(expected, Tensor)
    (gradient,) = torch.autograd.grad(expected, prompt)
    found = model.get_parameter(name).grad
    assert found is not None
    assert gradient.abs().min() > 0
    assert float((found - gradient).abs().max() / gradient.abs().max()) <= 1e-12
    assert float(total) == pytest.approx(float(expected.detach()), rel=1e-12)
    others = [n for n, p in model.named_parameters() if p.grad is not None and n != name]
    assert others == []


@torch.no_grad()
def test_packed_documents_have_the_logits_of_each_document_alone(tmp_path: Path) -> None:
    data = documents(tmp_path, [*TEXTS, *PAIRS])
    run = run_on(data)
    model: Any = filled(run)
    (name,) = prompt_rows(model)
    found = {}
    for batch in batches(data):
        logits = model(batch.input_ids, batch.position_ids, batch.segment_ids)
        for row, of_row in enumerate(batch.segment_ids):
            for segment in range(1, int(of_row.max()) + 1):
                at = of_row == segment
                found[tuple(batch.input_ids[row][at].tolist())] = logits[row][at]
    assert max(int(batch.segment_ids.max()) for batch in batches(data)) > 1
    alone = plain_segments(data)
    assert {ids[COUNT:] for ids in found} == {tuple(ids) for ids, _ in alone}
    for ids, labels in alone:
        _, logits = reference(run, model.get_parameter(name), ids, labels)
        assert float((found[(*VIRTUAL, *ids)] - logits).abs().max()) <= 1e-12


@pytest.mark.parametrize("packing", ["best_fit", "off"])
def test_every_document_begins_with_the_virtual_tokens(packing: Any, tmp_path: Path) -> None:
    data = documents(tmp_path, [*TEXTS, *PAIRS], packing=packing)
    before, after = segments(batches(data, ())), segments(batches(data))
    assert len(before) == len(after) == len(TEXTS) + len(PAIRS)
    for (ids, labels, _), (ids_after, labels_after, positions) in zip(before, after, strict=True):
        assert ids_after == [*VIRTUAL, *ids]
        assert labels_after[COUNT:] == labels
        assert labels_after[: COUNT - 1] == [IGNORED] * (COUNT - 1)
        assert positions == list(range(COUNT + len(ids)))
    assert len(list((tmp_path / "cache" / "documents").iterdir())) == 1  # one key for both


def test_tokens_are_counted_without_virtual_ones(tmp_path: Path) -> None:
    data = documents(tmp_path, [*TEXTS, *PAIRS])
    loaders = [
        data.build(tokenizer=BYTES, seed=0, rank=0, num_ranks=1, virtual_ids=ids)[0]
        for ids in ((), VIRTUAL)
    ]
    plain, step = (loader.step(0) for loader in loaders)
    assert plain.num_tokens == step.num_tokens > 0
    places = sum(int((batch.segment_ids > 0).sum()) for batch in step.micro_batches)
    assert places == step.num_tokens + COUNT * (len(TEXTS) + len(PAIRS))


def test_the_first_token_is_a_target_where_the_whole_document_is_learnt(tmp_path: Path) -> None:
    for rows, is_learnt in ((TEXTS, True), (PAIRS, False)):
        data = documents(tmp_path / str(is_learnt), rows)
        for ids, labels, _ in segments(batches(data)):
            assert labels[COUNT - 1] == (ids[COUNT] if is_learnt else IGNORED)


def test_labels_of_words_and_of_texts_are_those_without_virtual_tokens(tmp_path: Path) -> None:
    words = [{"tokens": ["a", "bc"], "tags": ["X", "Y"]}, {"tokens": ["d"], "tags": ["Y"]}]
    data = documents(tmp_path / "words", words, encoder=TokenEncoder())
    before, after = segments(batches(data, ())), segments(batches(data))
    for (_, labels, _), (_, labels_after, _) in zip(before, after, strict=True):
        assert labels_after == [*[IGNORED] * COUNT, *labels]
    texts = [{"text": "ab" * n, "label": "xy"[n % 2]} for n in (1, 2, 3)]
    data = documents(tmp_path / "texts", texts, encoder=SequenceEncoder(), packing="off")
    for plain, batch in zip(batches(data, ()), batches(data), strict=True):
        assert plain.class_labels is not None
        assert batch.class_labels is not None
        assert torch.equal(plain.class_labels, batch.class_labels)
        assert (batch.labels == IGNORED).all()


def test_a_document_that_is_cut_keeps_what_fits_behind_the_virtual_tokens(tmp_path: Path) -> None:
    rows = [{"text": "abcdefghij"}, {"text": "k"}]
    data = documents(tmp_path, rows, row_tokens=8, too_long="cut")
    (long, labels, _), (short, *_) = segments(batches(data))
    assert long == [*VIRTUAL, BYTES.bos_token_id, *b"abcd"]
    assert labels == [IGNORED, IGNORED, BYTES.bos_token_id, *b"abcde"]
    assert short == [*VIRTUAL, BYTES.bos_token_id, *b"k", BYTES.eos_token_id]
    whole = replace(data, too_long="refuse")
    with pytest.raises(DataError, match=r"row_tokens=8 less 3 virtual tokens, the longest has 12"):
        batches(whole)
    assert len(segments(batches(replace(whole, row_tokens=15)))) == 2  # 12 and 3: just so


def test_virtual_tokens_start_as_rows_of_the_vocabulary_by_the_seed(tmp_path: Path) -> None:
    data = documents(tmp_path, TEXTS)
    starts = {}
    for seed in (0, 1):
        run = run_on(data, seed=seed, model=tiny_spec(hidden_size=32))
        model = filled(run)
        table = model.get_parameter("model.embed_tokens.weight")
        (name,) = prompt_rows(model)
        rows = model.get_parameter(name)
        starts[seed] = [int((table == row).all(1).nonzero()[0, 0]) for row in rows]
        assert filled(run).get_parameter(name).equal(rows)
    assert starts[0] != starts[1]
    assert len(set(starts[0] + starts[1])) > COUNT
    random = run_on(data, adapter=replace(PROMPT, init="random"))
    model = filled(random)
    rows = model.get_parameter(name)
    table = model.get_parameter("model.embed_tokens.weight")
    assert not any((table == row).all(1).any() for row in rows)
    assert 0.05 < float(rows.detach().std()) < 0.2


@torch.no_grad()
def test_a_scaled_embedding_hands_scaled_rows_to_the_virtual_tokens_and_leaves_them(
    tmp_path: Path,
) -> None:
    """What peft does: it copies what the embedding computes, and puts it behind it."""
    run = run_on(documents(tmp_path, TEXTS), model=replace(specs()["Gemma"], vocab_size=258))
    model = filled(run)
    embedding = model.get_submodule("model.embed_tokens")
    computed = embedding(torch.arange(258)[None])[0]
    for row in embedding(torch.tensor([list(VIRTUAL)]))[0]:
        assert float((computed - row).abs().amax(1).min()) <= 1e-6  # they start in fp32
    (name,) = prompt_rows(model)
    assert embedding(torch.tensor([list(VIRTUAL)]))[0].equal(model.get_parameter(name))


def test_the_rows_alone_train_and_decay_spares_them(tmp_path: Path) -> None:
    run = run_on(documents(tmp_path, TEXTS), model=tiny_spec(tie_word_embeddings=False))
    model = run.trained_model()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(prompt_rows(model)) == {"model.embed_tokens.additional_embedding.weight"}
    assert not run.rules(model).decays(*trained, shape=(2, 8))
    assert virtual_ids(model) == run.virtual_ids == VIRTUAL
    logits: Any = filled(run)(torch.tensor([[*VIRTUAL, 5]]), torch.arange(4)[None], ONES)
    assert logits.shape[-1] == 258  # no logit of a virtual token
    whole = replace(run, adapter=replace(PROMPT, modules_to_save=("lm_head", "norm")))
    trained = {name for name, p in whole.trained_model().named_parameters() if p.requires_grad}
    assert trained == {*prompt_rows(model), "lm_head.weight", "model.norm.weight"}


UNTIED = tiny_spec(tie_word_embeddings=False)
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"model": tiny_spec(additional_tokens=("<a>",))},
        r"has additional rows already.*take out model.additional_tokens",
    ),
    (
        {"adapter": replace(PROMPT, modules_to_save=("embed_tokens",)), "model": UNTIED},
        r"model.embed_tokens holds the embedding, .*; take it out",
    ),
    (
        {"adapter": replace(PROMPT, modules_to_save=("model",)), "model": UNTIED},
        r"model holds the embedding, .*; take it out",
    ),
    (
        {"adapter": replace(PROMPT, modules_to_save=("lm_head",))},
        r"peft would untie them .*tie_word_embeddings=false",
    ),
    (
        {"adapter": replace(PROMPT, num_virtual_tokens=40)},
        r"row_tokens=40 leaves no place behind 40 virtual tokens; raise it",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_the_check(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = run_on(documents(tmp_path, TEXTS), **changes)
    with pytest.raises(ValueError, match=message) as caught:
        run.check(1)
    assert "\n" not in str(caught.value)


def test_pairs_are_refused(tmp_path: Path) -> None:
    pairs = [{"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3"}]
    data = documents(tmp_path, pairs, encoder=PreferenceEncoder())
    with pytest.raises(ValueError, match=r"a pair is one document of two texts; set adapter"):
        run_on(data, task=DPOTask()).check(1)


def test_an_embedding_of_transformers_that_computes_otherwise_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "base", "gemma", head_dim=4)
    run = run_on(documents(tmp_path, TEXTS), model=HFAutoModel(path=str(tmp_path / "base")))
    with pytest.raises(ValueError, match=r"beside model.embed_tokens, a Gemma.* of its own; set"):
        run.check(1)


def test_an_idefics_with_additional_rows_is_refused() -> None:
    run = tiny_run(None, adapter=PROMPT, model=specs()["Idefics"])
    with pytest.raises(ValueError, match="has additional rows already"):
        run.trained_model()


def test_rows_that_cut_documents_are_refused(cache: Path) -> None:
    run = tiny_run(cache, adapter=PROMPT)
    with pytest.raises(ValueError, match=r"3 virtual tokens before every document.*set data=chat"):
        run.check(1)
    tokens = TokenFolder(path="unused", row_tokens=32, global_rows=8)
    with pytest.raises(ValueError, match="set data=chat"):
        tokens.check_virtual(VIRTUAL)
    tokens.check_virtual(())


@pytest.mark.parametrize("count", [0, -1])
def test_no_virtual_token_at_all_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"adapter.num_virtual_tokens=.* is not positive; set it"):
        PromptTuning(num_virtual_tokens=count)


def test_other_adapters_leave_documents_alone(tmp_path: Path) -> None:
    run = run_on(documents(tmp_path, TEXTS), adapter=LoRA())
    assert run.virtual_ids == range(0)
    assert (
        np.array([ids for ids, *_ in segments(batches(run.data, run.virtual_ids))[:1]]).max() < 258
    )
