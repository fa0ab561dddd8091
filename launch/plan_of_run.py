"""A run that was started, planned: its config and its ranks, and what is noted beside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.planning.devices import Device
    from trainer.planning.facts import Facts
    from trainer.planning.memory import Memory


def stored_run(folder: Path, words: list[str]) -> tuple[dict[str, Any], int]:
    """Return the config of the newest start of a run, and how many processes it had.

    ValueError for a folder that holds none, and for words that would change it.
    """
    from trainer.directory import CONFIG, ENVIRONMENT
    from trainer.files import read_mapping
    from trainer.stored_config import read_stored

    if words:
        raise ValueError(
            f"{words[0]} has no effect: run={folder} is planned as it was started; leave one of "
            "them out"
        )
    processes = read_mapping(folder / ENVIRONMENT).get("world_size")
    if not (folder / CONFIG).is_file() or not isinstance(processes, int):
        raise ValueError(
            f"run={folder} holds no {CONFIG} beside an {ENVIRONMENT}; give the folder of a run "
            "that was started, as in runs/NAME"
        )
    return read_stored(folder / CONFIG), processes


def note_plan(
    folder: Path, facts: "Facts", memory: "Memory", device: "Device | None", rate: float
) -> None:
    """Leave RUN/notes/plan.json: sizes in bytes of the rank that holds most.

    Of documents the tokens are not known before they are packed, only the most that there can be.
    """
    from trainer.notes import PLAN, write_note

    is_known = facts.steps is not None and facts.is_exact
    write_note(folder, PLAN, {
        "bytes": memory.by_category,
        "peak_bytes": memory.peak,
        "flops_per_token": facts.flops.per_token,
        "tokens": facts.step_tokens * (facts.steps or 0) if is_known else None,
        "steps": facts.steps,
        "tokens_per_second": rate or None,
        "device": device.name if device else None,
        "by": "plan",
    })  # fmt: skip
