"""Checkpoints of what trains alone: new rows, or parts of a model; resumed, merged, refused."""

import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from launch.cli import main
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.runs import DieAt, tiny_run, train, train_words
from tests.trainer.test_adapter_files import KINDS, changed_base, run_over
from tests.trainer.test_model_path import saved
from trainer.adapters.merged import load_merged, merged_spec
from trainer.adapters.protocol import NoAdapter
from trainer.checkpoint.commit import committed_steps, step_folder
from trainer.checkpoint.spec import CheckpointSpec
from trainer.construct import build_engine
from trainer.data.tokenizers import FileTokenizer
from trainer.distributed import Placement, Ranks
from trainer.files import read_json
from trainer.freeze import FreezeSpec
from trainer.hf_auto import HFAutoModel
from trainer.mesh import MeshSpec
from trainer.new_tokens import ROWS
from trainer.optim import AdamW
from trainer.pretrained import PretrainedModel, save_pretrained
from trainer.record import read_lines
from trainer.run import Run
from trainer.verify.forked import RankFailedError

CPU = torch.device("cpu")
TOKENS = ("self", "return")  # words of the data, each one token from now on
NEW, ADAPTER = FreezeSpec(new_tokens=True), NoAdapter()
PARTS = FreezeSpec(frozen=("model.embed_tokens.*", "model.layers.0.*"))
ROW = "model.embed_tokens.additional_embedding.weight"
STRONG = AdamW(lr=0.1)


def run_new(base: Path, cache: Path, adapter: Any = ADAPTER, **changes: Any) -> Run:
    if "model" not in changes:
        changes["model"] = PretrainedModel(path=str(base), additional_tokens=TOKENS)
    settings = {
        "freeze": NEW if adapter == ADAPTER else FreezeSpec(),
        "weights": "auto", "tokenizer": "auto", "max_steps": 3,
        "data_max_documents": 20,
    }  # fmt: skip
    return tiny_run(cache, adapter=adapter, **settings | changes)


def trained_in(folder: Path, step: int = 3) -> Path:
    return step_folder(folder / "checkpoints", step) / "trained"


def weights_of(placement: Placement, run: Run) -> dict[str, list[Any]]:
    """Return what the run's model starts from."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    mesh = run.mesh.build(ranks=ranks)
    engine = build_engine(run, run.trained_model(), ranks, mesh)
    found = {name: piece.local.tolist() for name, piece in engine.weights().items()}
    ranks.close()
    return found


def start_of(run: Run) -> dict[str, Tensor]:
    run.check(1)
    return {name: torch.tensor(x) for name, x in run_ranks(1, weights_of, run)[0].items()}


def test_new_rows_start_at_the_mean_of_the_others(cache: Path, model_folder: Path) -> None:
    start = start_of(run_new(model_folder, cache))
    base = load_file(model_folder / "model.safetensors")
    mean = base["model.embed_tokens.weight"].double().mean(0)
    torch.testing.assert_close(start[ROW].double(), mean.expand(2, -1), rtol=0, atol=1e-7)
    assert all(torch.equal(start[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize("kind", ["new rows", "parts"])
def test_a_checkpoint_holds_what_trains_and_resumes_on_other_ranks(
    kind: str, tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    changes: dict[str, Any] = {"max_steps": 6, "save_every": 3, "optim": STRONG}
    alone = CheckpointSpec(contents="trained", background=False)
    run = (
        run_new(model_folder, cache, **changes)
        if kind == "new rows"
        else run_over(
            model_folder,
            cache,
            ADAPTER,
            freeze=PARTS,
            checkpoint=alone,
            data_max_documents=20,
            **changes,
        )
    )
    run_ranks(1, train, tmp_path / "whole", run)
    with pytest.raises(RankFailedError):
        run_ranks(1, train, tmp_path / "cut", replace(run, callbacks={"die": DieAt(4)}))
    assert committed_steps(tmp_path / "cut" / "checkpoints") == [3]
    run_ranks(2, train, tmp_path / "cut", replace(run, mesh=MeshSpec(dp_replicate=2)))
    losses = [
        [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    trained = {n for n, p in run.trained_model().named_parameters() if p.requires_grad}
    assert (kind == "new rows") == (trained == {ROW})
    found, expected = (load_file(trained_in(tmp_path / n, 6) / "trained.safetensors")
                       for n in ("cut", "whole"))  # fmt: skip
    assert found.keys() == trained
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
    state = load_file(trained_in(tmp_path / "cut", 6).parent / "state" / "optimizer.safetensors")
    assert {name.partition("/")[2] for name in state} == trained
    assert read_json(trained_in(tmp_path / "cut", 6) / "base.json")["weights"] == str(model_folder)


def test_another_base_is_refused_wherever_the_trained_weights_meet_it(
    tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    run = run_new(base, cache, save_every=1, max_steps=2)
    run_ranks(1, train, tmp_path / "run", run)
    other = changed_base(base, tmp_path / "other")
    shutil.copy(other / "model.safetensors", base)
    with pytest.raises(RankFailedError, match=r"was trained on the base .*; this one has"):
        run_ranks(1, train, tmp_path / "run", replace(run, max_steps=3))
    trained = trained_in(tmp_path / "run", 2)
    with pytest.raises(RankFailedError, match="was trained on a base of hash"):
        run_ranks(1, train, tmp_path / "again", replace(run, weights=str(trained)))
    with pytest.raises(ValueError, match="was trained on a base of hash"):
        load_merged(trained, dtype=torch.float32, device=CPU)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=r"is no folder here; write there where the base is"):
        load_merged(trained, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(("tied", "adapter"), [(True, "none"), (False, "none"), (True, "dora")])
def test_merged_rows_open_in_transformers_and_are_split_again(
    tied: bool, adapter: str, tmp_path: Path, cache: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, merged, apart = (tmp_path / name for name in ("base", "merged", "apart"))
    saved(base, "llama", tie_word_embeddings=tied)
    run = run_new(base, cache, KINDS.get(adapter, ADAPTER), optim=STRONG)
    run_ranks(1, train, tmp_path / "run", run)
    step = step_folder(tmp_path / "run" / "checkpoints", 3)
    folder = step / ("trained" if adapter == "none" else "adapter")
    model = load_merged(folder, dtype=torch.float32, device=CPU)
    save_pretrained(merged, model, merged_spec(folder).hf_config())
    FileTokenizer(folder).save(merged)
    ids = torch.tensor([AutoTokenizer.from_pretrained(merged)("def f(self): return 1").input_ids])
    assert {258, 259} <= set(ids[0].tolist())
    theirs = AutoModelForCausalLM.from_pretrained(merged)
    places = torch.arange(ids.shape[1])[None]
    found = model(ids, places, torch.ones_like(ids))
    torch.testing.assert_close(theirs(ids).logits, found, rtol=0, atol=1e-5)
    if adapter != "none":
        return  # merged into the base: no split brings them back
    old = load_file(base / "model.safetensors")
    front = model.get_parameter("model.embed_tokens.weight")
    assert torch.equal(front[:258], old["model.embed_tokens.weight"])
    rows_apart = load_merged(folder, dtype=torch.float32, device=CPU, has_rows_apart=True)
    save_pretrained(apart, rows_apart, rows_apart_spec(base).hf_config())
    trained = load_file(folder / "trained.safetensors")
    assert len(trained) == (1 if tied else 2)
    for weights in (merged, apart, folder):
        start = start_of(replace(run, weights=str(weights)))
        for name, tensor in (old | trained).items():
            assert torch.equal(start[name], tensor), (weights, name)


def rows_apart_spec(base: Path) -> Any:
    return PretrainedModel(path=str(base)).spec


def test_an_adapter_goes_on_with_its_new_rows(
    tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    from trainer.adapters.pretrained import PretrainedAdapter

    run = run_new(model_folder, cache, KINDS["lora"], optim=STRONG)
    run_ranks(1, train, tmp_path, run)
    folder = step_folder(tmp_path / "checkpoints", 3) / "adapter"
    again = replace(run, adapter=PretrainedAdapter(path=str(folder)))
    start = start_of(again)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(start[name.removeprefix("base_model.model.")], tensor)
    model: nn.Module = again.trained_model()
    assert model.get_parameter(ROW).requires_grad


def test_a_model_read_through_transformers_takes_new_tokens(tmp_path: Path, cache: Path) -> None:
    saved(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    model = HFAutoModel(path=str(tmp_path / "base"), additional_tokens=TOKENS)
    run = run_new(tmp_path / "base", cache, model=model, optim=STRONG)
    run_ranks(1, train, tmp_path / "run", run)
    trained = load_file(trained_in(tmp_path / "run") / "trained.safetensors")
    assert trained.keys() == {ROW}
    assert not torch.equal(trained[ROW], start_of(run)[ROW])


def printed(_: Placement, words: list[str]) -> str:
    """Return what a command prints; in a process of its own, which may start threads."""
    with redirect_stdout(io.StringIO()) as text:
        assert main(words) == 0
    return text.getvalue()


def test_commands_read_a_run_whose_checkpoints_have_no_base(
    tmp_path: Path, cache: Path, model_folder: Path
) -> None:
    words = [
        "experiment=pretrain_text", "data.path=stdlib", f"model.path={model_folder}",
        "model=pretrained", "model.additional_tokens=[self,return]", "freeze=new_tokens",
        "precision=fp32", "data.row_tokens=32", "data.global_rows=8", f"data.cache={cache}",
        "data.max_documents=20", "optim.lr=0.1", "max_steps=2", "eval_every=2", "eval_share=null",
        "save_every=2",
    ]  # fmt: skip
    run_ranks(1, train_words, tmp_path / "run", words)
    (said,) = [
        line["loss"] for line in read_lines(tmp_path / "run/metrics.jsonl")
        if line["split"] == "eval" and line["step"] == 2
    ]  # fmt: skip
    run = tmp_path / "run"
    found = json.loads(run_ranks(1, printed, ["evaluate", f"checkpoint={run}", "json=true"])[0])
    assert found["loss"] == pytest.approx(said, rel=1e-6)
    prompt = ["generate", f"checkpoint={run}", "prompt=self", "max_new_tokens=4", "json=true"]
    assert json.loads(run_ranks(1, printed, prompt)[0])["ids"]


def test_nothing_but_additional_rows_trains(cache: Path, model_folder: Path) -> None:
    model = run_new(model_folder, cache).trained_model()
    assert all(n.endswith(ROWS) == p.requires_grad for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"freeze": FreezeSpec()}, "set freeze=new_tokens, adapter=lora"),
        ({"adapter": KINDS["lora"]}, "freeze.new_tokens=true has no effect on a model with adap"),
        ({"checkpoint": CheckpointSpec(contents="model")}, "that transformers cannot read"),
        ({"model": None}, "name the tokens: model.additional_tokens="),
        ({"model": None, "freeze": FreezeSpec(), "checkpoint": CheckpointSpec(contents="trained")},
         "everything trains; set it to model"),
        ({"freeze": FreezeSpec(), "adapter": KINDS["lora"],
          "checkpoint": CheckpointSpec(contents="trained")}, "has no effect with an adapter"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(
    changes: dict[str, Any], found: str, cache: Path, model_folder: Path
) -> None:
    run = run_new(model_folder, cache)
    if "model" in changes:
        changes = changes | {"model": replace(run.model, additional_tokens=())}
    with pytest.raises(ValueError, match=found):
        replace(run, **changes).check(1)
