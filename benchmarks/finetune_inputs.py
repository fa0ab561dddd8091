"""What all contenders of the fine-tuning comparison start from: weights, documents, their order."""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.in_turn import check_positive
from benchmarks.train_step_inputs import RUN, WEIGHTS, write_weights
from launch.binding import bind
from launch.compose import compose
from trainer.data.bpe import train_bpe
from trainer.data.document_data import DocumentData
from trainer.data.named_sources import Source
from trainer.data.sources import STANDARD_LIBRARY, open_texts
from trainer.data.tokenizers import FileTokenizer
from trainer.files import read_lines, write_json
from trainer.run import Run
from trainer.settings import RANDOM

DOCSTRINGS = "docstrings"
PRECISIONS = ("bf16", "fp32")
DOCUMENTS, TOKENIZER, FACTS = "documents.pt", "tokenizer", "facts.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared, and how often."""

    data: str = DOCSTRINGS
    """File of jsonl, see finetune.py for the rows that it may have; or the docstrings of Python's
    standard library, of 1 to thousands of tokens."""
    precision: str = "bf16"
    """bf16 or fp32; both sides keep fp32 weights."""
    model: tuple[str, ...]
    """Overrides of the group `model` and of its fields."""
    documents: int = 1024
    """Documents of the epoch: the file's, evenly spaced."""
    global_documents: int = 32
    """Documents of one optimizer step."""
    max_tokens: int = 512
    """Where all contenders cut a document, and the length of a packed row."""
    micro_rows: int = 2
    """Packed rows of one forward pass, ours and TRL's."""
    micro_documents: int = 8
    """Padded documents of one forward pass."""
    vocab_size: int = 4096
    warmup: int = 3
    """First steps, which are not timed and in which the learning rate warms up."""
    rounds: int = 3
    threads: int = 2

    def __post_init__(self) -> None:
        check_positive(self)
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r} is unknown; set it to one of {', '.join(PRECISIONS)}"
            )
        for whole, part in (("documents", "global_documents"),
                            ("global_documents", "micro_documents")):  # fmt: skip
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{part}={getattr(self, part)} does not divide {whole}={getattr(self, whole)}; "
                    f"set {whole} to a multiple"
                )
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup} leaves nothing of {self.steps} steps to time")

    @property
    def steps(self) -> int:
        return self.documents // self.global_documents


def prepare(folder: Path, settings: Settings) -> Run:
    """Write config, tokenizer, weights and documents; ValueError where they do not serve."""
    texts = _read(settings.data, settings.documents)
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_bpe(folder / TOKENIZER, texts, settings.vocab_size)
    vocabulary = FileTokenizer(folder / TOKENIZER).vocab_size  # less, where the text is short
    tree = compose(
        [*settings.model, f"model.vocab_size={vocabulary}", "data=chat", f"data.path={path}",
         "mesh=single", "schedule=constant", f"++schedule.warmup_steps={settings.warmup}"]
    ).tree  # fmt: skip
    tree.pop("launch")
    tree["data"] |= {
        "row_tokens": settings.max_tokens,
        "global_documents": settings.global_documents,
        "micro_rows": settings.micro_rows,
        "too_long": "cut",
        "eval_fraction": 0.0,
        "cache": str(folder / "cache"),
    }
    tree |= {
        "name": "ours", "runs": str(folder), "tokenizer": str(folder / TOKENIZER),
        "weights": RANDOM, "precision": settings.precision, "callbacks": {},
        "max_steps": settings.steps, "log_every": 1, "eval_every": None, "save_every": None,
    }  # fmt: skip
    run: Run = bind(tree)
    run.check(world_size=1)
    write_weights(run, folder / WEIGHTS)
    _write_documents(run, folder, settings, texts)
    tree["weights"] = str(folder / WEIGHTS)
    (folder / RUN).write_text(yaml.safe_dump(tree))
    return run


def _read(data: str, count: int) -> list[str]:
    """Return `count` texts of the file, evenly spaced: it may be sorted by source."""
    path = Path(data).expanduser()
    if data == DOCSTRINGS:
        texts = list(_docstrings())
    elif not path.is_file():
        raise ValueError(f"data={path} is no file; give a jsonl file with texts")
    else:
        texts = list(filter(None, map(_text, read_lines(path))))
    if len(texts) < count:
        raise ValueError(f"{data} holds {len(texts)} documents; set documents to that or less")
    return list(islice(texts, 0, None, len(texts) // count))[:count]


def _docstrings() -> Iterator[str]:
    """Yield what is said of each module, class and function of the standard library, once."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    seen = set()
    for document in open_texts(Source(path=STANDARD_LIBRARY), "text").documents():
        try:
            tree = ast.parse(document.text)
        except SyntaxError:  # files that show what is no Python
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and text not in seen:
                seen.add(text)
                yield text


def _text(row: dict[str, Any]) -> str:
    """Return the words of a sentence, the body of a mail, or a text as it is."""
    if "tokens" in row:
        return " ".join(row["tokens"])
    text: str = row["text"]
    return (text.partition("\n\n")[2] if text.startswith("From ") else text).strip()


def _write_documents(run: Run, folder: Path, settings: Settings, texts: list[str]) -> None:
    """Write the ids of the epoch's documents, in the order in which our loader takes them."""
    assert isinstance(run.data, DocumentData)
    data = replace(run.data, packing="off", micro_rows=1)
    tokenizer = data.tokenizer(run.tokenizer, run.model.vocab_size)
    loader, _ = data.build(tokenizer=tokenizer, seed=run.seed, rank=0, num_ranks=1)
    batches = [batch for step in range(run.num_steps) for batch in loader.step(step).micro_batches]
    documents = [batch.input_ids[batch.segment_ids > 0].tolist() for batch in batches]
    torch.save(documents, folder / DOCUMENTS)
    lengths = [len(ids) for ids in tokenizer.encode_documents(texts)]
    facts = {
        "cut": sum(length > settings.max_tokens for length in lengths),
        "tokens": sum(min(length, settings.max_tokens) for length in lengths),
        "tokens_cut": sum(max(length - settings.max_tokens, 0) for length in lengths),
        "longest": max(lengths),
    }
    write_json(folder / FACTS, facts)
    write_json(folder / "settings.json", {
        "micro_rows": settings.micro_rows, "micro_documents": settings.micro_documents,
        "max_tokens": settings.max_tokens, "global_documents": settings.global_documents,
    })  # fmt: skip
