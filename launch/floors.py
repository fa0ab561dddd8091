"""The oldest versions that Tessera runs with, and what is wrong with those before.

pyproject.toml asks for the same (a test compares them); an environment may have been changed since,
or hold others' packages that no file of ours names: `tessera doctor` looks.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The oldest version of one package."""

    version: str
    reason: str
    """CVE, or what is missing before. "recalled": not looked up when it was written."""
    is_ours: bool = True
    """Whether pyproject.toml names it; else another package brings it."""


FLOORS = {
    "torch": Floor(
        version="2.11",
        reason="CVE-2026-4538 (pickle in .pt2 files, up to 2.10), CVE-2026-24747 (code execution "
        "despite weights_only, before 2.10), CVE-2025-32434 (the same, before 2.6)",
    ),
    "hydra-core": Floor(
        version="1.3.8",
        reason="CVE-2026-106439 (its list of refused targets can be emptied, before 1.3.7), "
        "CVE-2026-68508 (a target runs anything, before 1.3.4)",
    ),
    "pyyaml": Floor(version="6.0.1", reason="CVE-2020-14343 (before 5.4; recalled)"),
    "numpy": Floor(
        version="1.26", reason="CVE-2019-6446 (pickle by default, before 1.16.3; recalled)"
    ),
    "deepspeed": Floor(
        version="0.19.8",
        reason="states that are written per parameter; CVE-2024-43497 (before 0.15.1)",
    ),
    "accelerate": Floor(version="1.15", reason="the version that is tested; no CVE known"),
    "datasets": Floor(version="4.0", reason="scripts of data sets are run before"),
    "pyarrow": Floor(version="21", reason="CVE-2023-47248 (code in parquet files, before 14.0.1)"),
    "wandb": Floor(version="0.24", reason="the version that is tested; no CVE known"),
    "safetensors": Floor(version="0.6", reason="the version that is tested; no CVE known"),
    "tokenizers": Floor(version="0.22", reason="what transformers needs; no CVE known"),
    "jinja2": Floor(
        version="3.1.6",
        reason="CVE-2025-27516 (a chat template leaves its sandbox, before 3.1.6)",
    ),
    "transformers": Floor(
        version="5.3", reason="CVE-2026-4372 (config.json alone runs code, before 5.3)"
    ),
    "rich": Floor(version="14", reason="the version that is tested; no CVE known"),
    "xxhash": Floor(version="3.5", reason="the version that is tested; no CVE known"),
    "pillow": Floor(
        version="13.0",
        reason="CVE-2026-112403 (JPEG decoder writes behind its buffer, before 13.0), "
        "CVE-2026-25990 (before 12.1.1)",
    ),
    "scikit-learn": Floor(version="1.6", reason="CVE-2024-5206 (before 1.5; recalled)"),
    "scipy": Floor(version="1.13", reason="the version that is tested; no CVE known"),
    "msgpack": Floor(version="1.2.3", reason="CVE-2026-114613 (memory leak, before 1.2.3)"),
    "urllib3": Floor(version="2.7", reason="CVE-2026-44432 and 44431 (before 2.7)", is_ours=False),
    "requests": Floor(
        version="2.32.4", reason="CVE-2024-47081 (before 2.32.4; recalled)", is_ours=False
    ),
    "filelock": Floor(version="3.20.1", reason="CVE-2025-68146 (before 3.20.1)", is_ours=False),
}
PYTHON = (3, 11)


def is_below(version: str, floor: str) -> bool:
    """Whether a version is older than a floor; its suffixes (+cpu, rc1) do not count."""
    found, needed = _numbers(version), _numbers(floor)
    length = max(len(found), len(needed))
    return found + [0] * (length - len(found)) < needed + [0] * (length - len(needed))


def _numbers(version: str) -> list[int]:
    """Return the numbers that a version begins with."""
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in match[0].split(".")] if match else []
