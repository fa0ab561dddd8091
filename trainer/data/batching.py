"""Rows per step: what is legal on a number of ranks, and the loaders of one of them."""

from collections.abc import Mapping, Sequence

from trainer.data.eval_loader import EvalLoader
from trainer.data.loader import StepLoader
from trainer.data.named_sources import Source, shares
from trainer.data.row_filling import Rows


def check_sizes(**sizes: int | None) -> None:
    """Raise ValueError for a size of the data spec that is not positive; None is none."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"data.{name}={value} is not positive; set it to 1 or more")


def rows_per_micro_batch(global_rows: int, micro_rows: int | None, num_ranks: int) -> int:
    """Return micro_rows for this many data-parallel ranks; ValueError lists what is legal."""
    if global_rows % num_ranks:
        raise ValueError(
            f"data.global_rows={global_rows} is not divisible by {num_ranks} "
            f"data-parallel ranks; run on {_divisors(global_rows)} ranks or set "
            f"data.global_rows to a multiple of {num_ranks}"
        )
    rank_rows = global_rows // num_ranks
    chosen = micro_rows or rank_rows
    if rank_rows % chosen:
        raise ValueError(
            f"data.micro_rows={chosen} does not divide the {rank_rows} rows of each of "
            f"{num_ranks} ranks; set it to one of {_divisors(rank_rows)}"
        )
    return chosen


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def check_share(fraction: float) -> None:
    """Raise ValueError for a share of held-out documents that is none."""
    if not 0.0 <= fraction < 1.0:
        raise ValueError(
            f"data.eval_fraction={fraction} is no share below 1; set it to 0 or more and less "
            "than 1"
        )


def refuse_virtual(ids: Sequence[int]) -> None:
    """Raise ValueError for virtual tokens before rows that cut documents anywhere."""
    if ids:
        raise ValueError(
            f"adapter=prompt puts {len(ids)} virtual tokens before every document, and rows of "
            "data=text, stdlib and tokens begin in the middle of one; set data=chat, which takes "
            "texts too, or adapter=lora"
        )


def loaders(
    rows: Rows,
    eval_rows: Rows | None,
    sources: Mapping[str, Source],
    *,
    global_samples: int,
    micro_rows: int,
    seed: int,
    rank: int,
    num_ranks: int,
) -> tuple[StepLoader, EvalLoader | None]:
    """Return the loaders of one data-parallel rank; `rows` are those of all sources."""
    loader = StepLoader(
        rows=rows, seed=seed, weights=shares(sources, rows.counts), global_samples=global_samples,
        micro_rows=micro_rows, rank=rank, num_ranks=num_ranks,
    )  # fmt: skip
    if eval_rows is None:
        return loader, None
    return loader, EvalLoader(rows=eval_rows, micro_rows=micro_rows, rank=rank, num_ranks=num_ranks)


def eval_loader(rows: Rows | None, micro_rows: int) -> EvalLoader | None:
    """Return the loader of an evaluation in one process."""
    return EvalLoader(rows=rows, micro_rows=micro_rows, rank=0, num_ranks=1) if rows else None
