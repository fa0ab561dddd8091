"""The steps that are taken apart: families and tasks, at a size whose products fill a CPU."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.plan_memory.cases import pictures
from launch.binding import bind_run
from launch.compose import compose
from trainer.data.named_sources import Source
from trainer.data.sources import STANDARD_LIBRARY, open_texts
from trainer.run import Run

ROW_TOKENS = 512
COMMON = (
    "mesh=single", "tokenizer=byte", f"data.row_tokens={ROW_TOKENS}", "precision=bf16",
    "log_every=1", "eval_every=null", "save_every=null", "max_epochs=null",
)  # fmt: skip
LLAMA_SHAPE = (
    "model.hidden_size=512", "model.intermediate_size=1408", "model.num_hidden_layers=8",
    "model.num_attention_heads=8", "model.vocab_size=32000",
)  # fmt: skip
FAMILIES = {
    "llama": ("model=llama_tiny", *LLAMA_SHAPE, "model.num_key_value_heads=4"),
    "gemma": ("model=gemma_tiny", *LLAMA_SHAPE, "model.num_key_value_heads=1"),
    "gpt_bigcode": (
        "model=gpt_bigcode_tiny", "model.n_embd=512", "model.n_layer=8", "model.n_head=8",
        "model.vocab_size=32000",
    ),
    "idefics": (
        "model=idefics_tiny", "freeze=none", *LLAMA_SHAPE,
        "data.row_images=8", "data.row_tokens=256",  # eight captions fill 232
        "model.vision_config.embed_dim=256", "model.vision_config.intermediate_size=1024",
        "model.vision_config.num_hidden_layers=4",
    ),
}  # fmt: skip
TEXT = ("data=text", "data.global_rows=8", "data.micro_rows=8")
TASKS = {
    "pretrain": TEXT,
    "lora": (*TEXT, "adapter=lora"),
    "classify": (
        "task=sequence_classification", "data=sequence_labels", "data.global_documents=32",
        "data.micro_rows=8",
    ),
}  # fmt: skip
IMAGES = ("data=vision_text", "data.global_documents=64", "data.micro_rows=8")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of step."""

    family: str
    task: str

    @property
    def name(self) -> str:
        return f"{self.family} {self.task}"

    def words(self, folder: Path) -> list[str]:
        """Return the words of `tessera train`; data and caches lie in `folder`."""
        task = list(TASKS[self.task])
        path = labelled(folder) if self.task == "classify" else documents(folder)
        if self.family == "idefics":
            task = [*IMAGES, *(["adapter=lora"] if self.task == "lora" else [])]
            path = pictures(folder)
        return [
            *COMMON, *task, *FAMILIES[self.family], f"data.path={path}", f"data.cache={folder}",
            "data.eval_fraction=0",
        ]  # fmt: skip

    def run(self, folder: Path, steps: int, *, precision: str) -> Run:
        words = [*self.words(folder), f"max_steps={steps}", f"precision={precision}"]
        tree = compose(words).tree | {"name": self.name.replace(" ", "_"), "runs": str(folder)}
        run: Run = bind_run(tree)
        return replace(run, callbacks={})


CASES = {
    case.name: case
    for case in (
        Case(family=family, task=task)
        for family in FAMILIES
        for task in TASKS
        if (family, task) != ("idefics", "classify")  # its head is a language model's alone
    )
}


def documents(folder: Path) -> Path:
    """Write 4 MB of the standard library's source, once; return the file of rows."""
    path = folder / "documents.jsonl"
    if not path.exists():
        _write(path, ({"text": text} for text in _texts(4_000_000)))
    return path


def labelled(folder: Path) -> Path:
    """Write texts of 20 to 500 bytes with one of two labels, once; return the file of rows."""
    path = folder / "labelled.jsonl"
    if not path.exists():
        rows: list[dict[str, Any]] = []
        for text in _texts(1_000_000):
            for start in range(0, len(text) - 500, 500):
                length = 20 + 96 * (len(rows) % 6)
                rows.append({"text": text[start : start + length], "label": str(len(rows) % 2)})
        _write(path, rows)
    return path


def _texts(limit: int) -> list[str]:
    texts: list[str] = []
    for document in open_texts(Source(path=STANDARD_LIBRARY), "text").documents():
        texts.append(document.text)
        limit -= len(document.text)
        if limit < 0:
            break
    return texts


def _write(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
