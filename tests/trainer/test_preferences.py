"""Pairs of texts as documents, and runs on them: any ranks, packing and accumulation."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.chat_templates import CHATML, tokenizer
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.adapters.lora import IA3, LoRA
from trainer.data.document_data import DocumentData
from trainer.data.examples import BadRowError
from trainer.data.preferences import PreferenceEncoder
from trainer.data.tokenizers import ByteTokenizer
from trainer.errors import DataError
from trainer.inspection.counts import count
from trainer.mesh import MeshSpec
from trainer.record import read_lines
from trainer.tasks.causal_lm import CausalLMTask
from trainer.tasks.classification import SequenceClassificationTask
from trainer.tasks.preferences import DPOTask, RewardTask

PAIRS = [
    {"prompt": f"{n} + {n} = ", "chosen": str(2 * n), "rejected": "no" * (1 + n % 3)}
    for n in range(40)
]
BYTES, DORA = ByteTokenizer(), LoRA(rank=2, use_dora=True)
TASKS: dict[str, dict[str, Any]] = {
    "reward": {"task": RewardTask()},
    "dpo": {
        "task": DPOTask(beta=0.5, label_smoothing=0.1, chunk_tokens=24),
        "adapter": LoRA(rank=2, init_lora_weights=False),
    },
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS, {"chosen": "a"}]))
    return path


def data(path: Path, **changes: Any) -> DocumentData:
    settings: dict[str, Any] = {
        "path": str(path), "eval_fraction": 0.2, "row_tokens": 64, "global_documents": 8,
        "micro_rows": 1, "cache": str(path.parent / "cache"), "encoder": PreferenceEncoder(),
    }  # fmt: skip
    return DocumentData(**settings | changes)


def run_on(path: Path, cache: Path, kind: str, **changes: Any) -> Any:
    own = {k: changes.pop(k) for k in ("packing", "micro_rows", "row_tokens") if k in changes}
    settings = {"precision": "fp64", "max_steps": 3, "eval_every": 3, "save_every": 2}
    run = tiny_run(cache, **settings | TASKS[kind] | changes)
    encoder = PreferenceEncoder(learns="reward" if kind == "reward" else "text")
    return replace(run, data=data(path, encoder=encoder, **own))


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Return what each line says that no machine decides."""
    names = (
        "loss", "num_targets", "grad_norm", "accuracy", "margin", "chosen_reward",
        "rejected_reward", "chosen_logps", "rejected_logps",
    )  # fmt: skip
    return [
        {k: line[k] for k in names if k in line} for line in read_lines(folder / "metrics.jsonl")
    ]


def test_rewards_do_not_depend_on_packing_accumulation_or_ranks(
    path: Path, tmp_path: Path, cache: Path
) -> None:
    run_ranks(1, train, tmp_path / "one", run_on(path, cache, "reward", micro_rows=8))
    run = run_on(path, cache, "reward", packing="off", mesh=MeshSpec(dp_replicate=2))
    run_ranks(2, train, tmp_path / "two", run)
    one, two = (numbers(tmp_path / name) for name in ("one", "two"))
    assert [line["num_targets"] for line in one[:3]] == [8, 8, 8]
    for found, expected in zip(two, one, strict=True):
        assert found == pytest.approx(expected, rel=1e-11)


def test_dpo_is_the_same_on_any_ranks_also_resumed_on_others(
    path: Path, tmp_path: Path, cache: Path
) -> None:
    run_ranks(1, train, tmp_path / "one", run_on(path, cache, "dpo", micro_rows=8))
    sharded = run_on(path, cache, "dpo", packing="off", mesh=MeshSpec(dp_shard=2))
    run_ranks(2, train, tmp_path / "two", replace(sharded, max_steps=2, eval_every=None))
    run_ranks(2, train, tmp_path / "two", run_on(path, cache, "dpo", mesh=MeshSpec(tp=2)))
    one, two = (numbers(tmp_path / name) for name in ("one", "two"))
    assert len(one[-1]) == 8
    for found, expected in zip(two, one, strict=True):
        assert found == pytest.approx(expected, rel=1e-10)  # of margins: differences of sums


# The magnitudes of DoRA start as lengths in fp32.
@pytest.mark.parametrize(
    ("adapter", "limit"), [(LoRA(rank=2), 1e-12), (DORA, 1e-8), (IA3(), 1e-12)]
)
def test_the_first_loss_of_dpo_is_log_2(
    path: Path, tmp_path: Path, cache: Path, adapter: Any, limit: float
) -> None:
    settings = {"max_steps": 1, "eval_every": None, "save_every": None}
    run_ranks(1, train, tmp_path, run_on(path, cache, "dpo", adapter=adapter, **settings))
    assert numbers(tmp_path)[0]["loss"] == pytest.approx(math.log(2), rel=limit)


def test_transformers_gives_the_rewards_of_a_saved_model(
    path: Path, tmp_path: Path, cache: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    run = run_on(path, cache, "reward", save_every=3)
    run_ranks(1, train, tmp_path, run)
    folder = tmp_path / "checkpoints" / "step_00000003" / "model"
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    assert (model.config.num_labels, model.config.id2label) == (1, {0: "reward"})
    assert model.config.problem_type == "regression"
    _, loader = run.data.build(tokenizer=BYTES, seed=0, rank=0, num_ranks=1)
    margins = []
    for _, batch in loader.batches():
        for ids, segments in zip(batch.input_ids, batch.segment_ids, strict=True):
            texts = [ids[segments == n] for n in range(1, int(segments.max()) + 1)]
            ends = [torch.full((n,), BYTES.eos_token_id) for n in (3, 0, 1)]  # read past them
            rows = [torch.cat((text, ends[n % 3]))[None] for n, text in enumerate(texts)]
            with torch.no_grad():
                rewards = [model(input_ids=row).logits.item() for row in rows]
            margins += [c - r for c, r in zip(rewards[::2], rewards[1::2], strict=True)]
    last = numbers(tmp_path)[-1]
    assert last["num_targets"] == len(margins) > 4
    # transformers computes the rotary tables in fp32.
    assert last["margin"] == pytest.approx(np.mean(margins), rel=1e-5)
    assert last["accuracy"] == np.mean(np.array(margins) > 0)
    expected = np.mean([math.log1p(math.exp(-margin)) for margin in margins])
    assert last["loss"] == pytest.approx(expected, rel=1e-6)


def texts_of(row: dict[str, Any], own: Any, **settings: Any) -> tuple[str, str, str]:
    """Return the prompt, and what follows it in either text."""
    example = PreferenceEncoder(**settings).encode(row, own)
    assert example.classes is not None
    prompt, middle = example.classes.tolist()
    chosen, rejected = np.split(example.input_ids, [middle])
    assert (chosen[:prompt] == rejected[:prompt]).all()
    parts = (chosen[:prompt], chosen[prompt:], rejected[prompt:])
    first, second, third = (own.decode(part.tolist()) for part in parts)
    return first, second, third


def test_every_form_of_a_row_is_a_prompt_and_two_answers(tmp_path: Path) -> None:
    assert texts_of({"prompt": "1+1=", "chosen": "2", "rejected": "three"}, BYTES) == (
        "1+1=",
        "2",
        "three",
    )
    whole = {"chosen": "Q: a? A: yes", "rejected": "Q: a? A: no"}
    assert texts_of(whole, BYTES)[0].endswith("Q: a? A: ")
    chat = tokenizer(tmp_path, CHATML)
    asked, yes, no = (
        {"role": role, "content": text}
        for role, text in (("user", "Well?"), ("assistant", "Yes."), ("assistant", "No."))
    )
    forms = (
        {"prompt": [asked], "chosen": [yes], "rejected": [no]},
        {"prompt": [asked], "chosen": [asked, yes], "rejected": [asked, no]},
        {"chosen": [asked, yes], "rejected": [asked, no]},
        {"prompt": "Well?", "chosen": [asked, yes], "rejected": [asked, no]},
        {"prompt": "Well?", "chosen": [yes], "rejected": [no]},
    )
    found = {texts_of(form, chat) for form in forms}
    ((prompt, chosen, rejected),) = found
    assert prompt.endswith("assistant\n")
    assert (chosen.rstrip(), rejected.rstrip()) == ("Yes.", "No.")


def test_long_texts_are_cut_each_and_counted() -> None:
    row = {"prompt": "ab", "chosen": "cdefgh", "rejected": "ij"}
    example = PreferenceEncoder(max_tokens=5).encode(row, BYTES)
    assert texts_of(row, BYTES, max_tokens=5)[1:] == ("cd", texts_of(row, BYTES)[2])
    assert [note.kind for note in example.notes] == ["pairs cut to data.encoder.max_tokens"]
    with pytest.raises(BadRowError, match=r"prompt has 3 tokens.*max_tokens=3\); raise that"):
        PreferenceEncoder(max_tokens=3).encode(row, BYTES)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same, so none is preferred"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "column rejected holds nothing, needed"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "column rejected holds int, needed"),
        (
            {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user"}]},
            "are no two answers to one prompt",
        ),
    ],
)
def test_rows_that_are_no_pairs_are_bad(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRowError, match=message):
        PreferenceEncoder().encode(row, BYTES)


def test_settings_and_data_that_cannot_serve_are_refused(path: Path, cache: Path) -> None:
    run = run_on(path, cache, "dpo")
    run.check(1)
    for changes, message in (
        ({"adapter": LoRA(rank=2, modules_to_save=("norm",))}, r"model.norm.weight would train"),
        ({"adapter": tiny_run(cache).adapter}, "would train in the base; set adapter=lora"),
        ({"task": RewardTask()}, "end where it reads them; set data.encoder.learns=reward"),
        ({"task": CausalLMTask()}, "data has pairs of texts; set task=dpo or task=reward"),
        ({"task": SequenceClassificationTask()}, "has pairs of texts; set .* task=reward"),
        ({"data": replace(run.data, too_long="cut")}, "set data.encoder.max_tokens, of each"),
        ({"data": replace(run.data, encoder=PreferenceEncoder(chosen="better"))}, "no column 'be"),
        ({"data": tiny_run(cache).data}, "task=dpo needs pairs of texts.*set data=preferences"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(run, **changes).check(1)
    for axis in ("cp", "pp"):
        with pytest.raises(ValueError, match=f"mesh.{axis}=2 cuts up texts or the model"):
            replace(run, mesh=MeshSpec(**{axis: 2})).check(2)
    for settings, message in (
        ({"beta": 0.0}, "beta=0.0 is not positive"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 is no share below 0.5"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 is not positive"),
    ):
        with pytest.raises(ValueError, match=message):
            DPOTask(**settings)
    long = data(path, row_tokens=16)
    with pytest.raises(DataError, match=r"or set data.encoder.max_tokens: how many tokens"):
        long.build(tokenizer=BYTES, seed=0, rank=0, num_ranks=1)


def test_pairs_stay_in_one_row_and_inspect_names_both_texts(path: Path) -> None:
    spec = data(path)
    loader, _ = spec.build(tokenizer=BYTES, seed=0, rank=0, num_ranks=1)
    step = loader.step(0).micro_batches
    found = count(step, spec.labels, BYTES)
    assert found.num_targets == 8
    assert len(found.documents) == 16
    pairs = list(zip(found.documents[::2], found.documents[1::2], strict=True))
    for chosen, rejected in pairs:
        assert (chosen.answers, rejected.answers) == (("chosen",), ("rejected",))
        assert chosen.provenance == rejected.provenance
    assert len({chosen.provenance for chosen, _ in pairs}) == 8
