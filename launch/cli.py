"""The `tessera` command: find the subcommand, run it, turn a refusal into one line and a code."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from launch.exit_codes import (
    BAD_CONFIG,
    CHECK_FAILED,
    INTERNAL,
    MEANINGS,
    STORAGE,
    code_of,
    in_words,
)

# With a path, before anything trains: a setting names what is not there, or not the user's.
_WRONG_PATHS = (
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG,
)  # fmt: skip
# One line each; the module is imported only when its command runs.
COMMANDS = {
    "train": ("launch.train", "train a model: tessera train experiment=demo"),
    "sweep": (
        "launch.sweep",
        "many runs, one table: tessera sweep experiment=demo optim.lr=1e-3,3e-4 seed=0,1",
    ),
    "generate": (
        "launch.generate",
        "continue a text: tessera generate checkpoint=DIR prompt=...",
    ),
    "evaluate": (
        "launch.evaluate",
        "loss and metrics of a checkpoint: tessera evaluate checkpoint=DIR data.eval_path=FILE",
    ),
    "export": (
        "launch.export",
        "a checked Hugging Face folder: tessera export checkpoint=DIR output=DIR",
    ),
    "verify": (
        "launch.verify",
        "show that every layout computes the same: tessera verify experiment=demo",
    ),
    "plan": (
        "launch.plan",
        "memory, work and time of a run, starting nothing: tessera plan experiment=demo",
    ),
    "inspect": (
        "launch.inspect",
        "show a step as it is trained on: tessera inspect experiment=demo",
    ),
    "replay": ("launch.replay", "a step of a run once more: tessera replay run=DIR step=N"),
    "tokenize": (
        "launch.tokenize",
        "texts to shards of tokens: tessera tokenize data.path=DIR output=DIR tokenizer=...",
    ),
    "ledger": (
        "launch.ledger",
        "prove that every sample was trained on exactly once: tessera ledger run=DIR",
    ),
    "diff": ("launch.diff.command", "what differs between two runs: tessera diff a=DIR b=DIR"),
    "report": ("launch.report.command", "one HTML page about a run: tessera report run=DIR"),
    "sync": ("launch.sync", "send the curves that wandb lacks: tessera sync run=DIR"),
    "checkpoints": (
        "launch.checkpoints",
        "what a run has saved, every byte checked: tessera checkpoints run=DIR",
    ),
    "convert": ("launch.convert", "move a Gemma between Hugging Face, Flax and DeepMind files"),
    "doctor": ("launch.doctor", "what would stop or slow a run: versions, limits, kernels, links"),
    "explain": (
        "launch.explain",
        "a setting, who set it and what it means: tessera explain optim.lr experiment=demo",
    ),
    "completion": (
        "launch.completion",
        "what makes a shell complete tessera commands: tessera completion bash",
    ),
    "list": ("launch.menu", "list experiments and the choices of every config group"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; 141 where nobody reads what it says any more."""
    try:
        code = _main(arguments)
        sys.stdout.flush()  # here, not when Python ends, which would complain
    except BrokenPipeError:  # `tessera list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _main(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else BAD_CONFIG
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        from trainer.near_names import did_you_mean  # here: who mistypes may wait

        hint = did_you_mean(command, COMMANDS)
        print(f"tessera: no command {command!r}; {hint}see tessera --help", file=sys.stderr)
        return BAD_CONFIG
    from launch.terminal import redact_tracebacks

    redact_tracebacks()
    run: Callable[[list[str]], int] = import_module(COMMANDS[command][0]).main
    try:
        return run(rest)
    except KeyboardInterrupt:
        print(f"tessera: interrupted (exit code {128 + signal.SIGINT})", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        raise
    except Exception as error:  # whatever has a remedy is said in one line
        return _refused(error)


def _refused(error: Exception) -> int:
    """Say why a command ends, and return its exit code; without a remedy that takes a traceback."""
    from launch.terminal import write_traceback
    from trainer.redaction import redact

    code, text = code_of(error), str(error)
    if code == STORAGE and isinstance(error, OSError):
        text = f"{error.filename or 'disk'}: {error.strerror}; make room there, or set runs=DIR"
    if isinstance(error, OSError) and error.errno in _WRONG_PATHS and error.filename is not None:
        code = BAD_CONFIG
        text = f"{error.filename}: {error.strerror}; make that path usable, or give another one"
    if code == INTERNAL and type(error).__module__ != "trainer.errors":
        write_traceback(error)
        text = f"{type(error).__name__}: {text}; a defect: please report it with the lines above"
    if code not in (BAD_CONFIG, CHECK_FAILED):
        text += f"; {in_words(code)}"
    print(f"tessera: {redact(text)}", file=sys.stderr)
    return code


def _help() -> str:
    commands = "\n".join(f"  {name:<11} {text}" for name, (_, text) in COMMANDS.items())
    codes = "\n".join(f"  {code:<3} {meaning}" for code, meaning in MEANINGS.items())
    return (
        "usage: tessera COMMAND [group=choice] [key=value] ...\n\n"
        f"commands:\n{commands}\n\n"
        f"exit codes:\n{codes}\n\n"
        "tessera COMMAND --help says more."
    )
