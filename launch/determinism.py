"""What `deterministic=run` needs of the environment, set before any library reads it."""

import sys
from collections.abc import MutableMapping
from typing import Any

RUN = "run"
# The first is what is set; others would serve too.
VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),  # NVIDIA: else products may be split anew
    "NCCL_ALGO": ("Ring",),  # one order of additions, whatever is measured at the start
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


def hold(deterministic: Any, environ: MutableMapping[str, str]) -> None:
    """Set the variables for `deterministic=run`; ValueError where that is too late or unwanted."""
    if deterministic != RUN:
        return
    missing = [name for name in VARIABLES if name not in environ]
    for name, values in VARIABLES.items():
        if (found := environ.setdefault(name, values[0])) not in values:
            raise ValueError(
                f"{name}={found} is set, and deterministic=run needs {' or '.join(values)}; unset "
                "it, or set deterministic=off"
            )
    torch: Any = sys.modules.get("torch")
    if missing and torch is not None and torch.cuda.is_initialized():
        raise ValueError(
            f"deterministic=run needs {missing[0]} before the GPU is used, which it is already; "
            f"set {missing[0]}={VARIABLES[missing[0]][0]} where Python is started"
        )
