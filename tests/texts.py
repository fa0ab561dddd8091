"""A hundred short programs, the same on every machine and with every Python: what tiny runs read.

The standard library's own files change with the Python that runs the tests, and with them which of
a run's rows are hard.
"""

import json
import os
from pathlib import Path

NUM_BYTES = (5_200, 230, 97, 98, 3_400, 2_700, 30_000, 8_800, 5_700, 14_600)
"""About those of the standard library's first ten files: some are shorter than many a row."""
_NAMES = (
    "key", "value", "line", "number", "path", "index", "result", "first", "last", "items", "text",
    "count", "length", "other", "default", "name",
)  # fmt: skip
_LINES = (
    "def {a}_{b}({c}, {d}=None):\n", "    if {a} is None:\n        return {b}\n",
    "    for {a} in {b}.{c}():\n        {d}.append({a})\n", "    {a} = {b}[{c}] + {d}\n",
    "    # the {a} of every {b}, by {c}\n", "    return {a}({b}, {c})\n\n\n",
    "class {a}{b}:\n    {c} = '{d}'\n\n", "import {a}\n", "    assert {a} != {b}, '{c}'\n",
)  # fmt: skip


def texts_in(folder: Path) -> Path:
    """Write the texts into `folder`, once; return the file of rows."""
    path = folder / "texts.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"texts.{os.getpid()}"
        part.write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts()))
        part.replace(path)
    return path


def _texts() -> list[str]:
    state = 6  # with few bytes a run may well spike by itself; with these none does

    def choice(options: tuple[str, ...]) -> str:
        nonlocal state  # as in C's minimal standard: Python's own generators may change
        state = state * 48_271 % (2**31 - 1)
        return options[state // 7 % len(options)]

    texts = []
    for num_bytes in NUM_BYTES * 10:
        text = ""
        while len(text) < num_bytes:
            text += choice(_LINES).format(**{hole: choice(_NAMES) for hole in "abcd"})
        texts.append(text[:num_bytes])
    return texts
