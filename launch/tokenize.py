"""`tessera tokenize`: texts or Megatron's files to shards; or a check of shards, byte by byte."""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launch.exit_codes import CHECK_FAILED, FINISHED, PREEMPTED
from launch.words import pairs

USAGE = """usage: tessera tokenize data.path=DIR output=DIR tokenizer=FOLDER|byte|bpe [key=value] ..

Writes shards of tokens for `tessera train data=tokens data.path=OUTPUT`. What is finished is kept:
after Ctrl-C or a crash the same command goes on. The bytes do not depend on the number of workers.

  data.path=DIR            a folder or file of txt, jsonl, csv, parquet or arrow; stdlib; or
                           hf://datasets/OWNER/NAME[@REVISION], with data.subset and data.split
  data.column=text         column of rows that holds the text
  data.max_documents=N     the first N documents only
  data.eval_fraction=0.01  share of documents held out to evaluate on
  output=DIR               a new folder, or one that the same command began
  tokenizer=FOLDER         a folder with tokenizer.json; byte; or bpe with vocab_size=N
  workers=N                processes; default: one per core
  shard_tokens=N           tokens after which a shard ends; default: 268435456
  dry_run=true             check everything, write nothing

tessera tokenize megatron=PREFIX output=DIR tokenizer=FOLDER
  imports PREFIX.bin and PREFIX.idx; the tokenizer is the one that made them

tessera tokenize check=DIR
  compares every block of every shard in DIR with its hash; exit code 1: one differs
"""


def main(arguments: list[str]) -> int:
    """Run `tessera tokenize` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return FINISHED
    options = _parse(arguments)
    if "check" in options:
        if len(options) > 1:
            raise ValueError("check=DIR stands alone; leave the other options out")
        return _check(Path(str(options["check"])).expanduser())
    is_dry = options.pop("dry_run", False)
    if not isinstance(is_dry, bool):
        raise ValueError(f"dry_run={is_dry} is neither true nor false; set it to one of them")
    job = _bind(options)
    work = job.check()
    if is_dry:
        print(f"# checked: {work}, by {job.num_workers} process(es); would write {job.folder}")
        return FINISHED
    return _run(job)


def _parse(arguments: list[str]) -> dict[str, Any]:
    """Return options by name; `data.x=1` stands in a group."""
    import yaml

    options: dict[str, Any] = {}
    for key, text in pairs("tokenize", arguments).items():
        group, _, name = key.rpartition(".")
        target: Any = options.setdefault(group, {}) if group else options
        if not isinstance(target, dict):
            raise ValueError(f"{group}={target} stands beside {key}; leave one of them out")
        try:
            target[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(
                f"{key}={text} cannot be read; put quotes around text with special characters, and "
                f"others around all for the shell: '{key}=\"...\"'"
            ) from None
    return options


def _bind(options: dict[str, Any]) -> Any:
    from launch.binding import TARGET, bind

    return bind({TARGET: "trainer.data.tokenise_job.TokeniseJob", **options})


def _run(job: Any) -> int:
    from launch.terminal import configure_logging, show_cursor

    configure_logging(rank=0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        job.prepare()
        # One process is one core: threads of fast tokenizers would fight over them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        index, progress = job.run()
    except KeyboardInterrupt:
        show_cursor()
        print(
            "tessera: stopped; finished shards are kept, the same command goes on", file=sys.stderr
        )
        return PREEMPTED
    logging.getLogger("launch").info("%s", _summary(job, index, progress))
    return FINISHED


def _summary(job: Any, index: Any, progress: Any) -> str:
    entries = [entry for store in index.stores.values() for entry in store]
    documents = sum(entry.num_documents for entry in entries)
    held_out = sum(entry.num_documents for entry in index.stores.get("eval", []))
    text = (
        f"{job.folder}: {documents:,} documents ({held_out:,} held out), "
        f"{sum(entry.num_tokens for entry in entries):,} tokens in {len(entries)} shards"
    )
    if not progress.num_documents:
        return f"{text}; all of it was there"
    if not progress.num_bytes:
        return f"{text}; {progress.num_tokens / progress.seconds / 1e6:.2f} M tokens/s"
    rate = progress.rate() / 1e6
    return (
        f"{text}; {progress.num_bytes / 1e6:,.1f} MB in {progress.seconds:.1f} s = "
        f"{rate:.2f} MB/s, {rate / job.num_workers:.2f} MB/s per core"
    )


def _check(folder: Path) -> int:
    """Compare all hashes; say file, section and place of every difference."""
    from trainer.data.shards import SUFFIX, Shard

    paths = sorted(folder.glob(f"*{SUFFIX}"))
    if not paths:
        raise ValueError(f"check={folder} holds no shard; give a folder that tessera tokenize made")
    started, size, bad = time.monotonic(), 0, 0
    for path in paths:
        shard = Shard(path)
        for first, last in shard.damaged():
            bad += 1
            print(f"{path}: bytes {first} to {last} were changed", file=sys.stderr)
        size += path.stat().st_size
        shard.close()
    seconds = time.monotonic() - started
    verdict = f"{bad} blocks were changed" if bad else "every block matches its hash"
    print(
        f"{folder}: {len(paths)} shards, {size / 1e6:,.1f} MB: {verdict} "
        f"({size / seconds / 2**30:.2f} GiB/s)"
    )
    return CHECK_FAILED if bad else FINISHED
