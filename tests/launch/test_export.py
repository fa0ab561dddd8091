"""`tessera export`: what lies in the folder is what was trained, or there is no folder."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli import main
from tests.adapters import write_adapter
from tests.chat_templates import CHATML, SPECIALS, tokenizer_folder
from tests.conftest import tiny_spec
from tests.launch.test_evaluate import ROWS, evaluated
from tests.ranks import run_ranks
from tests.runs import tiny_run, train_words
from tests.trainer.test_adapter_files import INPUTS, KINDS, started
from tests.trainer.test_model_path import saved
from trainer.adapters.merged import load_merged
from trainer.adapters.pretrained import PretrainedAdapter
from trainer.export.export import export
from trainer.export.source import Source
from trainer.pretrained import PretrainedModel, save_pretrained
from trainer.record import read_lines

CPU = torch.device("cpu")
CHAT = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]}
    for n in range(12)
]
ANSWERS = [{"prompt": f"{n}?", "completion": "yes"} for n in range(12)]
TAGS = [{"tokens": row["text"].split(), "tags": ["O"] * len(row["text"].split())} for row in ROWS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    for row in TAGS[::3]:
        row["tags"][0] = "B-SKY"
    for name, rows in (("texts", ROWS), ("chat", CHAT), ("tags", TAGS), ("answers", ANSWERS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(folder: Path, name: str, *words: str, row_tokens: int = 64) -> Path:
    """Train four steps of a recipe on its rows; return the run."""
    common = (
        "data.eval_fraction=0.3", f"data.row_tokens={row_tokens}", "max_steps=4", "save_every=4",
        f"data.cache={folder}/cache", "eval_every=2", "data.global_documents=4", "optim.lr=1e-2",
    )  # fmt: skip
    run_ranks(1, train_words, folder / name, [*common, *words])
    return folder / name


@pytest.fixture(scope="module")
def chat_run(folder: Path) -> Path:
    """A conversation model whose turns end in a token that is not EOS."""
    base = folder / "chat_base"
    sizes = {"vocab_size": 258 + len(SPECIALS), "max_position_embeddings": 128}
    spec = tiny_spec(**sizes, tie_word_embeddings=False)
    torch.manual_seed(0)
    save_pretrained(base, spec.build_causal_lm(chunk_tokens=64), spec.hf_config())
    tokenizer_folder(base, chat_template=CHATML, eos_token="<|end_of_text|>")
    data = f"data.path={folder}/chat.jsonl"
    recipe = ("experiment=sft", f"model.path={base}", data)
    return trained(folder, "talker", *recipe, row_tokens=96)


@pytest.fixture(scope="module")
def classifier(folder: Path, model_folder: Path) -> Path:
    """LoRA on a classifier, in bf16 with a bf16 base."""
    return trained(
        folder, "mood", "experiment=sequence_classification", f"model.path={model_folder}",
        f"data.path={folder}/texts.jsonl", "adapter=lora", "adapter.rank=4", "precision=bf16",
    )  # fmt: skip


def exported(checkpoint: Path, output: Path, *words: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = main(["export", f"checkpoint={checkpoint}", f"output={output}", "json=true", *words])
    assert code == 0
    assert [path for path in output.parent.iterdir() if path.name.endswith(".tmp")] == []
    found: dict[str, Any] = json.loads(text.getvalue().splitlines()[-1])  # behind what is logged
    return found


def run_card(output: Path) -> str:
    """Run the card's lines of Python beside the folder, as a reader would; return their output."""
    card = (output / "README.md").read_text()
    (code,) = (part.partition("```")[0] for part in card.split("```python\n")[1:])
    with contextlib.chdir(output.parent), contextlib.redirect_stdout(io.StringIO()) as text:
        exec(code, {})
    return text.getvalue()


@pytest.mark.parametrize("how", ["freeze=new_tokens", "adapter=lora"])
def test_new_rows_are_merged_into_one_vocabulary(
    folder: Path, model_folder: Path, tmp_path: Path, how: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = how.partition("=")[2]
    run = trained(
        folder, f"rows_{name}", "experiment=sft", f"model.path={model_folder}", how,
        f"data.path={folder}/answers.jsonl", "model.additional_tokens=['<think>','yes']",
        "eval_every=null",
    )  # fmt: skip
    report = exported(run, tmp_path / name)
    assert all(check["largest"] < 1e-4 * check["scale"] for check in report["checks"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    rows = model.get_input_embeddings().weight
    size = base.config.vocab_size
    assert model.config.vocab_size == len(rows) == size + 2
    assert tokenizer("yes", add_special_tokens=False).input_ids == [size + 1]
    assert torch.equal(rows[:size], base.get_input_embeddings().weight)
    mean = base.get_input_embeddings().weight.mean(0)
    assert not torch.allclose(rows[size + 1], mean, atol=1e-3)  # it was trained


def test_new_rows_kept_apart_are_trained_on(
    folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    tokens = "model.additional_tokens=['<think>','yes']"
    recipe = ("experiment=sft", f"data.path={folder}/answers.jsonl", "freeze=new_tokens", tokens)
    run = trained(folder, "apart", f"model.path={model_folder}", *recipe, "eval_every=null")
    exported(run, tmp_path / "apart", "new_tokens=apart")
    written = load_file(tmp_path / "apart" / "model.safetensors")
    base = load_file(model_folder / "model.safetensors")
    (step,) = (run / "checkpoints").glob("step_*4")
    rows = load_file(step / "trained" / "trained.safetensors")
    assert written.keys() == base.keys() | rows.keys()
    assert all(torch.equal(written[name], rows[name]) for name in rows)
    more = f"model.path={tmp_path / 'apart'}"
    again = trained(folder, "again", more, *recipe, "eval_every=null", "optim.lr=1e-9")
    (step,) = (again / "checkpoints").glob("step_*4")
    after = load_file(step / "trained" / "trained.safetensors")
    assert all(torch.allclose(after[name], rows[name], atol=1e-6) for name in rows)
    with pytest.raises(ValueError, match="new_tokens=apart has no effect"):
        export(
            Source(folder=model_folder), tmp_path / "none", dtype="auto", prompts=(),
            max_shard_gb=5.0, has_rows_apart=True,
        )  # fmt: skip


def test_a_conversation_model_answers_in_transformers_and_stops_at_the_end_of_its_turn(
    chat_run: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = exported(chat_run, tmp_path / "talker", "max_shard_gb=2e-5")
    assert report["num_prompts"] == 6  # five texts and a conversation
    (check,) = report["checks"]
    assert check["dtype"] == report["dtype"] == "float32"
    assert check["largest"] < 1e-5 * check["scale"]
    assert report["moved"] == 0
    index = json.loads((tmp_path / "talker" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "talker")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "talker")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, end]
    # Whatever it reads, the end of a turn comes next.
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([end]), 1e4)
    )
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, max_new_tokens=20).tolist() == [[5, 6, 7, end]]


def test_the_card_says_what_was_trained_and_its_lines_run(
    classifier: Path, chat_run: Path, tmp_path: Path
) -> None:
    exported(classifier, tmp_path / "mood")
    card = (tmp_path / "mood" / "README.md").read_text()
    last = read_lines(classifier / "metrics.jsonl")[-1]
    assert last["split"] == "eval"
    assert f"| macro_f1 | {last['macro_f1']:.4f} |" in card
    assert f"| loss | {last['loss']:.4f} |" in card
    for words in (
        "`bad`, `good` (single_label_classification)", "LoRA of rank 4, alpha 32", "step 4 of 4",
        'pipeline_tag: "text-classification"', 'tags: ["tessera", "lora"]', "texts.jsonl",
        "largest difference", "score as a whole", "transformers 5",
    ):  # fmt: skip
        assert words in card, words
    assert str(tmp_path) not in card
    assert str(classifier.parent) not in card  # where this machine keeps it is nobody's business
    printed = run_card(tmp_path / "mood")
    assert printed.count("'bad'") == printed.count("'good'") == 2
    exported(chat_run, tmp_path / "talker")
    assert "apply_chat_template" in (tmp_path / "talker" / "README.md").read_text()
    run_card(tmp_path / "talker")


def test_a_classifiers_adapter_becomes_one_model_that_answers_with_its_labels(
    classifier: Path, tmp_path: Path
) -> None:
    from transformers import pipeline

    report = exported(classifier, tmp_path / "mood", "dtype=bf16")
    assert [check["dtype"] for check in report["checks"]] == ["float32", "bfloat16"]
    assert 0 < report["moved"] < 0.1
    config = json.loads((tmp_path / "mood" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["id2label"], config["dtype"]) == ({"0": "bad", "1": "good"}, "bfloat16")
    assert config["problem_type"] == "single_label_classification"
    answers = pipeline("text-classification", model=str(tmp_path / "mood"))(["red", "blue sky"])
    assert {answer["label"] for answer in answers} <= {"bad", "good"}


def test_an_export_of_tags_is_evaluated_as_its_run(
    folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    run = trained(
        folder, "tags", "experiment=token_classification", f"model.path={model_folder}",
        f"data.path={folder}/tags.jsonl", "adapter=ia3", "precision=fp32",
    )  # fmt: skip
    exported(run, tmp_path / "tags")
    assert run_card(tmp_path / "tags").count("\n") == len("Anna lives in Rome")
    test = f"data.eval_path={folder}/tags.jsonl"
    task = ("experiment=token_classification", "precision=fp32", f"data.cache={folder}/cache")
    found = evaluated(f"checkpoint={tmp_path / 'tags'}", test, *task, "data.row_tokens=64")
    expected = evaluated(f"checkpoint={run}", test)
    assert found["confusion"] == expected["confusion"]
    assert found["confusion"]["labels"] == ["B-SKY", "O"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_an_export_writes_what_its_run_writes(
    chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(chat_run, tmp_path / "talker")
    texts = []
    for checkpoint in (chat_run, tmp_path / "talker"):
        assert main(["generate", f"checkpoint={checkpoint}", "prompt=a", "max_new_tokens=9"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_weights_compute_what_base_and_adapter_do(
    kind: str, model_folder: Path, cache: Path, tmp_path: Path
) -> None:
    """The slow reference: the adapter beside its linears, never folded into them."""
    model = PretrainedModel(path=str(model_folder), attn_implementation="eager")
    run = tiny_run(cache, model=model, weights="auto", tokenizer="auto", adapter=KINDS[kind])
    adapter = write_adapter(tmp_path / "adapter", run)
    keys = json.loads((adapter / "adapter_config.json").read_text())
    keys["base_model_name_or_path"] = str(model_folder)
    (adapter / "adapter_config.json").write_text(json.dumps(keys))
    exported(adapter, tmp_path / "merged")
    beside = tiny_run(
        cache, model=model, weights="auto", tokenizer="auto",
        adapter=PretrainedAdapter(path=str(adapter)),
    )  # fmt: skip
    with torch.no_grad():
        expected = started(beside)(*INPUTS)
        found = load_merged(tmp_path / "merged", dtype=torch.float32, device=CPU)(*INPUTS)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_a_family_that_only_transformers_knows_is_exported(tmp_path: Path) -> None:
    saved(tmp_path / "qwen", "qwen2")
    report = exported(tmp_path / "qwen", tmp_path / "out", "prompts=[one, two words]")
    assert report["num_prompts"] == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen2"


def refusal(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    assert main(["export", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def changed(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1


def lost(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (changed, "in float32 a logit of transformers differs"),
        (lost, "finds missing keys: model.layers.1.mlp"),
    ],
)
def test_a_folder_that_answers_otherwise_is_not_kept(
    fault: Callable[[dict[str, torch.Tensor]], None], message: str, model_folder: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def tampered(folder: Path, *given: Any, **settings: Any) -> None:
        save_pretrained(folder, *given, **settings)
        weights = load_file(folder / "model.safetensors")
        fault(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr("trainer.export.export.save_pretrained", tampered)
    words = (f"checkpoint={model_folder}", f"output={tmp_path / 'out'}")
    assert message in refusal(capsys, 1, *words)
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_fp16_are_not_written_in_it(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / "large")
    weights = load_file(tmp_path / "large" / "model.safetensors")
    weights["model.norm.weight"] *= 1e6
    save_file(weights, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    words = (f"checkpoint={tmp_path / 'large'}", f"output={tmp_path / 'out'}", "dtype=fp16")
    assert "this model needs dtype=fp32" in refusal(capsys, 1, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["output=x"], "checkpoint is missing; set checkpoint=DIR"),
        (["checkpoint={model}"], "output is missing; set output=DIR"),
        (["checkpoint={model}", "output={model}"], "exists and is not empty; give a new folder"),
        (["checkpoint=nowhere", "output={new}"], "checkpoint=nowhere is no run"),
        (["checkpoint={model}", "output={new}", "dtyp=bf16"], "did you mean dtype?"),
        (["checkpoint={model}", "output={new}", "dtype=int8"], "set it to one of auto, fp32"),
        (["checkpoint={model}", "output={new}", "max_shard_gb=0"], "max_shard_gb=0.0 is not"),
        (["checkpoint={model}", "output={new}", "prompts=['']"], "'' has no token; give a longer"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(
    words: list[str], message: str, model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"model": model_folder, "new": tmp_path / "new"}
    assert message in refusal(capsys, 64, *(word.format(**places) for word in words))
    assert not (tmp_path / "new").exists()
