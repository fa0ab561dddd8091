"""What a checkpoint of Llama-3.1-8B costs to plan, from 2 ranks to 512: nothing is allocated.

Each number of ranks is laid out on the meta device over a process group that sends nothing. Timed
is what `Checkpoints` does on every rank before the first byte is copied: the layout of the files,
and which ranges of them are this rank's. Bytes are those of the small files and of the manifest.
"""

import json
from dataclasses import dataclass
from statistics import median
from time import process_time

import torch
import torch.distributed as dist

from benchmarks.figure import Figure
from benchmarks.in_turn import spread
from launch.binding import bind_run
from launch.compose import compose
from trainer.checkpoint.composition import Composition
from trainer.checkpoint.contents import Contents
from trainer.checkpoint.staging import Group, parts_of, ranges_of
from trainer.checkpoint.writing import PART_BYTES
from trainer.pieces import Piece
from trainer.planning.apart import apart
from trainer.preview import lay_out
from trainer.run import Run

CURVE = (2, 8, 64, 512)
FLAT, ROUNDS = 1.5, 7
WORDS = (
    "model=llama_3_1_8b", "tokenizer=byte", "mesh=fsdp", "data=text", "data.path=text.txt",
    "data.row_tokens=4096", "data.micro_rows=1", "eval_every=null", "save_every=null",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of one rank."""

    seconds: list[float]
    """Of the processor, each time that it was planned."""
    num_ranges: int
    """Byte ranges that the rank writes."""
    header_bytes: int
    """Names, shapes and offsets of all tensors, and the index: written once."""
    manifest_bytes: int
    """What the rank adds to the manifest."""


class Planned:
    """Weights and optimizer state of a rank, as shapes: what `Composition` asks an engine for."""

    def __init__(self, pieces: dict[str, Piece]) -> None:
        self.pieces = pieces
        self.state = {
            f"{kind}/{name}": piece
            for name, piece in pieces.items()
            for kind in ("exp_avg", "exp_avg_sq")
        }

    def weights(self) -> dict[str, Piece]:
        return self.pieces

    def optimizer_state(self) -> dict[str, Piece]:
        return self.state


def run_of(world_size: int) -> Run:
    tree = compose([*WORDS, f"data.global_rows={world_size}"]).tree
    run: Run = bind_run(tree | {"name": "plan", "runs": "runs"})
    return run


def measure(world_size: int, rank: int) -> Plan:
    """Plan the checkpoint of one rank some times; in a process of its own: see `apart`."""
    torch.set_num_threads(1)
    run = run_of(world_size)
    laid_out, _ = lay_out(run, world_size, rank)
    engine = Planned(laid_out.pieces())
    composition = Composition(run.checkpoint, Contents(), lambda _: None)
    seconds: list[float] = []
    groups: list[Group] = []
    ranges: dict[str, list[tuple[int, int, int]]] = {}
    for _ in range(ROUNDS):
        start = process_time()
        groups = composition.groups(engine)  # type: ignore[arg-type]
        ranges = ranges_of(parts_of(groups, {}))
        seconds.append(process_time() - start)
    files = composition.files(groups, {})
    dist.destroy_process_group()
    return Plan(
        seconds=seconds, num_ranges=sum(map(len, ranges.values())),
        header_bytes=sum(map(len, files.values())), manifest_bytes=_manifest_bytes(ranges),
    )  # fmt: skip


def _manifest_bytes(ranges: dict[str, list[tuple[int, int, int]]]) -> int:
    """Return how many bytes these ranges add to a manifest: a hash for each part of a file."""
    sizes = [sum(stop - start for _, start, stop in own) for own in ranges.values()]
    return len(json.dumps(["0" * 32] * sum(-(-size // PART_BYTES) for size in sizes)))


def figures() -> list[Figure]:
    """Plan as the last rank of each number: it writes no header, as nearly all ranks."""
    found = {ranks: apart(measure, ranks, ranks - 1) for ranks in CURVE}
    first = found[CURVE[0]]
    return [figure for ranks in CURVE[1:] for figure in _of(ranks, found[ranks], first)]


def _of(ranks: int, plan: Plan, first: Plan) -> list[Figure]:
    beside = f"{ranks} ranks beside {CURVE[0]}, Llama-3.1-8B"
    ours, theirs = ([1000 * each for each in side.seconds] for side in (plan, first))
    return [
        Figure(
            name=f"planning a checkpoint on one rank, ms of the processor ({beside})",
            ours=spread(ours), theirs=spread(theirs), target=f"<= {FLAT:g}x", limit=FLAT,
            value=median(ours) / median(theirs), is_upper=True,
        ),
        Figure(
            name=f"metadata, kB: written once, and added to the manifest by a rank ({beside})",
            ours=spread([plan.header_bytes / 1e3, plan.manifest_bytes / 1e3]),
            theirs=spread([first.header_bytes / 1e3, first.manifest_bytes / 1e3]),
            target=f"<= {FLAT:g}x", limit=FLAT,
            value=max(
                plan.header_bytes / first.header_bytes, plan.manifest_bytes / first.manifest_bytes
            ),
            is_upper=True,
        ),
    ]  # fmt: skip
