"""`tessera tokenize`: what it says, what it refuses, and what a killed one leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import main
from launch.exit_codes import BAD_CONFIG, CHECK_FAILED, DATA, FINISHED, PREEMPTED
from tests.token_folders import write_folder

LIMIT_SECONDS = 150.0


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "all.jsonl"
    lines = [json.dumps({"text": f"{number} " * 500}) for number in range(1000, 2500)]
    path.write_text("\n".join(lines) + "\n")
    return path


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line that a command is refused with."""
    code = main(["tokenize", *words])
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert code == BAD_CONFIG
    return text


def test_wrong_command_lines_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    path, output, byte = f"data.path={tmp_path}/b.txt", f"output={tmp_path}/out", "tokenizer=byte"
    for words, *fragments in [
        (["--workers=2"], "'--workers=2' is no option; write key=value"),
        ([path, byte], "output is missing"),
        ([path, output], "tokenizer is missing"),
        ([output, byte], "give either data.path=TEXT or megatron=PREFIX"),
        ([path, output, byte, "worker=2"], "unknown key worker; did you mean workers?"),
        ([path, output, byte, "data.colum=a"], "did you mean data.column?"),
        ([path, output, byte, "workers=0"], "workers=0 is not positive"),
        ([path, output, byte, "workers=two"], "workers='two' is text; needed a whole number"),
        ([path, output, byte, "shard_tokens=-1"], "shard_tokens=-1 is not positive"),
        ([path, output, byte, "data.eval_fraction=1.0"], "data.eval_fraction=1.0 is no share"),
        ([path, output, byte, "vocab_size=9"], "it belongs to tokenizer=bpe, which needs it"),
        ([path, output, "tokenizer=bpe"], "vocab_size=None with tokenizer=bpe"),
        ([path, output, byte, "dry_run=maybe"], "dry_run=maybe is neither true nor false"),
        ([path, output, f"tokenizer={tmp_path}"], "has no tokenizer.json"),
        ([path, f"output={tmp_path}/full", byte], "full holds thesis.txt and no tokens"),
        ([f"data.path={tmp_path}/c", output, byte], "does not exist; give an existing folder"),
        ([f"data.path={tmp_path}/a.jsonl", output, byte], "no column 'text', only body"),
        ([f"megatron={tmp_path}/m", output, byte], "m.idx does not exist"),
        ([f"megatron={tmp_path}/m", output, byte, path], "and not both"),
        ([f"megatron={tmp_path}/m", output, byte, "workers=2"], "and no workers="),
        (
            ["data.path=*.jsonl", output, byte],
            "data.path=*.jsonl cannot be read; put quotes around",
        ),
        (["data=text", path, output, byte], "data=text stands beside data.path; leave one of them"),
        ([f"check={tmp_path}"], "holds no shard"),
        ([f"check={tmp_path}", byte], "check=DIR stands alone"),
    ]:
        text = refusal(capsys, *words)
        for fragment in fragments:
            assert fragment in text
    assert not (tmp_path / "out").exists()


def test_dry_run_checks_and_writes_nothing(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data.path={corpus}", f"output={tmp_path}/out", "tokenizer=byte", "workers=3"]
    assert main(["tokenize", *words, "dry_run=true"]) == FINISHED
    assert "1 files, 3.8 MB, by 3 process(es); would write" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_check_names_the_file_and_the_place_of_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path, [50] * 5, shard_tokens=60, name="train")
    assert main(["tokenize", f"check={tmp_path}"]) == FINISHED
    assert "3 shards" in capsys.readouterr().out
    path = tmp_path / "train-00001.shard"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert main(["tokenize", f"check={tmp_path}"]) == CHECK_FAILED
    said = capsys.readouterr()
    assert f"{path}: bytes 64 to {64 + 2 * 104 + 24} were changed" in said.err
    assert "1 blocks were changed" in said.out
    path.write_bytes(data[:-1])
    assert main(["tokenize", f"check={tmp_path}"]) == DATA


def start(corpus: Path, output: Path) -> "subprocess.Popen[str]":
    """Start the command with two workers and many small shards, in a group of its own."""
    words = [f"data.path={corpus}", f"output={output}", "tokenizer=byte", "workers=2"]
    command = [sys.executable, "-m", "launch", "tokenize", *words, "shard_tokens=20000"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def stopped(
    corpus: Path, output: Path, stop: signal.Signals, shards: int
) -> "tuple[subprocess.Popen[str], str]":
    """Start the command and stop it at work, once so many shards are done; also what it said.

    Where this process is kept waiting, the command may have finished before: once more, then.
    """
    before = set(output.glob("*"))
    for _ in range(5):
        process = start(corpus, output)
        wait_for(lambda: len(list(output.glob("train-*.shard"))) >= shards)
        if stop is signal.SIGINT:
            os.killpg(process.pid, stop)  # as a terminal does: the workers get it too
        else:
            process.kill()
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
        if process.returncode != FINISHED:
            break
        for path in set(output.glob("*")) - before:
            path.unlink()
    return process, errors


def members(group: int) -> list[int]:
    """Return the living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(condition: "object") -> None:
    assert callable(condition)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_stopped_or_killed_it_goes_on_to_the_same_bytes_and_leaves_no_process(
    corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for number, (stop, code) in enumerate(
        [(signal.SIGINT, PREEMPTED), (signal.SIGKILL, -signal.SIGKILL)]
    ):
        process, errors = stopped(corpus, output, stop, shards=3 * number + 2)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        wait_for(lambda: not members(process.pid))  # noqa: B023
        assert not (output / "index.json").exists()
        if stop is signal.SIGINT:
            assert "stopped; finished shards are kept" in errors
            assert not list(output.glob(".*.tmp"))
    kept = {path: path.stat().st_ino for path in output.glob("train-*.shard")}
    process = start(corpus, output)
    said, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == FINISHED, errors
    assert "1,500 documents" in said
    assert "MB/s per core" in said
    assert {path: path.stat().st_ino for path in kept} == kept
    words = [f"data.path={corpus}", f"output={tmp_path}/whole", "tokenizer=byte", "workers=1"]
    assert main(["tokenize", *words, "shard_tokens=20000"]) == FINISHED
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in output.iterdir()} == whole
