"""What is said of a precision before it costs an hour."""

from pathlib import Path

import pytest
import torch

from trainer.precision import PRECISIONS, slow_bf16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "precision", "is_slow"),
    [
        ("flags\t\t: fpu avx512f avx512_vnni", "bf16", True),
        ("flags\t\t: fpu avx512f avx512_vnni", "pure_bf16", True),
        ("flags\t\t: fpu avx512f avx512_vnni", "fp32", False),
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16", "bf16", False),
        ("Features\t: fp asimd bf16", "bf16", False),
        ("Features\t: fp asimd", "bf16", True),
        ("nothing of the kind", "bf16", False),
    ],
)
def test_cpu_that_emulates_bf16_is_known(
    tmp_path: Path, flags: str, precision: str, is_slow: bool
) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text(f"processor\t: 0\n{flags}\n")
    assert slow_bf16(PRECISIONS[precision], CPU, facts) == is_slow
    assert not slow_bf16(PRECISIONS[precision], torch.device("cuda"), facts)
