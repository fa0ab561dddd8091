"""Where the weights of a run, a checkpoint or a model folder lie."""

import sys
from pathlib import Path

POINTERS = ("best", "latest")  # files in checkpoints/ that name a step


def model_folder(folder: Path) -> Path:
    """Return the folder of Hugging Face or peft in a run or checkpoint, or such a folder itself.

    `.../checkpoints/best` is the best step. Of a run it is that of the newest intact step;
    StorageError where a step is damaged and no older one is left.
    """
    from trainer.checkpoint.commit import MANIFEST, committed_steps, step_folder
    from trainer.directory import CHECKPOINTS

    if folder.name in POINTERS and folder.is_file():
        folder = folder.with_name(folder.read_text().strip())
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return folder
    if (folder / MANIFEST).is_file():
        return _first_intact([folder])
    if steps := committed_steps(folder / CHECKPOINTS):
        return _first_intact([step_folder(folder / CHECKPOINTS, step) for step in steps])
    raise ValueError(
        f"checkpoint={folder} is no run with a checkpoint, no checkpoint and no model folder; "
        "give one of these"
    )


def _first_intact(steps: list[Path]) -> Path:
    """Return the model folder of the first step whose weights match its manifest."""
    from trainer.checkpoint.commit import read_manifest, verify
    from trainer.errors import StorageError

    for step in steps:
        model = next(step / n for n in ("model", "trained", "adapter") if (step / n).exists())
        try:
            files = read_manifest(step.resolve())["files"]
            own = {Path(n).name: e for n, e in files.items() if Path(n).parent.name == model.name}
            verify(model, {"files": own}, 0, 1)
            return model
        except StorageError as error:
            if step == steps[-1]:
                raise
            print(f"tessera: {error}; trying the step before it", file=sys.stderr)
    raise AssertionError("no step was given")
