"""Which kernels work here: each is run once on a small input and compared with plain torch."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from launch.examine.finding import Finding

ROWS, HEADS, TOKENS, SIZE = 2, 2, 128, 64
MAX_TEXT = 160


def names(device: torch.device) -> list[str]:
    """Return what is tried on this device; the slowest first."""
    attentions = ["flex", "sdpa", "varlen", "flash"]
    if device.type == "cuda":
        return ["compile", *attentions, "CUDA graph"]
    return ["compile", *attentions]


def try_kernel(name: str, device: torch.device) -> Finding:
    """Run one; a kernel that is only not there is no problem until a config asks for it."""
    run = {"compile": _compile, "CUDA graph": _graph}.get(name) or _attention(name)
    try:
        run(device)
    except ValueError as error:  # our own refusals: not installed, or not for this device
        reason = str(error).removeprefix(f"attn_implementation={name!r} ").partition(";")[0]
        return Finding(check=name, found=f"not here: {reason}")
    except Exception as error:  # whatever a compiler or a driver raises: it is what is asked for
        return Finding(
            check=name, found=f"fails: {type(error).__name__}: {_short(error)}",
            needed=f"a kernel that works on {device.type}", is_fine=False,
            remedy=_REMEDIES.get(name, "set model.attn_implementation=sdpa, or repair the package"),
        )  # fmt: skip
    return Finding(check=name, found=f"works on {device.type}")


_REMEDIES = {
    "compile": "install g++ and Python's headers (and triton for GPUs), or leave "
    "engine.compile=false",
    "sdpa": "install the build of torch that fits the driver: pytorch.org/get-started",
    "CUDA graph": "install the build of torch that fits the driver: pytorch.org/get-started",
}


def check_torch() -> Finding:
    """Say what torch was built for, and what it sees."""
    count = torch.cuda.device_count()
    seen = sorted({torch.cuda.get_device_name(number) for number in range(count)})
    devices = f"{count} x {' and '.join(seen)}" if count else "no GPU"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if count:
        built += f" with NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    has_gpu = Path("/dev/nvidiactl").exists()
    return Finding(
        check="torch build", found=f"{torch.__version__} for {built}, {devices}",
        needed="a build that sees the GPU" if has_gpu else "", is_fine=bool(count) or not has_gpu,
        remedy="install the build of torch that fits the driver: pytorch.org/get-started",
    )  # fmt: skip


def _compile(device: torch.device) -> None:
    def gate(x: Tensor) -> Tensor:
        return F.silu(x) * x

    x = torch.randn(64, 64, device=device)
    torch.testing.assert_close(torch.compile(gate)(x), gate(x))


def _graph(device: torch.device) -> None:
    x = torch.randn(64, 64, device=device)
    graph = torch.cuda.CUDAGraph()
    F.silu(x)  # what is captured must have run before
    with torch.cuda.graph(graph):
        y = F.silu(x)
    x.copy_(torch.ones_like(x))
    graph.replay()
    torch.testing.assert_close(y, F.silu(torch.ones_like(x)))


def _attention(name: str) -> Callable[[torch.device], None]:
    """Return a run of our own back-end of this name: two documents in a row, beside the eager."""

    def attend(device: torch.device) -> None:
        from models.nn.backends import backend
        from models.nn.segments import Segments

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        query, key, value = torch.randn(3, ROWS, HEADS, TOKENS, SIZE, device=device, dtype=dtype)
        ids = torch.arange(TOKENS, device=device).expand(ROWS, -1) // (TOKENS // 2) + 1
        segments = Segments.within(ids)
        results = []
        for each in (backend(name), backend("eager")):
            mask = each.prepare(segments)
            with torch.no_grad():
                mixed = each.attend(query, key, value, mask, dropout=0.0, scale=SIZE**-0.5)
            results.append(mixed)
        torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)

    return attend


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ..."
