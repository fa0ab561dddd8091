"""Fine-tuning on documents of all lengths beside the Trainer's ways to do it, with targets."""

from typing import Any

from benchmarks.figure import Figure
from benchmarks.finetune import NAMES, RESULTS, measure
from benchmarks.finetune_inputs import PRECISIONS, Settings
from benchmarks.in_turn import append_row

TARGETS = {"padded": 2.5, "flattened": 1.2}
MODEL = ("model=llama_tiny",)


def figures() -> list[Figure]:
    """Measure all contenders in turn; append the rows to results/finetune.jsonl."""
    found = []
    for precision in PRECISIONS:
        row = measure(Settings(model=MODEL, precision=precision))
        append_row(RESULTS, row)
        found += figures_of(row)
    return found


def figures_of(row: dict[str, Any]) -> list[Figure]:
    """Return speed and memory beside each contender that has a target, of a result row."""
    contenders, precision = row["contenders"], row["settings"]["precision"]
    ours = contenders["ours"]
    found = []
    for side, target in TARGETS.items():
        theirs = contenders[side]
        found += [
            Figure(
                name=f"docstrings, {precision}: useful tokens/s beside {NAMES[side]}",
                ours=ours["useful_tokens_per_second"], theirs=theirs["useful_tokens_per_second"],
                target=f"ratio >= {target}", limit=target,
                value=theirs["ours_beside"]["median"], is_upper=False,
            ),
            Figure(
                name=f"docstrings, {precision}: peak memory beside {NAMES[side]}, GiB",
                ours=ours["peak_gib"], theirs=theirs["peak_gib"],
                target="ratio <= 1", limit=1.0,
                value=ours["peak_gib"]["median"] / theirs["peak_gib"]["median"], is_upper=True,
            ),
        ]  # fmt: skip
    return found
