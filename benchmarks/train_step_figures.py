"""The step of a Llama of 40 M parameters beside the Trainer's, as figures with targets."""

from typing import Any

from benchmarks.figure import Figure
from benchmarks.in_turn import append_row
from benchmarks.train_step import RESULTS, Settings, measure

SETTINGS = Settings(
    model=(
        "model=llama_tiny", "model.hidden_size=512", "model.intermediate_size=1408",
        "model.num_hidden_layers=8", "model.num_attention_heads=8", "model.num_key_value_heads=4",
        "model.vocab_size=32000",
    ),
    precision="bf16", rows=8, row_tokens=512, steps=8, warmup=2, rounds=3, compile="both",
)  # fmt: skip
TARGETS = {"ours / theirs": 2.0, "ours_compiled / theirs_compiled": 1.5}
MODES = {"ours / theirs": "eager", "ours_compiled / theirs_compiled": "compiled"}
SAME_LOSSES = 1e-3  # bf16: see METHODS in train_step_report.py


def figures() -> list[Figure]:
    """Measure all four sides in turn; append the whole row to results/train_step.jsonl."""
    row = measure(SETTINGS)
    append_row(RESULTS, row)
    return figures_of(row)


def figures_of(row: dict[str, Any]) -> list[Figure]:
    """Return speed, memory and losses of each pair of a result row."""
    found = []
    for pair, comparison in row["comparisons"].items():
        ours, _, theirs = pair.partition(" / ")
        found += [
            Figure(
                name=f"Llama of 40 M, bf16, {MODES[pair]}: tokens/s beside the Trainer",
                ours=row[ours]["tokens_per_second"], theirs=row[theirs]["tokens_per_second"],
                target=f"ratio >= {TARGETS[pair]}", limit=TARGETS[pair],
                value=comparison["speed_ratio"]["median"], is_upper=False,
            ),
            Figure(
                name=f"the same, {MODES[pair]}: peak memory, GiB",
                ours=row[ours]["peak_gib"], theirs=row[theirs]["peak_gib"],
                target="ratio <= 1", limit=1.0,
                value=row[ours]["peak_gib"]["median"] / row[theirs]["peak_gib"]["median"],
                is_upper=True,
            ),
            Figure(
                name=f"the same, {MODES[pair]}: largest difference of a loss",
                ours=_alone(comparison["loss_difference_all_steps"]), theirs=None,
                target=f"<= {SAME_LOSSES:g}", limit=SAME_LOSSES,
                value=comparison["loss_difference_all_steps"], is_upper=True,
            ),
        ]  # fmt: skip
    return found


def _alone(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value}
