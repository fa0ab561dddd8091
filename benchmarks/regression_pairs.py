"""What `benchmarks.regression` compares: our way and the plain one, on the same work."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.loader import open_loader, write_real
from launch.binding import bind_run
from launch.compose import compose
from models.nn.head import LMHead
from trainer.batch import Batch
from trainer.data.shards import TOKENS, Shard
from trainer.parallel.materialise import materialise, random_values
from trainer.preview import lay_out

ROW_TOKENS, ROWS = 128, 4
MODEL = (
    "model=llama_tiny", "model.hidden_size=128", "model.intermediate_size=384",
    "model.num_hidden_layers=4", "model.vocab_size=4096", "tokenizer=byte", "precision=fp32",
    "mesh=single", "data=text", "data.path=none.txt", f"data.row_tokens={ROW_TOKENS}",
    f"data.micro_rows={ROWS}", f"data.global_rows={ROWS}", "eval_every=null", "save_every=null",
)  # fmt: skip
HEAD_TOKENS, HEAD_SIZE, HEAD_VOCABULARY = 512, 256, 8192
LOADER_TOKENS, LOADER_ROWS = 512, 64


class Pair(NamedTuple):
    """Two ways to do the same work once."""

    ours: Callable[[], object]
    theirs: Callable[[], object]


def step(folder: Path) -> Pair:
    """A step of the engine, and the same model in a loop by hand: all logits, plain clipping."""
    torch.set_num_threads(1)
    run = bind_run(compose(list(MODEL)).tree | {"name": "step", "runs": str(folder)})
    device = torch.device("cpu")
    laid_out, mesh = lay_out(run, 1, 0)
    around = run.surroundings(laid_out.parts[0], mesh, device)
    laid_out.fill(device, random_values(laid_out.parts[0], 0.02, 0))
    engine = run.engine.build(laid_out, around)
    model = run.trained_model()
    materialise(model, device, random_values(model, 0.02, 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch, numbers = _batch(), count(1)

    def ours() -> object:
        return engine.train_step(next(numbers), [batch], ROWS * ROW_TOKENS)

    def theirs() -> None:
        logits = model(*batch.text)
        F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Pair(ours, theirs)


def _batch() -> Batch:
    """Return rows of one document each."""
    ids = torch.randint(0, 256, (ROWS, ROW_TOKENS), generator=torch.Generator().manual_seed(0))
    return Batch(
        input_ids=ids, labels=ids.roll(-1, 1), segment_ids=torch.ones_like(ids),
        position_ids=torch.arange(ROW_TOKENS).expand_as(ids), provenance=("",) * ROWS,
    )  # fmt: skip


def head(_: Path) -> Pair:
    """The head's loss and gradients in chunks, and cross-entropy over all logits."""
    torch.set_num_threads(1)
    layer = LMHead(HEAD_SIZE, HEAD_VOCABULARY, chunk_tokens=HEAD_TOKENS)
    hidden_BTD = torch.randn(1, HEAD_TOKENS, HEAD_SIZE, requires_grad=True)
    labels_BT = torch.randint(0, HEAD_VOCABULARY, (1, HEAD_TOKENS))
    scale = torch.tensor(1.0 / HEAD_TOKENS, dtype=torch.float64)

    def ours() -> None:
        layer.loss(hidden_BTD, labels_BT, scale).objective.backward()
        layer.weight.grad = hidden_BTD.grad = None

    def theirs() -> None:
        logits = F.linear(hidden_BTD, layer.weight)
        F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten()).backward()
        layer.weight.grad = hidden_BTD.grad = None

    return Pair(ours, theirs)


def loader(folder: Path) -> Pair:
    """A step of packed rows, and as many rows read from a mapped file: no borders, no labels."""
    torch.set_num_threads(1)
    write_real(folder / "tokens", num_documents=3_000)
    loader = open_loader(folder / "tokens", LOADER_TOKENS, LOADER_ROWS, 8)
    path = min((folder / "tokens").glob("*.shard"))
    section = Shard(path).footer.sections[TOKENS]
    mapped = np.memmap(path, section.dtype, "r", offset=section.offset, shape=(section.count,))
    places = np.random.default_rng(0)
    numbers = count()

    def ours() -> object:
        return loader.step(next(numbers))

    def theirs() -> object:
        starts = places.integers(0, section.count - LOADER_TOKENS, LOADER_ROWS).tolist()
        rows = np.stack([mapped[start : start + LOADER_TOKENS] for start in starts])
        return torch.from_numpy(rows.astype(np.int64))

    return Pair(ours, theirs)
