"""Folders of prompt tuning: peft reads ours, we read peft's; resuming, generating, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.parity.oracle import specs
from launch.cli import main
from models.nn.head import IGNORED
from models.nn.prompt import prompt_rows
from tests.adapters import adapter_in, check_resume, peft_package, write_adapter
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from tests.trainer.test_adapter_files import IDS, changed_base, same, started
from tests.trainer.test_model_path import saved
from tests.trainer.test_prompt_tuning import (
    BYTES,
    COUNT,
    CPU,
    PAIRS,
    PROMPT,
    TEXTS,
    VIRTUAL,
    batches,
    documents,
)
from trainer.adapters.files import CONFIG, WEIGHTS
from trainer.adapters.merged import load_merged
from trainer.adapters.pretrained import PretrainedAdapter
from trainer.callbacks.closing import Closing
from trainer.callbacks.ngrams import NgramBaselines
from trainer.data.classification import SequenceEncoder
from trainer.data.tagging import TokenEncoder
from trainer.files import read_json, write_json
from trainer.hf_auto import HFAutoModel
from trainer.mesh import MeshSpec
from trainer.optim import AdamW
from trainer.parallel.materialise import materialise, random_values
from trainer.pretrained import PretrainedModel, save_pretrained
from trainer.run import Run
from trainer.tasks.classification import SequenceClassificationTask, TokenClassificationTask
from trainer.verify.forked import RankFailedError

ASKED = torch.tensor([[*VIRTUAL, *IDS[0].tolist()]])
INPUTS = (ASKED, torch.arange(ASKED.shape[1])[None], torch.ones_like(ASKED))


def run_over(base: Path, folder: Path, adapter: Any = PROMPT, **changes: Any) -> Run:
    settings: dict[str, Any] = {
        "weights": "auto", "tokenizer": "auto", "max_steps": 3, "adapter": adapter,
        "optim": AdamW(lr=0.1),
    }  # fmt: skip
    if "model" not in changes:
        settings["model"] = PretrainedModel(path=str(base), attn_implementation="eager")
    data = documents(folder / "data", [*TEXTS, *PAIRS], global_documents=4)
    return replace(tiny_run(folder, **settings | changes), data=data)


def peft_model(base: Path, adapter: Path, kind: str = "CausalLM", **settings: Any) -> Any:
    """Return the model of the two folders, as transformers and peft read them."""
    import transformers

    auto = getattr(transformers, f"AutoModelFor{kind}")
    model = auto.from_pretrained(base, attn_implementation="eager", **settings)
    with peft_package() as peft:
        return peft.PeftModel.from_pretrained(model, adapter).eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("saved_modules", [(), ("norm",)])
def test_what_we_train_and_save_computes_the_same_in_peft(
    saved_modules: tuple[str, ...], tmp_path: Path, model_folder: Path
) -> None:
    run = run_over(model_folder, tmp_path, replace(PROMPT, modules_to_save=saved_modules))
    run_ranks(1, train, tmp_path / "run", run)
    adapter = adapter_in(tmp_path / "run")
    found = load_merged(adapter, dtype=torch.float32, device=CPU)(*INPUTS)
    assert same(found, logits_of(peft_model(model_folder, adapter)))
    tensors = load_file(adapter / WEIGHTS)
    assert tensors["prompt_embeddings"].shape == (COUNT, 16)
    assert len(tensors) == 1 + len(saved_modules)
    start = started(run)(*INPUTS)
    assert not same(found, start, 1e-2)
    go_on = started(run_over(model_folder, tmp_path, PretrainedAdapter(path=str(adapter))))
    assert same(go_on(*INPUTS), found)


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_a_classifiers_head_comes_with_the_virtual_tokens_to_peft(
    kind: str, tmp_path: Path, model_folder: Path
) -> None:
    run = run_over(model_folder, tmp_path)
    if kind == "SequenceClassification":
        rows = [{"text": "ab" * (n % 4 + 1), "label": "xyz"[n % 3]} for n in range(24)]
        run = replace(run, task=SequenceClassificationTask())
        encoder: Any = SequenceEncoder()
    else:
        rows = [{"tokens": ["ab", "c"], "tags": ["xyz"[n % 3], "x"]} for n in range(24)]
        run = replace(run, task=TokenClassificationTask())
        encoder = TokenEncoder()
    data = documents(tmp_path / "labelled", rows, encoder=encoder, global_documents=8)
    run = replace(run, data=data)
    run_ranks(1, train, tmp_path / "run", run)
    adapter = adapter_in(tmp_path / "run")
    go_on = started(replace(run, adapter=PretrainedAdapter(path=str(adapter))))
    found = go_on(*INPUTS)
    theirs = logits_of(peft_model(model_folder, adapter, kind, num_labels=3))
    assert same(found[:, 0] if kind == "SequenceClassification" else found, theirs)
    assert not same(theirs, torch.zeros_like(theirs) + theirs.mean())


def save_family(folder: Path, name: str) -> None:
    """Save a random model of one of our families, with its tokenizer."""
    spec: Any = replace(specs()[name], vocab_size=258)
    with torch.device("meta"):
        model = spec.build_causal_lm(chunk_tokens=64)
    materialise(model, CPU, random_values(model, 0.1, seed=0))
    save_pretrained(folder, model, spec.hf_config())
    BYTES.save(folder)


@pytest.mark.parametrize("name", ["Gemma", "GPT-BigCode (MQA)", "qwen2"])
def test_other_families_compute_the_same_in_peft(name: str, tmp_path: Path) -> None:
    """Of Gemma the embedding is scaled; GPT-BigCode has learnt positions; Qwen2 is no family."""
    base = tmp_path / "base"
    if name == "qwen2":
        saved(base, name)
        model: Any = HFAutoModel(path=str(base), attn_implementation="eager")
    else:
        save_family(base, name)
        model = PretrainedModel(path=str(base), attn_implementation="eager")
    run = run_over(base, tmp_path, model=model)
    run_ranks(1, train, tmp_path / "run", run)
    adapter = adapter_in(tmp_path / "run")
    found = started(replace(run, adapter=PretrainedAdapter(path=str(adapter))))(*INPUTS)
    assert same(found, logits_of(peft_model(base, adapter)))
    assert not same(found, started(run)(*INPUTS), 1e-2)


def pefts_own(base: Path, folder: Path, **settings: Any) -> Any:
    """Save an adapter that peft made; return the model."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with peft_package() as peft:
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=COUNT, **settings
        )
        made = peft.get_peft_model(model, config).eval()
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape)
        made.save_pretrained(folder)
    return made


@pytest.mark.parametrize(
    "settings", [{"prompt_tuning_init": "SAMPLE_VOCAB"}, {"modules_to_save": ["norm"]}], ids=str
)
def test_an_adapter_of_pefts_is_where_a_run_starts(
    settings: dict[str, Any], tmp_path: Path, model_folder: Path
) -> None:
    theirs = pefts_own(model_folder, tmp_path / "theirs", **settings)
    expected = logits_of(theirs)
    run = run_over(model_folder, tmp_path, PretrainedAdapter(path=str(tmp_path / "theirs")))
    run.check(1)
    assert same(started(run)(*INPUTS), expected)
    merged = load_merged(tmp_path / "theirs", dtype=torch.float32, device=CPU)
    assert same(merged(*INPUTS), expected)
    # And what goes on from there is peft's again.
    run_ranks(1, train, tmp_path / "run", run)
    again = adapter_in(tmp_path / "run")
    assert read_json(again / CONFIG)["num_virtual_tokens"] == COUNT
    found = load_merged(again, dtype=torch.float32, device=CPU)(*INPUTS)
    assert same(found, logits_of(peft_model(model_folder, again)))
    assert not same(found, expected, 1e-2)


def test_the_loss_is_pefts(tmp_path: Path, model_folder: Path) -> None:
    """Of texts every token is learnt, the first one too; of pairs the completion and EOS."""
    theirs = pefts_own(model_folder, tmp_path / "theirs")
    run = run_over(model_folder, tmp_path, PretrainedAdapter(path=str(tmp_path / "theirs")))
    total, count = 0.0, 0
    bos, eos = [BYTES.bos_token_id], [BYTES.eos_token_id]
    for row in (*TEXTS, *PAIRS):
        unread = list(row.get("prompt", "").encode())
        learnt = [*row.get("text", row.get("completion", "")).encode(), *eos]
        ids = torch.tensor([[*bos, *unread, *learnt]])
        is_text = "text" in row
        labels = torch.tensor(
            [[*(bos if is_text else [IGNORED]), *[IGNORED] * len(unread), *learnt]]
        )
        number = int((labels != IGNORED).sum())
        with torch.no_grad():
            total += float(theirs(input_ids=ids, labels=labels).loss) * number
        count += number
    model: Any = started(run)
    data = replace(run.data, global_documents=len(TEXTS) + len(PAIRS))
    found = [
        model(b.input_ids, b.position_ids, b.segment_ids, b.labels, torch.ones(()))
        for b in batches(data)  # type: ignore[arg-type]
    ]
    assert sum(int(loss.num_targets) for loss in found) == count
    assert sum(float(loss.sum) for loss in found) == pytest.approx(total, rel=1e-5)


def test_resumed_run_equals_uninterrupted_run_also_on_other_ranks(
    tmp_path: Path, model_folder: Path
) -> None:
    run = run_over(model_folder, tmp_path)
    check_resume(tmp_path, run, replace(run, mesh=MeshSpec(dp_shard=2)))
    assert load_file(adapter_in(tmp_path / "whole", 6) / WEIGHTS).keys() == {"prompt_embeddings"}


def test_a_run_samples_with_them_and_counts_no_pairs_of_tokens(
    tmp_path: Path, model_folder: Path
) -> None:
    closing = {"closing": Closing(prompt="ab", sample_tokens=3)}
    run_ranks(1, train, tmp_path / "run", run_over(model_folder, tmp_path, callbacks=closing))
    ngrams = run_over(model_folder, tmp_path, callbacks={"ngrams": NgramBaselines()})
    with pytest.raises(
        ValueError, match=r"virtual tokens stand before .* set callbacks\.ngrams=null"
    ):
        ngrams.check(1)


def test_generate_puts_the_virtual_tokens_in_front_as_peft_does(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, train, tmp_path / "run", run_over(model_folder, tmp_path))
    found = []
    for cache in ("growing", "none"):
        words = ["prompt=abc", "max_new_tokens=8", "json=true", f"cache={cache}"]
        assert main(["generate", f"checkpoint={tmp_path / 'run'}", *words]) == 0
        found.append(json.loads(capsys.readouterr().out))
    theirs = peft_model(model_folder, adapter_in(tmp_path / "run"))
    ids = [256, *b"abc"]
    with torch.no_grad():
        while len(ids) < 12 and ids[-1] != 257:
            ids.append(int(theirs(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = [token for token in ids[4:] if token != 257]
    assert [one["ids"] for one in found] == [expected] * 2
    assert found[0]["prompt"] == "abc"


def test_virtual_tokens_are_not_merged_by_export(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_adapter(tmp_path / "a", run_over(model_folder, tmp_path))
    config = read_json(folder / CONFIG)
    write_json(folder / CONFIG, config | {"base_model_name_or_path": str(model_folder)})
    assert main(["export", f"checkpoint={folder}", f"output={tmp_path / 'out'}"]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be merged; open it as it is: PeftModel.from_pretrained" in line
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(tmp_path: Path, model_folder: Path) -> None:
    run_ranks(1, train, tmp_path / "run", run_over(model_folder, tmp_path))
    adapter = adapter_in(tmp_path / "run")
    other = changed_base(model_folder, tmp_path / "other")
    again = run_over(other, tmp_path, PretrainedAdapter(path=str(adapter)))
    with pytest.raises(RankFailedError, match="adapter was trained on a base of hash"):
        run_ranks(1, train, tmp_path / "again", again)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"])
def test_other_kinds_of_prompts_are_refused(kind: str, tmp_path: Path, model_folder: Path) -> None:
    folder = write_adapter(tmp_path / "a", run_over(model_folder, tmp_path))
    write_json(folder / CONFIG, read_json(folder / CONFIG) | {"peft_type": kind})
    with pytest.raises(ValueError, match=f"peft_type='{kind}'; give a LORA, IA3 or PROMPT_TUNING"):
        PretrainedAdapter(path=str(folder))


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, model_folder: Path) -> None:
    run = run_over(model_folder, tmp_path)
    folder = write_adapter(tmp_path / "a", run)
    with pytest.raises(ValueError, match="have no effect on PROMPT_TUNING; take them out"):
        PretrainedAdapter(path=str(folder), dropout=0.1)
    (name,) = prompt_rows(run.trained_model())
    wide = {"prompt_embeddings": torch.zeros(COUNT, 32)}
    save_file(wide, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} has shape \[3, 32\], the model needs \[3, 16\]"):
        run_over(model_folder, tmp_path, PretrainedAdapter(path=str(folder))).check(1)
    write_json(folder / CONFIG, read_json(folder / CONFIG) | {"num_virtual_tokens": 5})
    with pytest.raises(ValueError, match=r"num_virtual_tokens=5, and adapter_model.* has 3; give"):
        PretrainedAdapter(path=str(folder))
