"""Messages of one optimizer step by layout: how many collectives, and how many bytes enter them.

    python -m benchmarks.collectives            a table over the layouts of `tessera verify`

Counted on rank 0 by torch's dispatcher, on the shrunk model of `experiment=demo` (4 blocks, tied
vocabulary, 4 micro-batches of 2 rows x 32 tokens per data rank and step, fp64).
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.binding import bind
from launch.compose import compose
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.engines.native import NativeEngine
from trainer.verify.forked import run_ranks
from trainer.verify.layouts import LAYOUTS, NamedLayout
from trainer.verify.shrink import Small, shrink

KINDS = {
    "allreduce_": "all-reduce", "all_reduce": "all-reduce", "allgather_": "all-gather",
    "_allgather_base_": "all-gather", "all_gather_into_tensor": "all-gather",
    "all_gather_single": "all-gather", "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter", "send": "send", "recv_": "recv",
    "alltoall_": "all-to-all", "all_to_all_single": "all-to-all", "broadcast_": "broadcast",
}  # fmt: skip


@dataclass
class Messages(TorchDispatchMode):
    """Counts collectives by kind, and the bytes of their largest tensor."""

    counts: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2]
            if name in KINDS:
                kind = KINDS[name]
                tensors = [x for x in tree_leaves((args, result)) if isinstance(x, Tensor)]
                self.counts[kind] += 1
                self.bytes[kind] += max((x.numel() * x.element_size() for x in tensors), default=0)
            elif name not in ("wait_tensor", "_wrap_tensor_autograd"):
                self.counts[f"? {name}"] += 1
        return result


def count(placement: Placement, small: Small, layout: NamedLayout) -> Messages:
    """Return the messages of the third step: groups are made and buckets laid out before it."""
    ranks = Ranks(placement, 30.0)
    run = layout.of(small.run)
    mesh = run.mesh.build(ranks=ranks)
    model = run.plan_model()
    engine = build_engine(run, model, ranks, mesh)
    for step in (1, 2, 3):
        batches = small.rows.micro_batches(step, mesh.dp_rank, mesh.dp_size)
        with Messages() as messages:
            engine.train_step(step, batches, small.rows.num_tokens(batches))
    ranks.barrier()
    return messages


def small_demo() -> Small:
    """Return the demo at the size that `tessera verify` computes."""
    tree = compose(["experiment=demo", "name=small"]).tree
    return shrink(bind({key: value for key, value in tree.items() if key != "launch"}))


def table() -> list[str]:
    """Return the rows of a Markdown table over all native layouts."""
    small = small_demo()
    columns = ("all-reduce", "all-gather", "reduce-scatter", "send", "recv")
    lines = ["| layout | ranks | " + " | ".join(columns) + " | kB per rank and step |"]
    lines.append("|---|---|" + "---|" * (len(columns) + 1))
    for layout in LAYOUTS.values():
        if isinstance(layout.engine, NativeEngine):
            messages = run_ranks(layout.processes, count, small, layout)[0]
            cells = " | ".join(str(messages.counts[kind]) for kind in columns)
            total = sum(messages.bytes.values()) / 1e3
            lines.append(f"| {layout.name} | {layout.processes} | {cells} | {total:,.0f} |")
            others = set(messages.counts) - set(columns)
            assert not others, others
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(table()))
