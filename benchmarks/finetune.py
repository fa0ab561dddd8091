"""How many useful tokens per second does an epoch of fine-tuning train, packed or padded?

    python -m benchmarks.finetune [key=value ...]         bf16, then fp32
    python -m benchmarks.finetune data=mails.jsonl documents=512 precision=bf16 rounds=5

Keys: the fields of Settings (finetune_inputs.py), `model=` a choice of configs/model and
`model.FIELD=` its fields. Exit code 64: a key or value that does not fit.

Without `data=`, the documents are the docstrings of Python's standard library: short and long
ones, and nothing to download. A row of a file holds `text`, or the `tokens` of a sentence. A text
that begins with "From " is a mail of the mbox format: its body counts. Public data: the mails of
the SpamAssassin corpus (https://spamassassin.apache.org/old/publiccorpus), the sentences of the
Brown corpus (nltk).

What is measured. All contenders start from one weight file and train one epoch on the same
documents, cut at the same length, tokenised before by one tokenizer, with fp32 weights, computing
in `precision`, with the same AdamW, rates, clip norm and threads; each runs the whole loop that its
users get and logs each step. They run in turn, each in a fresh process:

    ours      Tessera: documents packed within each step, attention inside documents
    padded    transformers.Trainer: each micro-batch padded to its longest document, in our order
    grouped   the same with train_sampling_strategy=group_by_length: its best case
    flattened transformers.Trainer, packed: each micro-batch is one row of its documents
    trl       TRL's SFTTrainer(packing=True), where TRL is installed: the epoch is packed before

Useful tokens are the targets: each token of a document but its first. Their rate is those of all
steps after the first `warmup`, by the time between the host's reads of the losses around them; on a
machine with other jobs the rate per second of CPU time counts, and threads=1: threads that wait
spin. Ratios are taken within each round. Ours also predicts the token at which a document is cut.
TRL's steps hold as many rows as make `global_documents` on
average; the other contenders' hold exactly as many documents.

What is asked for: ours at least 2.5 times as fast as padded and 1.2 times as flattened, with less
memory than either.
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.finetune_inputs import FACTS, PRECISIONS, Settings, prepare
from benchmarks.finetune_sides import CONTENDERS, Epoch
from benchmarks.in_turn import append_row, machine, read_options, run_rounds, show, spread
from launch.exit_codes import BAD_CONFIG, FINISHED, INTERNAL
from trainer.parallel.pieces import unique_parameters

RESULTS = Path(__file__).parent / "results" / "finetune.jsonl"
NAMES = {
    "ours": "Tessera, packed",
    "padded": "Trainer, padded",
    "grouped": "Trainer, by length",
    "flattened": "Trainer, packed",
    "trl": "TRL, packed",
}


def summarise(rounds: list[dict[str, Epoch]], warmup: int) -> dict[str, Any]:
    """Return each contender's figures as plain values."""
    summary: dict[str, Any] = {}
    for side in rounds[0]:
        epochs = [one[side] for one in rounds]
        pairs = [(one[side], one["ours"]) for one in rounds]
        first = epochs[0]
        summary[side] = {
            "useful_tokens_per_second": spread([_rate(epoch, warmup) for epoch in epochs]),
            "beside_ours": spread([_rate(a, warmup) / _rate(b, warmup) for a, b in pairs]),
            "ours_beside": spread([_rate(b, warmup) / _rate(a, warmup) for a, b in pairs]),
            "useful_tokens_per_cpu_second": spread([_cpu_rate(e, warmup) for e in epochs]),
            "beside_ours_in_cpu_time": spread(
                [_cpu_rate(a, warmup) / _cpu_rate(b, warmup) for a, b in pairs]
            ),
            "steps": len(first.losses),
            "targets": sum(first.targets),
            "padding": round(1 - sum(first.tokens) / sum(first.positions), 4),
            "loss_of_step_1": first.losses[0],
            "loss_of_epoch": _mean_loss(first),
            "peak_gib": spread([epoch.peak_gib for epoch in epochs]),
            "leakage": first.leakage,
            "packed_beside_alone": first.packing,
        }
    return summary


def _rate(epoch: Epoch, warmup: int) -> float:
    seconds = epoch.stamps[-1] - epoch.stamps[warmup - 1]
    return sum(epoch.targets[warmup:]) / seconds


def _cpu_rate(epoch: Epoch, warmup: int) -> float:
    seconds = epoch.cpu_stamps[-1] - epoch.cpu_stamps[warmup - 1]
    return sum(epoch.targets[warmup:]) / seconds


def _mean_loss(epoch: Epoch) -> float:
    """Return the mean over all targets of the epoch, each under the weights of its step."""
    pairs = zip(epoch.losses, epoch.targets, strict=True)
    return sum(loss * count for loss, count in pairs) / sum(epoch.targets)


def report(row: dict[str, Any]) -> str:
    """Return a result row as text."""
    settings, facts, machine_of = row["settings"], row["documents"], row["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in row["packages"].items())
    lines = [
        f"{' '.join(settings['model'])} ({row['parameters'] / 1e6:.2f} M parameters), "
        f"{settings['precision']}; "
        f"{settings['documents']} documents, {settings['global_documents']} a step, cut at "
        f"{settings['max_tokens']} tokens ({facts['cut']} are: {facts['tokens_cut']:,} tokens "
        f"lost, {facts['tokens']:,} left)",
        f"{machine_of['cpu']}, {settings['threads']} threads, load {row['load']}; {packages}",
        f"{'median [min - max]':<20}{'useful tokens/s':^24}{'per CPU second':^24}"
        f"{'ours beside it':^22}{'padding':>8}"
        f"{'targets':>9}{'steps':>6}{'loss 1':>9}{'epoch':>8}{'GiB':>6}",
    ]
    for side, found in row["contenders"].items():
        lines.append(
            f"{NAMES[side]:<20}{show(found['useful_tokens_per_second'], 0):^24}"
            f"{show(found['useful_tokens_per_cpu_second'], 0):^24}"
            f"{show(found['ours_beside'], 2):^22}"
            f"{found['padding']:>8.1%}{found['targets']:>9,}"
            f"{found['steps']:>6}{found['loss_of_step_1']:>9.4f}{found['loss_of_epoch']:>8.4f}"
            f"{found['peak_gib']['median']:>6.2f}"
        )
        if found["leakage"] is not None:
            lines.append(
                f"    a document's logits move by {found['leakage']:.1e} when another of its row "
                f"changes; alone they are {found['packed_beside_alone']:.1e} from packed"
            )
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Compare, print, and append rows to results/finetune.jsonl; return the exit code."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return FINISHED
    try:
        options = read_options(words, fields(Settings))
        chosen = [options.pop("precision")] if "precision" in options else PRECISIONS
        if "trl" not in CONTENDERS:
            print("without TRL, which is not installed (pip install trl)", file=sys.stderr)
        for precision in chosen:
            row = measure(Settings(**options, precision=precision))
            print(report(row), flush=True)
            append_row(RESULTS, row)
    except (ValueError, OSError) as error:
        is_child = isinstance(error, ChildProcessError)
        print(f"finetune: {error}", file=sys.stderr)
        return INTERNAL if is_child else BAD_CONFIG
    return FINISHED


def measure(settings: Settings) -> dict[str, Any]:
    """Run all contenders; return the result row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = prepare(folder, settings)
        facts = json.loads((folder / FACTS).read_text())
        curves = run_rounds(
            "benchmarks.finetune_sides", CONTENDERS, folder,
            rounds=settings.rounds, threads=settings.threads,
        )  # fmt: skip
    rounds = [{side: Epoch(**curve) for side, curve in one.items()} for one in curves]
    packages = ["torch", "transformers", "accelerate", *(["trl"] if "trl" in CONTENDERS else [])]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings) | {"data": Path(settings.data).name},
        "parameters": sum(p.numel() for _, p in unique_parameters(run.plan_model())),
        "documents": facts,
        "machine": machine(),
        "load": round(os.getloadavg()[1], 1),
        "packages": {name: version(name) for name in packages},
        "contenders": summarise(rounds, settings.warmup),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
