"""A wrong command line is told found, needed and remedy in one line, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import save_file

from launch.binding import bind
from launch.cli import main
from launch.compose import compose
from launch.exit_codes import BAD_CONFIG, DATA, STORAGE
from tests.conftest import tiny_spec

LIMIT_SECONDS = 150.0

# Small enough that a command which is not refused, against its test, ends at once.
TINY = [
    "train", "experiment=demo", "model.hidden_size=32", "model.intermediate_size=64",
    "model.num_hidden_layers=1", "data.row_tokens=32", "callbacks.ngrams=null",
    "callbacks.closing.sample_tokens=0", "max_steps=1",
]  # fmt: skip
OWN_TEXT = ["train", "experiment=pretrain_text", "tokenizer=byte", "max_steps=1"]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs that each have one thing wrong with them."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "body.jsonl").write_text(json.dumps({"body": "text", "id": 1}) + "\n")
    (folder / "numbers.jsonl").write_text(json.dumps({"text": 5}) + "\n")
    (folder / "torn.jsonl").write_text('{"text": "no end\n')
    (folder / "no_rows.jsonl").touch()
    (folder / "letter.docx").write_text("text")
    for name, text in {"a.txt": "text", "b.jsonl": '{"text": "text"}\n'}.items():
        (folder / "mixed").mkdir(exist_ok=True)
        (folder / "mixed" / name).write_text(text)
    (folder / "garbled_tokenizer").mkdir()
    (folder / "garbled_tokenizer" / "tokenizer.json").write_text("{}")
    _save_weights(folder / "narrow", hidden_size=16)
    _save_weights(folder / "deep", hidden_size=32, num_hidden_layers=2)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "model.safetensors").write_bytes(b"\xff" * 64)
    return folder


def _save_weights(folder: Path, **changes: object) -> None:
    """Save the weights of a model that is like TINY's but for `changes`."""
    spec = tiny_spec(**({"intermediate_size": 64, "num_hidden_layers": 1} | changes))
    model = spec.build_causal_lm(chunk_tokens=8)
    folder.mkdir()
    weights = {name: torch.clone(value) for name, value in model.named_parameters()}
    save_file(weights, folder / "model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Import what commands import, once for all forks."""
    import datasets

    assert datasets.__version__
    tree = compose(["experiment=demo"]).tree
    bind(tree["launch"], "launch")
    with pytest.raises(ValueError, match="launch"):
        bind(tree)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every command in a folder of its own, with another home and no torchrun around."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where a run would keep its tokens
    monkeypatch.delenv("RANK", raising=False)


REFUSALS = {
    # The command line itself.
    "unknown command": (
        ["trian", "experiment=demo"],
        ["no command 'trian'", "did you mean train?", "tessera --help"],
    ),
    "option of another style": (["train", "--max-steps=3"], ["'--max-steps=3'", "key=value"]),
    "word without a value": (["train", "max_steps"], ["'max_steps'", "key=value"]),
    "argument of a command without": (["list", "models"], ["no group", "'models'", "model"]),
    "torn list": (["train", "experiment=demo", "optim.betas=[0.9"], ["optim.betas"]),
    "two values": ([*TINY, "seed=1,2"], ["seed=1,2"]),
    "dry_run unclear": ([*TINY, "dry_run=maybe"], ["dry_run=maybe", "true", "false"]),
    "text cut at an interpolation": ([*TINY, "tokenizer=${nothing}"], ["nothing", "tokenizer"]),
    "limit that has passed": (
        [*TINY, "stop_at=2020-12-31T08:00"],
        ["stop_at=2020-12-31T08:00 has passed", "set it to a later time"],
    ),
    "limit behind all calendars": (
        [*TINY, "stop_at=+9999999d"],
        ["stop_at='+9999999d' is no time", "+2d"],
    ),
    "wait that no clock counts": (
        [*TINY, "timeout_seconds=1e15"],
        ["timeout_seconds=1000000000000000.0 is longer", "1000000000 or less"],
    ),
    "manifest for a folder that is not there": (
        [
            *TINY,
            "launch=kubernetes",
            "launch.image=i",
            "launch.claim=c",
            "runs=/runs",
            "launch.output={wrong}/nothing/run.yaml",
        ],
        ["{wrong}/nothing/run.yaml: No such file or directory", "give another one"],
    ),
    "cache below a file": (
        [*TINY, "max_steps=null", "max_epochs=1", "data.cache={wrong}/body.jsonl/cache"],
        ["{wrong}/body.jsonl/cache", "Not a directory", "set data.cache to a folder"],
    ),
    # Names of groups, choices and keys.
    "unknown group": (["train", "modle=llama_tiny"], ["modle", "did you mean model?"]),
    "unknown choice": (
        ["train", "model=lama_tiny"],
        ["model has no choice 'lama_tiny'", "did you mean model=llama_tiny?", "smollm2_135m"],
    ),
    "unknown experiment": (
        ["train", "experiment=dmeo"],
        ["no choice 'dmeo'", "did you mean experiment=demo?", "pretrain_text"],
    ),
    "unknown launcher": ([*TINY, "launch=slrum"], ["launch has no choice 'slrum'", "local"]),
    "unknown key": ([*TINY, "max_step=3"], ["unknown key max_step", "did you mean max_steps?"]),
    "unknown key that was added": (
        [*TINY, "+max_step=3"],
        ["unknown key max_step", "did you mean max_steps?"],
    ),
    "unknown key in a group": (
        [*TINY, "data.global_row=4"],
        ["unknown key data.global_row", "did you mean data.global_rows?"],
    ),
    "unknown key two groups deep": (
        [*TINY, "model.rope_parameters.rope_thet=5"],
        ["model.rope_parameters.rope_thet", "did you mean model.rope_parameters.rope_theta?"],
    ),
    "unknown key of the launcher": (
        [*TINY, "launch.process=2"],
        ["unknown key launch.process", "did you mean launch.processes?"],
    ),
    "null for a choice": (
        [*TINY, "engine=null"],
        ["engine has no choice 'null'", "accelerate, deepspeed, native"],
    ),
    "number for a choice": ([*TINY, "mesh=2"], ["mesh has no choice '2'", "ddp"]),
    "deleted engine": ([*TINY, "~engine=native"], ["engine is missing", "set engine=..."]),
    "deleted group": ([*TINY, "~task=causal_lm"], ["task is missing", "set task=..."]),
    "deleted key that the launcher reads": (
        [*TINY, "~runs=runs"],
        ["runs is missing"],
    ),
    "deleted launcher": ([*TINY, "~launch=local"], ["launch is missing"]),
    # Types.
    "text for a number": ([*TINY, "optim.lr=fast"], ["optim.lr='fast'", "text", "a number"]),
    "text for a count": ([*TINY, "max_steps=ten"], ["max_steps='ten'", "text", "whole number"]),
    "fraction for a count": ([*TINY, "max_steps=1.5"], ["max_steps=1.5", "whole number"]),
    "number for a switch": (
        [*TINY, "model.tie_word_embeddings=1"],
        ["model.tie_word_embeddings=1", "true or false"],
    ),
    "short list": ([*TINY, "optim.betas=[0.9]"], ["optim.betas=[0.9]", "1 entries", "needed 2"]),
    "text for a list": ([*TINY, "freeze.frozen=lm_head"], ["freeze.frozen='lm_head'", "a list"]),
    "null where a value is needed": ([*TINY, "seed=null"], ["seed=None", "null", "whole number"]),
    "foreign target": (
        [*TINY, "optim._target_=os.system"],
        ["optim._target_='os.system'", "not one of Tessera's specs"],
    ),
    "weights of classes in another word": (
        [*TINY, "task=sequence_classification", "task.class_weights=balance"],
        ["task.class_weights='balance' is unknown", "'balanced' or a group of keys"],
    ),
    "number for the name": ([*TINY, "name=2024"], ["name=2024", "text"]),
    "number for the parent folder": ([*TINY, "runs=5"], ["runs=5", "text"]),
    "null for resume": ([*TINY, "resume=null"], ["resume=None", "null", "text"]),
    # Values out of range.
    "precision unknown": ([*TINY, "precision=int4"], ["precision='int4'", "fp32", "bf16", "fp64"]),
    "name that is a path": ([*TINY, "name=../elsewhere"], ["name='../elsewhere'", "letters"]),
    "name with a slash": ([*TINY, "name=a/b"], ["name='a/b'", "letters"]),
    "no steps": ([*TINY, "max_steps=0"], ["max_steps=0", "1 or more"]),
    "two lengths": (
        [*TINY, "max_epochs=2"],
        ["max_steps=1 and max_epochs=2 are two lengths", "set one of them to null"],
    ),
    "no length": (
        [*TINY, "max_steps=null", "max_epochs=null"],
        ["max_steps and max_epochs are both null", "set one of them"],
    ),
    "no epochs": (
        ["train", "experiment=demo", "max_epochs=-1"],
        ["max_epochs=-1.0 is not positive"],
    ),
    "epochs of sources that end at other times": (
        [
            "train",
            "experiment=demo",
            "max_epochs=1",
            "data.path=null",
            "data.sources={a: {path: stdlib, weight: 2}, b: {path: stdlib, weight: 1}}",
        ],
        ["max_epochs=1 has no meaning with data.sources.a.weight=2", "set max_steps", "epochs"],
    ),
    "no processes": ([*TINY, "launch.processes=0"], ["launch.processes=0", "1 or more"]),
    "negative learning rate": ([*TINY, "optim.lr=-1"], ["optim.lr=-1", "above 0"]),
    "learning rate that is no number": ([*TINY, "optim.lr=nan"], ["optim.lr=nan", "above 0"]),
    "heads that key and value heads do not divide": (
        [*TINY, "model.num_attention_heads=5"],
        ["num_key_value_heads=2 does not divide num_attention_heads=5", "[1, 5]"],
    ),
    "heads that do not divide the width": (
        [*TINY, "model.num_attention_heads=6"],
        ["num_attention_heads=6 does not divide hidden_size=32", "head_dim"],
    ),
    "head of no width": ([*TINY, "model.head_dim=0"], ["head_dim=0"]),
    "head of negative width": ([*TINY, "model.head_dim=-4"], ["head_dim=-4"]),
    "stretched positions without a factor": (
        [*TINY, "model.rope_parameters.rope_type=linear"],
        ["rope_type='linear' needs factor", "set it"],
    ),
    "positions stretched by nothing": (
        [*TINY, "model.rope_parameters={rope_type: linear, factor: 0.0}"],
        ["factor=0.0"],
    ),
    # Data.
    "no data": (["train"], ["data.path is missing", "set data.path=..."]),
    "experiment without its data": (OWN_TEXT, ["data.path is missing", "set data.path=..."]),
    "missing file": (
        [*OWN_TEXT, "data.path={wrong}/nothing.txt"],
        ["nothing.txt does not exist", "existing folder or file"],
    ),
    "wrong column": (
        [*OWN_TEXT, "data.path={wrong}/body.jsonl"],
        ["body.jsonl has no column 'text'", "body, id", "set data.column"],
    ),
    "mixed formats": (
        [*OWN_TEXT, "data.path={wrong}/mixed"],
        ["mixed mixes json, text files", "keep one kind"],
    ),
    "empty folder": (
        [*OWN_TEXT, "data.path={wrong}/empty"],
        ["empty holds no file", ".txt", ".parquet"],
    ),
    "file without rows": ([*OWN_TEXT, "data.path={wrong}/no_rows.jsonl"], ["no_rows.jsonl"]),
    "unknown format": (
        [*OWN_TEXT, "data.path={wrong}/letter.docx"],
        ["'.docx'", ".txt", ".parquet"],
    ),
    "evaluation without data": (
        [*TINY, "eval_every=5", "data.eval_fraction=0.0"],
        ["eval_every=5 has nothing to evaluate on", "data.eval_path", "eval_every=null"],
    ),
    "evaluation on a missing file": (
        [*TINY, "data.eval_path={wrong}/nothing.txt"],
        ["eval_path={wrong}/nothing.txt does not exist"],
    ),
    "row that is too long": (
        [*TINY, "data.row_tokens=4096"],
        ["data.row_tokens=4096", "max_position_embeddings=2048", "lower data.row_tokens"],
    ),
    "micro_rows that do not divide": (
        [*TINY, "data.micro_rows=3"],
        ["data.micro_rows=3 does not divide the 4 rows", "[1, 2, 4]"],
    ),
    "mesh that does not fit": (
        [*TINY, "mesh.dp_shard=3"],
        ["dp_shard=3 does not fit 1 processes", "mesh=fsdp"],
    ),
    # Tokenizers and weights.
    "tokenizer larger than the vocabulary": (
        [*TINY, "model.vocab_size=100"],
        ["tokenizer=byte has 258 tokens", "model.vocab_size=100", "258 or more"],
    ),
    "tokenizer folder without tokenizer.json": (
        [*TINY, "tokenizer={wrong}/empty"],
        ["has no tokenizer.json", "tokenizer=byte"],
    ),
    "tokenizer.json that is none": (
        [*TINY, "tokenizer={wrong}/garbled_tokenizer"],
        ["garbled_tokenizer"],
    ),
    "weights folder without weights": (
        [*TINY, "weights={wrong}/empty"],
        ["holds no safetensors file", "weights=random"],
    ),
    "weights of other shapes": (
        [*TINY, "weights={wrong}/narrow"],
        ["has shape [258, 16], the model needs [258, 32]", "choose the model"],
    ),
    "weights of more layers": (
        [*TINY, "weights={wrong}/deep"],
        ["model.layers.1.", "unknown to the model", "choose the model"],
    ),
    "pattern without a match": (
        [*TINY, "freeze.frozen=[model.embed_token.weight]"],
        ["'model.embed_token.weight' matches no parameter", "model.embed_tokens.weight"],
    ),
    "group without a match": (
        [*TINY, "freeze=groups", "freeze.groups.a={names: [lm_haed.*], lr_ratio: 2}"],
        ["freeze.groups.a='lm_haed.*' matches no parameter", "lm_head.weight"],
    ),
    "group that unfreezes at the end": (
        [*TINY, "freeze=groups", "freeze.groups.a={names: [lm_head.*], unfreeze_at: 1}"],
        ["freeze.groups.a.unfreeze_at=1 is not before the end, max_steps=1", "lower it"],
    ),
    "rate of a frozen group": (
        [*TINY, "freeze=groups", "freeze.groups.a={names: [x], frozen: true, lr_ratio: 2}"],
        ["freeze.groups.a: lr_ratio=2.0 has no effect on a group that is frozen", "remove one"],
    ),
    "nothing left to train": ([*TINY, "freeze.frozen=['*']"], ["nothing to train", "remove"]),
    # Settings of what is switched off.
    "answers that nobody asks for": (
        [*TINY, "validation.max_new_tokens=64"],
        ["validation.max_new_tokens=64 has no effect", "set validation.every=1"],
    ),
    "measures of answers that nobody asks for": (
        [*TINY, "validation.metrics=[bogus]"],
        ["validation.metrics=[bogus] has no effect", "leave it out"],
    ),
    "direction of no number": (
        [*TINY, "best.goal=max"],
        ["best: goal, patience and min_delta have no effect without a metric", "set metric"],
    ),
    "limit of a watch over one process": (
        [*TINY, "launch.watchdog.step_seconds=5"],
        ["launch.watchdog.step_seconds=5", "no effect on one process", "launch.restarts"],
    ),
    "listener of few tokens": (
        ["train", "experiment=demo", "tokenizer=bpe", "model.vocab_size=5000"],
        ["at most 4096 tokens, the tokenizer has 5000", "set callbacks.ngrams=null"],
    ),
    "change that no resume allows": (
        [*TINY, "resume_allow=[determinstic]"],
        ["resume_allow='determinstic' is unknown", "data.mix, deterministic"],
    ),
    # What is adapted.
    "adapter of a name that is not there": (
        [*TINY, "adapter=lora", "adapter.targets=[q_prj]"],
        ["adapter.targets='q_prj' matches no linear", "q_proj"],
    ),
    "adapter on a tied head": (
        [*TINY, "adapter=lora", "adapter.targets=[lm_head]"],
        ["adapter.targets='lm_head'", "tied to the embedding", "take it out"],
    ),
    "frozen weights beside an adapter": (
        [*TINY, "adapter=lora", "freeze.frozen=[model.norm.*]"],
        ["freeze.frozen=['model.norm.*'] has no effect", "set freeze=none"],
    ),
    "setting of another adapter": (
        [*TINY, "adapter=ia3", "adapter.rank=8"],
        ["unknown key adapter.rank", "Known: targets"],
    ),
    "virtual tokens before rows of text": (
        [*TINY, "adapter=prompt"],
        ["adapter=prompt puts 20 virtual tokens before every document", "set data=chat"],
    ),
    "a base in bits that nobody knows": (
        [*TINY, "adapter=lora", "adapter.quantize=int3"],
        ["adapter.quantize='int3' is unknown", "set it to one of none, nf4"],
    ),
    "DoRA over a base in 4 bits": (
        [*TINY, "adapter=dora", "adapter.quantize=nf4"],
        ["adapter.quantize=nf4 with adapter.use_dora=true", "take adapter=lora"],
    ),
    "adapter from an empty folder": (
        [*TINY, "adapter=pretrained", "adapter.path={wrong}/empty"],
        ["adapter_config.json", "give a folder that peft saved"],
    ),
    # Going on with a run.
    "resume from a folder without a checkpoint": (
        [*TINY, "resume={wrong}/empty"],
        ["resume={wrong}/empty has no checkpoint", "auto or never"],
    ),
    "resume from a step of a run that is new": (
        [*TINY, "resume_step=7"],
        ["resume_step=7 has no checkpoint"],
    ),
}
FAILURES = {
    "column without text": (DATA, "data.path={wrong}/numbers.jsonl", ["'text' holds int", "text"]),
    "file that is torn": (DATA, "data.path={wrong}/torn.jsonl", ["torn.jsonl cannot be read"]),
    "weights that are damaged": (
        STORAGE,
        "weights={wrong}/damaged",
        ["model.safetensors is no safetensors file"],
    ),
}


def refusal(words: list[str], wrong: Path) -> tuple[int, str]:
    """Return exit code and stderr of a command, run in a fork of this process.

    A fork, because a command that is not refused would train in here, or replace this process by a
    supervisor; and because it spares the second that importing torch takes.
    """
    words = [word.replace("{wrong}", str(wrong)) for word in words]
    errors = wrong / "stderr"
    child = os.fork()
    if child == 0:
        _be_command(words, errors)
    deadline = time.monotonic() + LIMIT_SECONDS
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1]), errors.read_text()


def _be_command(words: list[str], errors: Path) -> NoReturn:
    """Do as `sys.exit(main(words))` does, and leave the fork at any price."""
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr, sys.stdout = open(2, "w", closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    code = 1
    try:
        code = main(words)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def check(errors: str, fragments: list[str], wrong: Path) -> None:
    """Check that `errors` is one line of ours with all fragments, and that nothing was left."""
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("tessera: ")
    for fragment in fragments:
        assert fragment.replace("{wrong}", str(wrong)) in lines[0]
    assert list(Path.cwd().iterdir()) == []
    assert not (Path.home() / ".cache" / "tessera").exists()


@pytest.mark.parametrize(("words", "fragments"), REFUSALS.values(), ids=REFUSALS)
def test_wrong_command_line_is_refused_in_one_line(
    words: list[str], fragments: list[str], wrong: Path
) -> None:
    code, errors = refusal(words, wrong)
    check(errors, fragments, wrong)
    assert code == BAD_CONFIG


@pytest.mark.parametrize(("code", "word", "fragments"), FAILURES.values(), ids=FAILURES)
def test_input_that_cannot_be_read_has_its_own_code_in_one_line(
    code: int, word: str, fragments: list[str], wrong: Path
) -> None:
    """Not the user's words are wrong here but a file: schedulers and people tell them apart."""
    found, errors = refusal([*(OWN_TEXT if code == DATA else TINY), word], wrong)
    check(errors, fragments, wrong)
    assert found == code


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["trian"], ["no command 'trian'", "did you mean train?"]),
        (
            [*TINY, "launch.processes=3"],
            ["data.global_rows=4 is not divisible by 3", "[1, 2, 4]", "multiple of 3"],
        ),
        (
            [*TINY, "launch.processes=2", "mesh=single"],
            ["mesh single does not fit 2 processes", "start 1", "mesh=ddp"],
        ),
    ],
    ids=["unknown command", "rows that ranks do not divide", "mesh of one process on two"],
)
def test_real_command_refuses_alike(words: list[str], fragments: list[str], wrong: Path) -> None:
    command = [sys.executable, "-m", "launch", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    check(done.stderr, fragments, wrong)
    assert done.returncode == BAD_CONFIG
    assert done.stdout == ""


def test_rank_of_torchrun_without_its_world_is_refused(wrong: Path) -> None:
    command = [sys.executable, "-m", "launch", *TINY]
    environment = os.environ | {"RANK": "0"}
    environment.pop("WORLD_SIZE", None)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    check(done.stderr, ["RANK is set", "WORLD_SIZE", "torchrun", "unset RANK"], wrong)
    assert done.returncode == BAD_CONFIG


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("launch.restarts=5", "launch.restarts=5 has no effect under torchrun"),
        ("launch.watchdog.floor_seconds=5", "launch.watchdog.floor_seconds=5"),
    ],
)
def test_rank_of_torchrun_is_told_that_nobody_of_ours_watches_it(
    word: str, found: str, wrong: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    code, errors = refusal([*TINY, word], wrong)
    check(errors, [found, "leave it out"], wrong)
    assert code == BAD_CONFIG
