"""What stands beside the weights of a checkpoint: config, tokenizer, and an adapter's own files."""

from pathlib import Path
from typing import Any

from trainer.checkpoint.contents import Contents
from trainer.data.labels import label_keys
from trainer.data.tokenizers import Tokenizer
from trainer.files import write_json
from trainer.precision import PRECISIONS
from trainer.run import Run
from trainer.run_images import fitted


def write_model_files(run: Run, tokenizer: Tokenizer, contents: Contents, target: Path) -> None:
    """Make `target` a complete folder of Hugging Face, or of peft, but for the weights."""
    config = {
        **run.model.hf_config(run.task.head),
        **label_keys(run.data.labels, tokenizer),
        "dtype": str(PRECISIONS[run.precision].master).removeprefix("torch."),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    for name, keys in {"config.json": config, **contents.files}.items():
        write_json(target / name, keys)
    if run.data.image_size is not None:
        images: Any = fitted(run.data, run.model)
        images.processor.save(target)
    tokenizer.save(target)
