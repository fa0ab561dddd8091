"""What each process does once, before ranks wait for each other: imports, and their garbage."""

import gc
import platform
import shutil
from contextvars import copy_context
from hashlib import sha256
from pathlib import Path
from threading import Thread

import torch

_NO_KERNEL = 'extern "C" void kernel(float* values) {}'


def import_the_rest(*, is_compiled: bool) -> None:
    """Import what torch would at first use, for seconds: optimizers its tracer, compiled blocks
    Inductor."""
    from torch import _dynamo  # noqa: F401

    if is_compiled:
        remember_instructions()
        ask_ahead()
        from torch._dynamo.repro import after_dynamo  # noqa: F401
        from torch._inductor import compile_fx  # noqa: F401


def ask_ahead() -> Thread:
    """Let another thread ask what Inductor asks of the machine before it reads its own cache.

    A hash of torch's files, and on a CPU a library for each set of vector instructions and a header
    through the C++ compiler: files and processes to wait for, while the rest is imported and data
    and model are made. Answers lie in caches of Inductor's functions; who comes first asks again.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache, torch_key
    from torch.utils import _filelock, cpp_extension  # noqa: F401  two threads import nothing

    def ask() -> None:
        if not torch.cuda.is_available():
            CppPythonBindingsCodeCache.load_pybinding_async(["float*"], _NO_KERNEL)  # compiles none
        torch_key()

    thread = Thread(target=copy_context().run, args=(ask,), daemon=True)  # as Inductor is set here
    thread.start()
    return thread


def wake_collector() -> None:
    """Turn Python's collector on, where the command let it rest, without what imports have left.

    A look at all of that takes 0.3 s, and the compiler asks for one after each graph.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def remember_instructions() -> None:
    """Ask the compiler once, and not at each start, whether it knows the CPU's vector instructions.

    For each set of them Inductor loads a library in a process of its own: 0.5 to 1 s at each start.
    What was found is remembered for this torch, compiler and CPU beside the compiled blocks.
    """
    from torch._inductor import config, cpu_vec_isa

    is_said = config.cpp.vec_isa_ok is not None  # by TORCHINDUCTOR_VEC_ISA_OK
    if is_said or platform.machine() != "x86_64" or torch.cuda.is_available():
        return
    flags = set(cpu_vec_isa.x86_isa_checker())
    note = note_of_instructions(flags)
    if not note.exists():
        if not all(each for each in cpu_vec_isa.supported_vec_isa_list if _is_in(flags, each)):
            return  # the compiler knows less than the CPU: Inductor finds out what, each time
        note.touch()
    config.cpp.vec_isa_ok = True  # part of the key of what is compiled: the same at each start


def note_of_instructions(flags: set[str]) -> Path:
    """Return the file that exists once the compiler has been found to know all of `flags`."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    compiler = Path(shutil.which(get_cpp_compiler()) or "").resolve()
    known = torch.__version__, sorted(flags), str(compiler), compiler.stat().st_mtime_ns
    return Path(cache_dir()) / f"vector_{sha256(repr(known).encode()).hexdigest()[:16]}"


def _is_in(flags: set[str], instructions: object) -> bool:
    return set(str(instructions).split()) <= flags
