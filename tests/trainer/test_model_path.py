"""Training from a Hugging Face folder: a known family, and any other model of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.checkpoint.commit import step_folder
from trainer.hf_auto import HFAutoModel, HFCausalLM
from trainer.mesh import MeshSpec
from trainer.optim import SGD
from trainer.pretrained import PretrainedModel
from trainer.record import read_lines
from trainer.run import Run

TINY: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def saved(folder: Path, model_type: str, **changes: Any) -> Any:
    """Save a random model of transformers with a byte tokenizer, and return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.data.tokenizers import ByteTokenizer

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TINY | changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    ByteTokenizer().save(folder)
    return model.eval()


def first_loss(run: Run, model: Any) -> float:
    """Return the mean loss of step 0 by transformers, one document at a time: no packing."""
    tokenizer = run.data.tokenizer(run.tokenizer_setting, 258)
    loader, _ = run.data.build(tokenizer=tokenizer, seed=0, rank=0, num_ranks=1)
    total, count = 0.0, 0
    for batch in loader.step(0).micro_batches:
        for row in range(batch.num_rows):
            for segment in batch.segment_ids[row].unique().tolist():
                at = batch.segment_ids[row] == segment
                ids = batch.input_ids[row][at][None]
                positions = batch.position_ids[row][at][None]
                with torch.no_grad():
                    logits = model(ids, position_ids=positions, use_cache=False).logits[0]
                labels = batch.labels[row][at]
                total += F.cross_entropy(logits, labels, reduction="sum").item()
                count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "mistral", "gemma3_text"])
def test_any_other_model_trains_packed_as_transformers_computes_it_document_by_document(
    tmp_path: Path, cache: Path, model_type: str, world_size: int
) -> None:
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = saved(tmp_path / "model", model_type, **dropouts if model_type == "gpt2" else {})
    spec = HFAutoModel(path=str(tmp_path / "model"))
    mesh = MeshSpec(dp_shard=world_size)
    run = tiny_run(
        cache, model=spec, mesh=mesh, weights="auto", tokenizer="auto", max_steps=1,
        optim=SGD(lr=1e-30), name="run",
    )  # fmt: skip
    run_ranks(world_size, train, tmp_path / "run", run)
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["loss"] == pytest.approx(first_loss(run, model), rel=1e-5)
    from transformers import AutoModelForCausalLM

    folder = step_folder(tmp_path / "run" / "checkpoints", 1) / "model"
    again, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_loss_of_each_target_is_kept(tmp_path: Path) -> None:
    model = saved(tmp_path, "qwen2")
    ids = torch.randint(0, 258, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    places = torch.arange(9).expand(2, 9)
    loss: Any = HFCausalLM(model, 4)(ids, places, torch.ones_like(ids), labels, torch.ones(()))
    logits = model(ids).logits.transpose(1, 2)
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none").detach()
    torch.testing.assert_close(loss.each, expected, rtol=1e-5, atol=1e-6)
    assert float(loss.sum) == pytest.approx(float(expected.sum()), rel=1e-6)


def test_a_model_that_mixes_packed_documents_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "mamba", state_size=4, expand=2, time_step_rank=2)
    spec = HFAutoModel(path=str(tmp_path), attn_implementation="eager")
    with pytest.raises(ValueError, match="packed documents see each other"):
        spec.build_causal_lm(chunk_tokens=8)


def test_a_known_family_trains_from_its_folder_and_keeps_the_folders_other_keys(
    tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run = tiny_run(
        cache, model=PretrainedModel(path=str(model_folder)), weights="auto", tokenizer="auto",
        max_steps=1, optim=SGD(lr=1e-30),
    )  # fmt: skip
    run_ranks(1, train, tmp_path, run)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    assert line["loss"] == pytest.approx(first_loss(run, model), rel=1e-5)
    saved_to = step_folder(tmp_path / "checkpoints", 1) / "model"
    assert json.loads((saved_to / "config.json").read_text())["pad_token_id"] == 257


def test_a_folder_without_a_config_is_refused_before_anything_else(tmp_path: Path) -> None:
    for spec in (PretrainedModel, HFAutoModel):
        with pytest.raises(ValueError, match=r"has no config\.json"):
            spec(path=str(tmp_path))


def test_a_back_end_that_cannot_separate_documents_is_refused(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="none of eager, sdpa"):
        HFAutoModel(path=str(model_folder), attn_implementation="flash")


def test_a_model_of_more_than_text_is_refused_in_one_line(tmp_path: Path) -> None:
    given = {"model_type": "gemma3", "text_config": {**TINY, "model_type": "gemma3_text"}}
    (tmp_path / "config.json").write_text(json.dumps(given))
    for name in ("vocab_size", "attention_width", "trunk_name"):
        with pytest.raises(ValueError, match=r"'gemma3' has no vocab_size of its own, .*; give"):
            getattr(HFAutoModel(path=str(tmp_path)), name)


def test_a_head_by_another_name_is_refused_before_the_start(tmp_path: Path, cache: Path) -> None:
    saved(tmp_path, "biogpt")
    run = tiny_run(cache, model=HFAutoModel(path=str(tmp_path)), tokenizer="auto", weights="auto")
    with pytest.raises(ValueError, match=r"'biogpt' has no lm_head.weight: .*; train another"):
        run.check(1)
