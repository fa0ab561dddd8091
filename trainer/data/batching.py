"""Rows per step: what is legal on a number of ranks, and the loaders of one of them."""

from trainer.data.loader import EvalLoader, StepLoader
from trainer.data.rows import PackedRows
from trainer.data.tokens import TokenStore


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


def loaders(
    train: TokenStore,
    evaluation: TokenStore | None,
    *,
    row_tokens: int,
    global_rows: int,
    micro_rows: int,
    seed: int,
    rank: int,
    num_ranks: int,
) -> tuple[StepLoader, EvalLoader | None]:
    """Return the loaders of one data-parallel rank."""
    loader = StepLoader(
        rows=PackedRows(train, row_tokens),
        seed=seed,
        global_samples=global_rows,
        micro_rows=micro_rows,
        rank=rank,
        num_ranks=num_ranks,
    )
    if evaluation is None:
        return loader, None
    rows = PackedRows(evaluation, row_tokens)
    return loader, EvalLoader(rows=rows, micro_rows=micro_rows, rank=rank, num_ranks=num_ranks)
