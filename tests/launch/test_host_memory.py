"""The C library keeps what a step frees: page faults are counted, in processes of their own."""

import os
import subprocess
import sys

import pytest

from launch.host_memory import KERNELS, keep_few_kernels, keep_freed_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
MEBIBYTES, ROUNDS = 64, 4
SCRIPT = f"""
import os, resource, sys
from launch.host_memory import keep_freed_memory
print(keep_freed_memory(sys.argv[1], os.environ))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * ({MEBIBYTES} << 20)
before = faults()
for _ in range({ROUNDS}):
    b"x" * ({MEBIBYTES} << 20)
print(faults() - before)
"""
OWN = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072", "MALLOC_MMAP_MAX_": "65536"}


def faults_of(device_type: str, **variables: str) -> tuple[bool, int]:
    """Return whether memory is kept, and the page faults of ROUNDS blocks of zeros."""
    environ = {name: value for name, value in os.environ.items() if name not in OWN}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, device_type],
        env=environ | variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    is_kept, count = done.stdout.split()
    return is_kept == "True", int(count)


def test_a_block_is_written_into_pages_that_are_there() -> None:
    is_kept, count = faults_of("cpu")
    assert is_kept
    # Pages are of 4 KiB; a heap that holds a round's block may still grow by some of them.
    assert count < MEBIBYTES * 256 // 16


@pytest.mark.parametrize("name", OWN)
def test_settings_of_the_user_stay(name: str) -> None:
    is_kept, _ = faults_of("cpu", **{name: OWN[name]})
    assert not is_kept


def test_on_a_gpu_nothing_is_set() -> None:
    assert not faults_of("cuda")[0]


def test_without_glibc_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(os.confstr_names, "CS_GNU_LIBC_VERSION")
    assert not keep_freed_memory("cpu", {})


def test_few_kernels_are_kept_on_a_cpu_unless_the_user_says_how_many() -> None:
    environ = {KERNELS[0]: "7"}
    keep_few_kernels("cuda", environ)
    assert environ == {KERNELS[0]: "7"}
    keep_few_kernels("cpu", environ)
    assert environ == {KERNELS[0]: "7", KERNELS[1]: "128"}
