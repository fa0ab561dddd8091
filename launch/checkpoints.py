"""`tessera checkpoints`: what a run has saved, and whether every byte is as it was written."""

import json
from pathlib import Path
from typing import Any

from launch.exit_codes import CHECK_FAILED
from launch.truth import truth
from launch.words import options_of

USAGE = """usage: tessera checkpoints run=DIR [hash=true] [json=true]

Lists the checkpoints of a run, newest first, and checks the hash of every byte of each. Nothing is
changed: a damaged one is set aside by the next start of the run, which goes on from the one before.

  run=runs/NAME   the run
  hash=true       also one hash of all tensors of each, weights and optimizer state: it does not
                  depend on the number of ranks or files that they were written by
  json=true       one JSON object per checkpoint

Exit code 1: one of them is damaged.
"""


def main(arguments: list[str]) -> int:
    """Run `tessera checkpoints` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return 0
    defaults = {"hash": "false", "json": "false"}
    options = options_of("checkpoints", arguments, needed={"run": "DIR"}, defaults=defaults)
    with_hash, is_json = (truth(key, options[key]) for key in ("hash", "json"))
    found = [_examined(step, with_hash=with_hash) for step in _steps(options["run"])]
    if is_json:
        print("\n".join(json.dumps(each) for each in found))
    else:
        print("\n".join(_line(each) for each in found))
    return CHECK_FAILED if any(each["damage"] for each in found) else 0


def _steps(run: str) -> list[Path]:
    from trainer.checkpoint.commit import committed_steps, step_folder
    from trainer.directory import CHECKPOINTS

    parent = Path(run).expanduser() / CHECKPOINTS
    steps = [step_folder(parent, step) for step in committed_steps(parent)]
    if not steps:
        raise ValueError(f"run={run} has no checkpoint; give the folder of a run")
    return steps


def _examined(folder: Path, *, with_hash: bool) -> dict[str, Any]:
    """Return what a checkpoint says of itself, and what is wrong with it."""
    from trainer.checkpoint.commit import read_manifest, verify
    from trainer.errors import StorageError

    found: dict[str, Any] = {"step": int(folder.name.removeprefix("step_")), "damage": ""}
    try:
        body = read_manifest(folder)
        verify(folder, body, 0, 1)
    except (OSError, StorageError) as error:
        return found | {"damage": str(error)}
    found["bytes"] = sum(entry["bytes"] for entry in body["files"].values())
    found |= {key: body.get(key) for key in ("world_size", "mesh", "data", "versions")}
    if with_hash:
        from trainer.checkpoint.tensor_hash import tensor_hash

        found["tensors"] = tensor_hash(folder)
    return found


def _line(found: dict[str, Any]) -> str:
    if found["damage"]:
        return f"step {found['step']:>8}  DAMAGED  {found['damage']}"
    ranks = f"{found['world_size']} rank{'s' if found['world_size'] != 1 else ''}"
    line = f"step {found['step']:>8}  intact  {found['bytes'] / 1e6:12,.1f} MB  by {ranks}"
    return f"{line}  {found['tensors']}" if "tensors" in found else line
