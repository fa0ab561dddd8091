"""What is saved is a Hugging Face model: transformers opens it and finds our loss."""

import json
from pathlib import Path

import torch
from torch.nn import functional as F

from tests.conftest import tiny_spec
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.checkpoint.commit import step_folder
from trainer.mesh import MeshSpec
from trainer.optim import SGD
from trainer.record import read_lines


def test_the_initial_model_in_transformers_gives_the_first_logged_loss(
    tmp_path: Path, cache: Path
) -> None:
    from transformers import AutoModelForCausalLM

    # A vanishing learning rate: what is saved after step 1 is the model of step 0, bit for bit.
    run = tiny_run(cache, max_steps=1, optim=SGD(lr=1e-30))
    run_ranks(2, train, tmp_path / "run", tiny_run(
        cache, max_steps=1, optim=SGD(lr=1e-30), mesh=MeshSpec(dp_shard=2),
    ))  # fmt: skip
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    model, info = AutoModelForCausalLM.from_pretrained(
        step_folder(tmp_path / "run" / "checkpoints", 1) / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = run.data.tokenizer("byte", 258)
    loader, _ = run.data.build(tokenizer=tokenizer, seed=0, rank=0, num_ranks=1)
    loss_sum, num_targets = 0.0, 0
    for batch in loader.step(0).micro_batches:
        with torch.no_grad():
            logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        loss_sum += F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), reduction="sum"
        ).item()
        num_targets += int((batch.labels != -100).sum())
    assert num_targets == line["num_targets"]
    assert abs(loss_sum / num_targets - line["loss"]) / line["loss"] < 1e-5


def test_the_model_folder_is_complete(tmp_path: Path, cache: Path) -> None:
    run_ranks(1, train, tmp_path, tiny_run(cache, max_steps=1))
    folder = step_folder(tmp_path / "checkpoints", 1) / "model"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)
    assert config["dtype"] == "float32"


def test_a_large_model_is_split_as_hugging_face_splits_it(tmp_path: Path, cache: Path) -> None:
    from transformers import AutoModelForCausalLM

    from trainer.checkpoint.spec import CheckpointSpec

    spec = CheckpointSpec(max_file_gb=6e-6)  # 6 kB a file
    run = tiny_run(cache, max_steps=1, checkpoint=spec, model=tiny_spec(tie_word_embeddings=False))
    run_ranks(2, train, tmp_path, run)
    folder = step_folder(tmp_path / "checkpoints", 1) / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    again = tiny_run(
        cache, max_steps=1, weights=str(folder), optim=SGD(lr=1e-30), name="again",
        model=tiny_spec(tie_word_embeddings=False),
    )  # fmt: skip
    run_ranks(1, train, tmp_path / "again", again)
    saved = step_folder(tmp_path / "again" / "checkpoints", 1) / "model"
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
