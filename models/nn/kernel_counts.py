"""How many tokens a product takes on a CPU, so that few kernels are compiled for it."""

import torch

COUNTED_BY = 128  # tokens


def counted(number: int, dtype: torch.dtype) -> int:
    """Return for how many tokens to compute where there are `number`.

    For each other number oneDNN compiles kernels of a megabyte: those of halves, and of all types
    where torch has no MKL. MKL, which computes the others, compiles none.
    """
    is_compiled = dtype.itemsize < 4 or not torch.backends.mkl.is_available()
    return -(-number // COUNTED_BY) * COUNTED_BY if is_compiled else number
