"""Build a GPU that computes nothing: `python -m tests.null_gpu.build FOLDER`.

`libnullgpu.so`, to be preloaded, stands before CUDA's runtime, cuBLAS and NCCL; `libcuda.so.1` is
the driver. What is written out in C answers as an H100 would; every other call that torch's
libraries make, and every other one of the driver, does nothing and says that all is well.
"""

import re
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
SITE = Path(torch.__file__).parents[1]
INCLUDE = SITE / "nvidia" / "cu13" / "include"
CALLERS = ("c10_cuda", "torch_cuda", "torch_cuda_linalg", "torch_python")
PREFIXES = r"(__cuda|cuda|cublas|nccl)[A-Z]\w*"
# The true runtime keeps its books of kernels, and of what an error is called.
TRUE = r"__cuda(Un)?[Rr]egister\w*|__cuda(Push|Pop|InitModule)\w*|cudaGetError\w+"


def run(*words: str | Path) -> str:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout


def defined(library: Path) -> set[str]:
    """Return the names that a library defines."""
    return {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}


def called() -> set[str]:
    """Return what torch's libraries call of CUDA's."""
    names: set[str] = set()
    for name in CALLERS:
        found = run("nm", "-D", "--undefined-only", SITE / "torch" / "lib" / f"lib{name}.so")
        names |= {line.split()[-1].partition("@")[0] for line in found.splitlines()}
    return {n for n in names if re.fullmatch(PREFIXES, n) and not re.fullmatch(TRUE, n)}


def of_the_driver() -> set[str]:
    text = (INCLUDE / "cuda.h").read_text()
    return set(re.findall(r"CUresult CUDAAPI (cu[A-Z]\w+)\(", text))


def link(target: Path, sources: list[Path], names: set[str]) -> None:
    """Compile `sources` into `target`; those of `names` that they leave out do nothing."""
    compiler = ["gcc", "-shared", "-fPIC", "-w", f"-I{INCLUDE}", f"-Wl,-soname,{target.name}"]
    run(*compiler, "-o", target, *sources)
    rest = target.with_suffix(".rest.c")
    missing = sorted(names - defined(target))
    rest.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in missing))
    run(*compiler, "-o", target, *sources, rest)


def build(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    link(folder / "libnullgpu.so", [HERE / "runtime.c", HERE / "libraries.c"], called())
    link(folder / "libcuda.so.1", [HERE / "driver.c"], of_the_driver())


if __name__ == "__main__":
    build(Path(sys.argv[1]))
