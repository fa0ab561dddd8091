"""What both sides of the comparison start from: one config, one weight file, the same rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from launch.binding import bind
from launch.compose import compose
from trainer.data.named_sources import Source
from trainer.data.sources import STANDARD_LIBRARY, open_texts
from trainer.files import write_json
from trainer.parallel.materialise import materialise, random_values
from trainer.parallel.pieces import unique_parameters
from trainer.run import Run
from trainer.settings import RANDOM

RUN, ROWS, WEIGHTS = "run.yaml", "rows.pt", "weights"


def prepare(
    folder: Path, *, overrides: list[str], rows: int, row_tokens: int, steps: int, warmup: int
) -> Run:
    """Write config, weights and rows of a comparison into `folder`; ValueError where they misfit.

    The learning rate warms up over `warmup` steps, then falls by half a cosine.
    """
    tree = compose(
        [*overrides, "data=stdlib", "mesh=single", f"schedule.warmup_steps={warmup}"]
    ).tree
    tree.pop("launch")
    documents = folder / "documents.jsonl"
    tree["data"] |= {
        "path": str(documents),
        "row_tokens": row_tokens,
        "global_rows": rows,
        "micro_rows": rows,
        "eval_fraction": 0.0,
        "cache": str(folder / "cache"),
    }
    tree |= {
        "name": "ours", "runs": str(folder), "tokenizer": "byte", "weights": RANDOM,
        "callbacks": {}, "max_steps": steps, "log_every": 1, "eval_every": None, "save_every": None,
    }  # fmt: skip
    _write_documents(documents, rows * steps, row_tokens)
    run: Run = bind(tree)
    run.check(world_size=1)
    write_weights(run, folder / WEIGHTS)
    torch.save(_rows_in_order(run), folder / ROWS)
    tree["weights"] = str(folder / WEIGHTS)
    (folder / RUN).write_text(yaml.safe_dump(tree))
    return run


def load_run(folder: Path) -> Run:
    """Return the Run that `prepare` wrote."""
    tree: dict[str, Any] = yaml.safe_load((folder / RUN).read_text())
    run: Run = bind(tree)
    return run


def _write_documents(path: Path, count: int, row_tokens: int) -> None:
    """Cut the standard library into `count` ASCII texts that, with BOS and EOS, fill a row each."""
    size = row_tokens - 2
    texts: list[str] = []
    rest = ""
    for text in _ascii_texts():
        rest += text
        cut = len(rest) - len(rest) % size
        texts += [rest[start : start + size] for start in range(0, cut, size)]
        rest = rest[cut:]
        if len(texts) >= count:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:count]))
            return
    raise ValueError(
        f"steps x rows = {count} needs more text than the standard library has "
        f"({len(texts)} rows of {row_tokens} tokens); lower steps, rows or row_tokens"
    )


def _ascii_texts() -> Iterator[str]:
    for document in open_texts(Source(path=STANDARD_LIBRARY), "text").documents():
        yield document.text.encode("ascii", "ignore").decode()


def write_weights(run: Run, folder: Path, config: dict[str, Any] | None = None) -> None:
    """Write the initial weights that our engine draws, in fp32, as a Hugging Face folder; `config`
    in place of a language model's."""
    model = run.plan_model()
    materialise(
        model, torch.device("cpu"), random_values(model, run.model.initializer_range, run.seed)
    )
    folder.mkdir()
    weights = {name: parameter.detach() for name, parameter in unique_parameters(model)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", (config or run.model.hf_config()) | {"dtype": "float32"})


def _rows_in_order(run: Run) -> torch.Tensor:
    """Return the (steps * rows, row_tokens) ids in the order in which our loader hands them out."""
    tokenizer = run.data.tokenizer(run.tokenizer, run.model.vocab_size)
    loader, _ = run.data.build(tokenizer=tokenizer, seed=run.seed, rank=0, num_ranks=1)
    batches = [batch for step in range(run.num_steps) for batch in loader.step(step).micro_batches]
    for batch in batches:
        assert (batch.segment_ids == 1).all(), "a row holds more than one document, or padding"
        assert (batch.labels[:, :-1] == batch.input_ids[:, 1:]).all()
    return torch.cat([batch.input_ids for batch in batches])
