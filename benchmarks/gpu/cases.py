"""What is trained on the GPU: models, rows, sides, and what each case has to reach."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from launch.binding import bind
from launch.compose import compose
from models.nn.head import IGNORED
from trainer.batch import Batch
from trainer.run import Run

RUN, OURS, THEIRS, THEIRS_COMPILED = "run.yaml", "ours", "theirs", "theirs_compiled"
FULL, TINY = "full", "tiny"
WARMUP, TIMED, WATCHED = 5, 12, 2
"""Steps: those that compile and fill caches, those that are timed, those under sync-debug error."""
_TINY = (
    "model.hidden_size=64", "model.intermediate_size=96", "model.num_hidden_layers=2",
    "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.vocab_size=320",
    "model.head_dim=16",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model at one length of rows, and who trains it."""

    name: str
    model: str
    rows: int
    row_tokens: int
    sides: tuple[str, ...] = (OURS, THEIRS)
    words: tuple[str, ...] = ()
    """More settings of ours; `adapter=lora` holds for both sides."""
    least_mfu: float | None = None
    """By 6N + 12LdT."""
    least_tokens: float | None = None
    """Tokens per second."""
    most_gib: float | None = None
    """Of memory that torch takes from the device: 74.5 are the 80 GB of a card."""
    beside: str = ""
    """Name of the case whose tokens per second `least_ratio` is about."""
    least_ratio: float | None = None

    def overrides(self, *, size: str, is_compiled: bool) -> list[str]:
        """Return the words of `tessera train`; a tiny one keeps all but the sizes."""
        rows, tokens = (self.rows, self.row_tokens) if size == FULL else (2, 64)
        emulated = ("engine.float8.emulate=true",) if "precision=fp8" in self.words else ()
        return [
            f"model={self.model}", "data=stdlib", "mesh=single", "precision=bf16", *self.words,
            *(() if size == FULL else (*_TINY, *emulated)), f"engine.compile={is_compiled}".lower(),
            f"data.row_tokens={tokens}", f"data.global_rows={rows}", f"data.micro_rows={rows}",
            "data.eval_fraction=0", "eval_every=null", "tokenizer=byte", "weights=random",
            f"max_steps={WARMUP + TIMED + WATCHED}", "schedule.warmup_steps=2", "name=gpu",
        ]  # fmt: skip


CASES = {
    case.name: case
    for case in (
        Case(
            name="1b 4096", model="llama_3_2_1b", rows=4, row_tokens=4096,
            sides=(OURS, THEIRS_COMPILED, THEIRS), least_mfu=0.55,
        ),
        Case(
            name="1b 4096 fp8", model="llama_3_2_1b", rows=4, row_tokens=4096, sides=(OURS,),
            words=("precision=fp8", "engine.float8.recipe=tensorwise"),
            beside="1b 4096", least_ratio=1.25,
        ),
        Case(
            name="8b lora 4096", model="llama_3_1_8b", rows=2, row_tokens=4096,
            words=("adapter=lora",), least_tokens=12_473,
        ),
        Case(
            name="8b pure_bf16 adamw8bit 4096", model="llama_3_1_8b", rows=1, row_tokens=4096,
            sides=(OURS,), words=("precision=pure_bf16", "optim=adamw8bit"), most_gib=74.5,
        ),
        Case(name="3b 4096", model="llama_3_2_3b", rows=2, row_tokens=4096, least_mfu=0.55),
        Case(name="1b 8192", model="llama_3_2_1b", rows=2, row_tokens=8192, least_mfu=0.55),
        Case(name="3b 8192", model="llama_3_2_3b", rows=1, row_tokens=8192, least_mfu=0.55),
    )
}  # fmt: skip


def is_possible(case: Case) -> bool:
    """Whether the packages of a case are here."""
    return "precision=fp8" not in case.words or find_spec("torchao") is not None


def write_run(case: Case, folder: Path, *, size: str, is_compiled: bool) -> Run:
    """Write the config of a case for its sides; ValueError where this machine cannot train it."""
    tree = compose(case.overrides(size=size, is_compiled=is_compiled)).tree
    tree.pop("launch")
    tree["callbacks"] = {}
    run: Run = bind(tree)
    run.check(world_size=1)
    folder.mkdir(parents=True)
    (folder / RUN).write_text(yaml.safe_dump(tree))
    return run


def read_run(folder: Path) -> Run:
    tree: dict[str, Any] = yaml.safe_load((folder / RUN).read_text())
    run: Run = bind(tree)
    return run


def rows_of(run: Run) -> int:
    """Return the rows of a step, all in one micro-batch."""
    assert run.data.micro_rows is not None
    return run.data.micro_rows


def ids_of(run: Run) -> Tensor:
    """Return (steps * rows, T) ids, the same for all sides: random, so that none is repeated."""
    random = torch.Generator().manual_seed(run.seed)
    shape = (run.num_steps * rows_of(run), run.data.row_tokens)
    return torch.randint(run.model.vocab_size, shape, generator=random)


def batch_of(ids_BT: Tensor) -> Batch:
    """Return rows of one document each as our engine takes them."""
    labels = torch.full_like(ids_BT, IGNORED)
    labels[:, :-1] = ids_BT[:, 1:]
    positions = torch.arange(ids_BT.shape[1]).expand_as(ids_BT).contiguous()
    return Batch(
        input_ids=ids_BT, labels=labels, position_ids=positions,
        segment_ids=torch.ones_like(ids_BT), provenance=("made",),
    )  # fmt: skip
